r"""Self-influence: how much of the work on an example's own loss the example itself had to do.

S_i = Σ_{t : i ∈ B_t} η_t s_t w ‖∇ℓ_i(θ_t)‖², with the learning rate η, the clipping factor s and the example's share w
in the batch's loss: to first order, by how much i's own plain gradient steps lowered i's own loss. Examples that
nothing else explains (mislabelled ones, outliers) have to be learnt by themselves, and come first. Under momentum, Adam
and their like the same number is measured, at the rates of the log: it ranks examples, and is no line of a bill.

Source: TracIn's self-influence, Pruthi, Liu, Kale & Sundararajan 2020, arXiv 2002.08484, here along the whole run.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kxexplain.attribution.walk import is_steady, share_of, watched
from kxexplain.errors import ArgumentError
from kxexplain.gradients.factors import scale, wide
from kxexplain.gradients.ordinary import StepGradients
from kxexplain.gradients.products import squared_norm
from kxexplain.kernels.budget import progress_bar
from kxexplain.shapes import Examples
from kxexplain.trajectory import Replayer, Trajectory


def self_influence(
    trajectory: Trajectory, model: nn.Module, dataset: Examples, *, progress: bool = False
) -> Float[Tensor, "train"]:
    """Every training example's self-influence, in one replay of the training; large for mislabelled examples.

    Args:
        trajectory: the recorded training, by any optimiser.
        model: a model of the recorded architecture; not changed.
        dataset: the training examples, as recorded.
        progress: show a bar over the replayed steps.

    Raises:
        ModelError: not the recorded architecture.
        DatasetError: not the recorded examples.
        ArgumentError: imported checkpoints, of which no step is known, or a trajectory without steps.
        ReplayError: the log does not lead to the recorded states.

    >>> import tempfile, kxexplain as kx
    >>> data = torch.utils.data.TensorDataset(torch.ones(4, 1), torch.tensor([0, 0, 0, 1]))  # the last one is odd
    >>> trajectory = kx.train(nn.Linear(1, 2), data, epochs=200, batch_size=4, out=tempfile.mkdtemp(), progress=False)
    >>> int(self_influence(trajectory, nn.Linear(1, 2), data).argmax())
    3
    """
    if not trajectory.manifest.logged or not len(trajectory):
        raise ArgumentError(
            f"{trajectory.path} has no log of steps to go through; self-influence needs a recorded training"
        )
    groups = trajectory.manifest.optimizer.groups
    with Replayer(trajectory, model, dataset) as replayer, progress_bar(progress, len(trajectory), "replaying") as tick:
        parameters, layout = watched(replayer)
        like = next(iter(parameters.values()))
        found = torch.zeros(trajectory.manifest.dataset.count, dtype=wide(like), device=like.device)
        replayer.seek(0)
        for record in trajectory.steps:
            watch = StepGradients(layout, parameters, len(record.indices), steady=is_steady(trajectory))
            replayer.advance(watch)
            rates = {n: rate for group, rate in zip(groups, record.rates, strict=True) for n in group.names}
            # factors hold w ∇ℓ_i: the root of η goes to either side of the product
            rooted = scale(watch.factors, {n: rates.get(n, 0.0) ** 0.5 for f in watch.factors for n in f.names})
            own = squared_norm(rooted)[:, 0] * (record.clip / share_of(trajectory, record))
            found.index_add_(0, torch.as_tensor(record.indices, device=like.device), own.to(found.dtype))
            tick()
    return found.to(like.dtype)

r"""The path kernel in the flow measure: K(x, x') = ∫ K_θ(τ)(x, x') dτ along the recorded trajectory.

Time is τ = Σ η, so that gradient flow runs at unit speed; the integral is taken over the recorded states by the
trapezoidal rule, whose weights are positive: the kernel is symmetric and positive semi-definite, as a support
vector machine needs. (The bill's own kernel counts an example only while it is in the batch; see
:class:`kxexplain.attribution.result.Explanation`.)
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn

from kxexplain.errors import ArgumentError
from kxexplain.kernels.blocks import Buffer
from kxexplain.kernels.tangent import Outputs, TangentKernel, integrate, require_inputs
from kxexplain.shapes import Inputs
from kxexplain.trajectory import Trajectory
from kxexplain.trajectory.states import load_model


def flow_weights(trajectory: Trajectory) -> list[float]:
    """The trapezoidal rule's weight for every recorded state; they add up to Σ η.

    Raises:
        ArgumentError: the trajectory has no steps.
    """
    if len(trajectory) == 0:
        raise ArgumentError("the trajectory has no steps; train first")
    at = [state.step for state in trajectory.states]
    elapsed = [0.0]
    for first, last in pairwise(at):
        rates = [sum(step.rates) / len(step.rates) for step in trajectory.steps[first:last]]
        elapsed.append(elapsed[-1] + sum(rates))
    gaps = [b - a for a, b in pairwise(elapsed)]
    return [(before + after) / 2 for before, after in zip([0.0, *gaps], [*gaps, 0.0], strict=True)]


def path_kernel(
    trajectory: Trajectory,
    model: nn.Module,
    x1: Inputs,
    x2: Inputs | None = None,
    outputs: Outputs = "trace",
    *,
    diag: bool = False,
    out: Buffer | None = None,
    batch: int | None = None,
    memory: str | int = "1GB",
    progress: bool = False,
) -> Tensor:
    r"""Gram matrix of the path kernel, Σ_s w_s K_{θ_s}(x, x'), over the recorded states.

    Args:
        trajectory: the recorded training.
        model: a model of the recorded architecture; not changed.
        x1: n inputs.
        x2: m inputs; ``x1`` itself if ``None``: half the work, and an exactly symmetric matrix.
        outputs: ``"trace"``, ``"full"`` or one output's number, as for :func:`kxexplain.tangent_kernel`.
        diag: only K(x, x), without the matrix.
        out: where the result is written, block by block and state by state; as for :func:`kxexplain.tangent_kernel`.
        batch: examples differentiated at once; as many as suit the memory if ``None``. Changes no result.
        memory: bytes for intermediate values, the result not among them, as a number or like ``"500MB"``.
        progress: show a bar over the states' blocks.

    Returns:
        [n, m], or for ``"full"`` [n, m, C, C]; with ``diag`` [n] or [n, C, C]. Symmetric and positive semi-definite
        for ``x2=None``. If ``out`` was given, a tensor that shares its memory.

    Raises:
        ModelError: not the recorded architecture.
        DatasetError: no inputs.
        ArgumentError: no steps, an unknown value of ``outputs``, ``batch`` or ``memory``, a diagonal between two
            batches, or a buffer of another shape or dtype.

    Source: Domingos 2020, arXiv 2012.00152, definition 2.

    >>> import tempfile, torch, kxexplain as kx
    >>> data = torch.utils.data.TensorDataset(torch.eye(2), torch.eye(2))
    >>> model = torch.nn.Linear(2, 2, bias=False)
    >>> sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    >>> trajectory = kx.train(model, data, "mse", sgd, epochs=2, batch_size=2, out=tempfile.mkdtemp(), progress=False)
    >>> path_kernel(trajectory, model, torch.eye(2))  # a linear model's kernel is constant: 2 outputs × Σ η
    tensor([[2., 0.],
            [0., 2.]])
    """
    Trajectory.required(trajectory).check_model(model)
    require_inputs(x1, x2, diag=diag)
    weights = flow_weights(trajectory)
    with torch.random.fork_rng(devices=[]):
        kernel = TangentKernel(model, x1, outputs, batch, memory)

        def along() -> Iterator[float]:
            for state, weight in zip(trajectory.states, weights, strict=True):
                load_model(trajectory.state(state.step), kernel.model)
                yield weight

        return integrate(kernel, along(), x1, x2, diag=diag, out=out, progress=(progress, len(weights)))

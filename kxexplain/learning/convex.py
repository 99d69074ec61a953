r"""The dual coefficients of a linear model, read off its recorded training.

A model that is linear in its parameters has a constant kernel. With weight decay charged to the updates that it erodes,
contribution_i(x) = K(x, x_i) d_i with one d_i for all x: at the optimum of hinge loss with decay λ over n examples, an
SVM's dual coefficient for C = 1/(nλ); of logistic loss with decay, C (y_i − p_i).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kxexplain.attribution import explain
from kxexplain.errors import ArgumentError, ModelError
from kxexplain.kernels.tangent import tangent_kernel
from kxexplain.learning.run import NO_EPOCH, permutation
from kxexplain.shapes import Examples
from kxexplain.trajectory import Trajectory, fetch


@dataclass(frozen=True)
class DualForm:
    """f(x) = Σ_i K(x, x_i) d_i, up to a constant that does not depend on x and what is left of the initial model.

    Attributes:
        coefficients: d_i, [train, output].
        misfit: ‖contributions − K d‖ / ‖contributions‖ at the anchors: rounding, for a model linear in its parameters.
    """

    coefficients: Float[Tensor, "train output"]
    misfit: float


def dual_coefficients(
    trajectory: Trajectory,
    model: nn.Module,
    dataset: Examples,
    *,
    anchors: int = 32,
    seed: int = 0,
    tolerance: float = 1e-3,
    progress: bool = False,
) -> DualForm:
    r"""Dual coefficients of a recorded model that is linear in its trained parameters.

    d_i is what fits contribution_i(x) = K(x, x_i) d_i + const at some inputs x, the anchors. The constant takes up
    an intercept, which may have another decay than the weights, or none, as an SVM's has.

    Args:
        trajectory: the recorded training, weight decay as the optimiser's.
        model: a model of the recorded architecture, frozen parts allowed (random or tangent features).
        dataset: the training examples, as recorded.
        anchors: how many of the training inputs to ask about.
        seed: of their choice.
        tolerance: largest misfit.
        progress: show a bar over the replayed steps.

    Raises:
        ModelError: contributions are no constants times the kernel: the model is not linear in its parameters.
        ArgumentError: fewer than two anchors.

    Source: Domingos 2020, arXiv 2012.00152, and the representer theorem.

    >>> import tempfile, kxexplain as kx
    >>> data = torch.utils.data.TensorDataset(torch.eye(3), torch.tensor([[1.0], [-1.0], [1.0]]))
    >>> model = nn.Linear(3, 1, bias=False)
    >>> sgd = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.5)
    >>> trajectory = kx.train(model, data, "mse", sgd, epochs=40, batch_size=3, out=tempfile.mkdtemp(), progress=False)
    >>> dual_coefficients(trajectory, model, data).coefficients[:, 0]  # (2/n) y / (2/n + λ) for orthonormal inputs
    tensor([ 0.5714, -0.5714,  0.5714])
    """
    n = len(dataset)
    if isinstance(anchors, bool) or not isinstance(anchors, int) or min(anchors, n) < 2:
        raise ArgumentError(f"got anchors={anchors!r} of {n} examples; expected at least 2")
    chosen = permutation(n, seed, NO_EPOCH)[:anchors].sort().values
    with torch.random.fork_rng(devices=[]):
        inputs, _ = fetch(dataset, range(n), next(model.parameters()).device)
        asked, _ = fetch(dataset, chosen, next(model.parameters()).device)
    bill = explain(
        trajectory, model, dataset, asked, target="all", decay="charged", kernel=False, progress=progress
    )  # fmt: skip
    kernel = tangent_kernel(model, asked, inputs, "full").double()
    kernel = kernel - kernel.mean(0)
    put = bill.contributions.double()
    put = put - put.mean(0)
    squares = torch.einsum("qnac,qnad->ncd", kernel, kernel)
    found = torch.linalg.pinv(squares, hermitian=True) @ torch.einsum("qnac,qna->nc", kernel, put)[..., None]
    fitted = torch.einsum("qncd,nd->qnc", kernel, found[..., 0])
    misfit = float((put - fitted).norm() / put.norm()) if float(put.norm()) > 0 else 0.0
    if not misfit <= tolerance:
        raise ModelError(
            f"contributions differ from a constant times the kernel by {misfit:.2g} of their size; expected a model "
            "that is linear in its trained parameters (freeze the others), recorded with its own weights"
        )
    return DualForm(found[..., 0].to(bill.contributions.dtype), misfit)


__all__ = ["DualForm", "dual_coefficients"]

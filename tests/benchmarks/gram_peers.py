"""The traced tangent-kernel Gram matrix as other libraries compute it, one function each.

Every function takes a model, x1 [n, ...] and x2 [m, ...], and gives K[n, m] = Σ_c ⟨∇f_c(x_i), ∇f_c(x'_j)⟩: each can
compute the trace. A library that differentiates one number per example is asked once per output, and the answers are
added up. Each is used through its own interface, with x1's gradients in blocks that fit ``BLOCK_BYTES``. dattri and the
tutorial differentiate x2 again for each block of x1; the others keep x2's gradients, where they write them out.
"""

from __future__ import annotations

import copy
import importlib
import io
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.utils.data import DataLoader, TensorDataset

Gram = Callable[[nn.Module, Tensor, Tensor], Tensor]

# One block of gradients; of the Jacobian of MLP 784-256-256-10, 50 examples.
BLOCK_BYTES = 540_000_000


def columns(model: nn.Module, x: Tensor) -> int:
    """Number of outputs."""
    with torch.no_grad():
        return int(model(x[:1]).shape[1])


def block(model: nn.Module, outputs: int) -> int:
    """Examples whose written-out gradients of so many outputs fit a block."""
    return max(1, BLOCK_BYTES // (outputs * sum(p.numel() * p.element_size() for p in model.parameters())))


def torch_func_tutorial(model: nn.Module, x1: Tensor, x2: Tensor) -> Tensor:
    """PyTorch's tutorial "Neural Tangent Kernels", Jacobian contraction: vmap(jacrev), then einsum; block by block."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def single(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, values, (x[None],))[0]

    jacobian = vmap(jacrev(single), (None, 0))
    size = block(model, columns(model, x1))
    rows = []
    for a in x1.split(size):
        ja = [j.flatten(2) for j in jacobian(parameters, a).values()]
        row = []
        for b in x2.split(size):
            jb = [j.flatten(2) for j in jacobian(parameters, b).values()]
            row.append(sum(torch.einsum("Naf,Maf->NM", p, q) for p, q in zip(ja, jb, strict=True)))
        rows.append(torch.cat(row, 1))
    return torch.cat(rows)


def nngeometry_gram(model: nn.Module, x1: Tensor, x2: Tensor) -> Tensor:
    """``GramMatrix``, factored for linear layers and written out for convolutions, one output at a time.

    It makes the symmetric matrix of one list of points, batch by batch, and only [n, m] of it is asked for. Least is
    wasted when x2 is listed with as many points of x1 at a time: of three blocks, one is the one wanted.
    """
    from nngeometry import GramMatrix

    m = len(x2)
    total = x1.new_zeros(len(x1), m)
    for start in range(0, len(x1), m):
        points = torch.cat([x2, x1[start : start + m]])
        batches = [range(m), range(m, len(points))]
        for c in range(columns(model, x1)):
            loader = DataLoader(TensorDataset(points), batch_sampler=batches)
            found = GramMatrix(model, loader, function=lambda x, c=c: model(x)[:, [c]]).to_torch()
            total[start : start + m] += found[0, m:, 0, :m]
    return total


def nngeometry_jacobian(model: nn.Module, x1: Tensor, x2: Tensor) -> Tensor:
    """``Jacobian``, written out for every layer, and one matrix product for each pair of blocks."""
    from nngeometry import Jacobian

    def jacobian(x: Tensor) -> Tensor:
        batch = DataLoader(TensorDataset(x), batch_size=len(x))
        return Jacobian(model, batch).to_torch()  # [c, n, p]

    size = block(model, columns(model, x1))
    rows = [jacobian(b) for b in x2.split(size)]
    return torch.cat([_against(jacobian(a), rows) for a in x1.split(size)])


def _against(left: Tensor, rights: list[Tensor]) -> Tensor:
    """Σ_c J_c J'_cᵀ, [n, m], for a block [c, n, p] and all blocks of the other side."""
    return torch.cat([sum(j @ k.T for j, k in zip(left, right, strict=True)) for right in rights], 1)


def captum(model: nn.Module, x1: Tensor, x2: Tensor) -> Tensor:
    """``TracInCP`` with its sample-wise trick, one checkpoint, rate 1; its "loss" is one output, summed."""
    from captum.influence import TracInCP

    model, size = copy.deepcopy(model), block(model, 1)  # it leaves gradients in the parameters
    train, test = (TensorDataset(x, torch.zeros(len(x))) for x in (x1, x2))
    total = x1.new_zeros(len(x1), len(x2))
    for c in range(columns(model, x1)):
        with warnings.catch_warnings():  # that its hooks are old, and that a function without `reduction` sums
            warnings.simplefilter("ignore")
            tracin = TracInCP(
                model, train, ["as it stands"], lambda module, name: 1.0,
                loss_fn=lambda outputs, labels, c=c: outputs[:, c].sum(),
                batch_size=size, sample_wise_grads_per_batch=True,
            )  # fmt: skip
            total += tracin.influence(DataLoader(test, batch_size=size)).T.detach()
    return total


def dattri(model: nn.Module, x1: Tensor, x2: Tensor) -> Tensor:
    """``TracInAttributor``, one checkpoint, weight 1, without its random projection; its "loss" is one output."""
    from dattri.algorithm.tracin import TracInAttributor
    from dattri.task import AttributionTask

    model, size = copy.deepcopy(model), block(model, 1)
    train, test = (DataLoader(TensorDataset(x), batch_size=size) for x in (x1, x2))
    total = x1.new_zeros(len(x1), len(x2))
    for c in range(columns(model, x1)):

        def output(parameters: Any, data: tuple[Tensor], c: int = c) -> Tensor:
            return functional_call(model, parameters, (data[0][None],))[0, c]

        task = AttributionTask(output, model, model.state_dict())
        attributor = TracInAttributor(task, weight_list=torch.ones(1), normalized_grad=False)
        attributor.projector_kwargs = None  # None as an argument would leave its default: 512 dimensions
        with redirect_stderr(io.StringIO()):  # two progress bars a batch
            total += attributor.attribute(train, test).detach()
    return total


# name: the module it needs, and how it is asked
PEERS: dict[str, tuple[str, Gram]] = {
    "torch_func_tutorial": ("torch", torch_func_tutorial),
    "nngeometry_gram": ("nngeometry", nngeometry_gram),
    "nngeometry_jacobian": ("nngeometry", nngeometry_jacobian),
    "captum": ("captum", captum),
    "dattri": ("dattri", dattri),
}
# neural-tangents 0.6.5, the last release, does not import with JAX 0.10: looked for and reported, never measured.
UNMEASURED = {"neural_tangents": "neural_tangents"}


def available() -> tuple[dict[str, Gram], dict[str, str]]:
    """The peers that are installed, and for the others why they are left out."""
    modules = {name: module for name, (module, _) in PEERS.items()} | UNMEASURED
    missing = {name: reason for name, module in modules.items() if (reason := _missing(module))}
    left_out = missing | {name: "installed, but not measured here" for name in UNMEASURED if name not in missing}
    return {name: gram for name, (_, gram) in PEERS.items() if name not in missing}, left_out


def _missing(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # a library too old for what it imports may fail in any way
        return f"not installed: {type(error).__name__}: {error}"
    return None


def version_of(name: str) -> str:
    """Version of the library behind a peer."""
    return version(PEERS[name][0])

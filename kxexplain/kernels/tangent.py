r"""The tangent kernel K_θ(x, x') = ⟨∇_θ f(x), ∇_θ f(x')⟩ of a model as it stands (Jacot et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kxexplain.errors import ArgumentError, DatasetError, KxError, ModelError
from kxexplain.gradients.factors import Factors, concatenate
from kxexplain.gradients.factors import take as rows_of
from kxexplain.gradients.ordinary import layout_of, output_gradients, trainable
from kxexplain.gradients.pile import Pile
from kxexplain.gradients.products import diagonal, gram, gram_trace, squared_norm
from kxexplain.gradients.traced import joint_trace
from kxexplain.gradients.uses import Layout
from kxexplain.kernels.appetite import appetite
from kxexplain.kernels.blocks import Buffer, Plan, Span, Target, buffer, spans
from kxexplain.kernels.budget import parse_bytes, progress_bar
from kxexplain.shapes import Inputs
from kxexplain.trajectory.batches import alike, call, copied, count, joined, leaves, outputs_2d, take
from kxexplain.trajectory.forward import private_copy

Outputs = Literal["trace", "full"] | int


class TangentKernel:
    """Computes tangent kernels of one model; a private copy is used, in evaluation mode.

    Args:
        model: any module with trainable parameters.
        inputs: some inputs (one is enough), to measure where the model keeps its examples and what they take.
        outputs: ``"trace"`` sums over outputs, ``"full"`` gives C × C blocks, a number takes one output.
        batch: examples differentiated at once; as many as suit the memory if ``None``.
        memory: bytes for intermediate values, as a number or like ``"500MB"``.

    Raises:
        ModelError: no trainable parameter.
        ArgumentError: an unknown value of ``outputs``, ``batch`` or ``memory``.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        outputs: Outputs = "trace",
        batch: int | None = None,
        memory: str | int = "1GB",
    ) -> None:
        if outputs not in ("trace", "full") and (isinstance(outputs, bool) or not isinstance(outputs, int)):
            raise ArgumentError(f'got outputs={outputs!r}; expected "trace", "full" or an output number')
        if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1):
            raise ArgumentError(f"got batch={batch!r}; expected a positive number of examples, or None")
        budget = parse_bytes(memory)
        if not isinstance(model, nn.Module):
            raise ModelError(f"got {type(model).__name__} as the model; expected a torch.nn.Module")
        self.model = private_copy(model).eval()
        require_accepted(self.model, inputs)
        if not trainable(self.model):
            raise ModelError("the model has no trainable parameters: its tangent kernel is empty")
        self.outputs = outputs
        self.layout: Layout = layout_of(self.model, inputs, trainable(self.model))
        one, full = take(inputs, slice(0, 1)), outputs == "full"
        needs = appetite(self.model, one, self.layout, self._select(), full=full)
        self.like, self.columns = needs.like, needs.columns
        self.plan = Plan.within(budget, needs, batch)

    def gradients(self, inputs: Inputs) -> Factors:
        """Per-example output gradients of a batch, in factored form."""
        rows = count(inputs)
        parts = spans(0, rows, self.plan.batch)
        made = self._differentiated(inputs, parts[0])
        if len(parts) == 1:
            return made
        pile = Pile(made, rows)
        pile.add(made, parts[0].stop, 1.0)
        others: list[Factors] = []
        for part in parts[1:]:
            made = self._differentiated(inputs, part)
            if not others and pile.fits(made, part.stop - part.start):
                pile.add(made, part.stop - part.start, 1.0)
            else:
                others.append(made)
        return concatenate([pile.gathered(), *others])

    def _differentiated(self, inputs: Inputs, rows: Span) -> Factors:
        return output_gradients(self.model, take(inputs, rows), self.layout, self._select())[1]

    def _select(self) -> Any:
        number = self.outputs
        if not isinstance(number, int):
            return None

        def column(values: Tensor) -> Tensor:
            if not -values.shape[1] <= number < values.shape[1]:
                raise ArgumentError(f"output {number} was asked for, but the model has {values.shape[1]}")
            return values[:, [number]]

        return column

    def between(self, left: Factors, right: Factors) -> Tensor:
        """The kernel between two sets of gradients."""
        if self.outputs == "full":
            return gram(left, right).transpose(1, 2)
        return gram_trace(left, right)

    def blocks(self, x1: Inputs, x2: Inputs | None, tick: Callable[[], None]) -> Iterator[tuple[Span, Span, Tensor]]:
        """The matrix' blocks and their places; for ``x2=None`` those on and below the diagonal only."""
        if x2 is not None and self._meet_at_once(x1, x2):
            n, m, both = count(x1), count(x2), joined(x1, x2)
            yield slice(0, n), slice(0, m), joint_trace(self.model, both, n, self.layout, self._select())
            tick()
            return
        right = x1 if x2 is None else x2
        held: tuple[Span, Factors] | None = None
        for columns, rows in self.steps(x1, x2):
            if held is None or held[0] != columns:
                held = None  # the last panel's memory is free before the next one's is taken
                held = columns, self.gradients(take(right, columns))
            left = held[1] if rows is None else self.gradients(take(x1, rows))
            rows = rows or columns
            for i, j in self.plan.tiles(rows, columns, lower=left is held[1]):
                yield i, j, self.between(_part(left, rows, i), _part(held[1], columns, j))
            tick()

    def steps(self, x1: Inputs, x2: Inputs | None) -> list[tuple[Span, Span | None]]:
        """What :meth:`blocks` goes through, with a tick after each."""
        n, m = count(x1), count(x1 if x2 is None else x2)
        if x2 is not None and self._meet_at_once(x1, x2):
            return [(slice(0, m), slice(0, n))]
        return self.plan.steps(n, m, symmetric=x2 is None)

    def _meet_at_once(self, x1: Inputs, x2: Inputs) -> bool:
        """Whether both sides are differentiated in one pass."""
        return self.plan.at_once(count(x1), count(x2)) and alike(x1, x2)

    def diagonal(self, inputs: Inputs) -> Tensor:
        """K(x, x), [n] or for ``"full"`` [n, C, C], without the matrix."""
        parts = []
        for rows in spans(0, count(inputs), self.plan.batch):
            factors = self._differentiated(inputs, rows)
            parts.append(diagonal(factors) if self.outputs == "full" else squared_norm(factors).sum(1))
        return torch.cat(parts)


def _part(factors: Factors, held: Span, wanted: Span) -> Factors:
    """The gradients of some of the examples held."""
    if held == wanted:
        return factors
    return rows_of(factors, slice(wanted.start - held.start, wanted.stop - held.start))


def require_accepted(model: nn.Module, inputs: Inputs) -> None:
    """``DatasetError`` if the model cannot take one of the inputs."""
    try:
        with torch.no_grad():
            outputs_2d(call(model, copied(take(inputs, slice(0, 1)))))
    except (KxError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        got = ", ".join(f"{leaf.dtype} {tuple(leaf.shape)}" for _, leaf in leaves(inputs))
        raise DatasetError(
            f"the model cannot take the inputs ({type(error).__name__}: {error}); got {got}, expected a batch of what "
            "it was built for, examples along the first axis (a single one is x[None])"
        ) from error


def require_inputs(x1: Inputs, x2: Inputs | None, *, diag: bool) -> None:
    """Check what both kernels are given.

    Raises:
        DatasetError: a batch is empty, or not finite.
        ArgumentError: a diagonal between two batches.
    """
    for batch in (x1, x2):
        if batch is not None and count(batch) == 0:
            raise DatasetError("there are no inputs; give at least one")
        for path, leaf in [] if batch is None else leaves(batch):
            if leaf.is_floating_point() and not _is_finite(leaf):
                raise DatasetError(f"the inputs{path} hold NaN or infinite values; clean them first")
    if diag and x2 is not None:
        raise ArgumentError("got diag=True and x2; the diagonal is K(x, x) for the inputs x1 alone: leave x2 out")


def _is_finite(values: Tensor) -> bool:
    """Whether all values are; their sum tells it soonest, unless it overflows."""
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())


def integrate(
    kernel: TangentKernel,
    states: Iterator[float],
    x1: Inputs,
    x2: Inputs | None,
    *,
    diag: bool,
    out: Buffer | None,
    progress: tuple[bool, int],
) -> Tensor:
    """Σ_s w_s K_{θ_s}, block by block; drawing a weight from ``states`` loads its state into the kernel's model.

    ``DatasetError`` if the model cannot take ``x2``, before anything is written.
    """
    if x2 is not None:
        require_accepted(kernel.model, x2)
    n = count(x1)
    shape = (n,) if diag else (n, n if x2 is None else count(x2))
    target = Target(buffer(out, (*shape, *kernel.like.shape), kernel.like), symmetric=x2 is None and not diag)
    shown, passes = progress
    steps = passes * (1 if diag else len(kernel.steps(x1, x2)))
    with torch.no_grad(), progress_bar(shown, steps, "kernel") as tick:
        for number, weight in enumerate(states):
            if diag:
                found = kernel.diagonal(x1).mul_(weight).to(target.values.device)
                target.values.copy_(found if number == 0 else target.values + found)
                tick()
                continue
            for rows, columns, block in kernel.blocks(x1, x2, tick):
                target.put(rows, columns, block if weight == 1 else block.mul_(weight), add=number > 0)
    return target.values


def tangent_kernel(
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
    r"""Gram matrix of the tangent kernel, K(x, x') = ⟨∇_θ f(x), ∇_θ f(x')⟩.

    Args:
        model: any ``nn.Module``; not changed. Evaluated in evaluation mode.
        x1: n inputs, a tensor, tuple or dict of tensors.
        x2: m inputs; ``x1`` itself if ``None``: half the work, and an exactly symmetric matrix.
        outputs: ``"trace"`` for Σ_c ⟨∇f_c(x), ∇f_c(x')⟩, ``"full"`` for all pairs of outputs, or one output's number.
        diag: only K(x, x), without the matrix.
        out: where the result is written, block by block: a tensor or NumPy array of its shape and dtype. For a matrix
            larger than memory, a ``numpy.memmap``.
        batch: examples differentiated at once; as many as suit the memory if ``None``. Changes no result.
        memory: bytes for intermediate values, the result not among them, as a number or like ``"500MB"``.
        progress: show a bar over the blocks.

    Returns:
        [n, m], or for ``"full"`` [n, m, C, C]; with ``diag`` [n] or [n, C, C]. If ``out`` was given, a tensor that
        shares its memory.

    Raises:
        ModelError: no trainable parameter.
        DatasetError: no inputs, values that are not finite, or inputs that the model cannot take.
        ArgumentError: an unknown value of ``outputs``, ``batch`` or ``memory``, a diagonal between two batches, or a
            buffer of another shape or dtype.

    Source: Jacot, Gabriel & Hongler 2018, arXiv 1806.07572.

    >>> import numpy, tempfile, torch
    >>> model, x = torch.nn.Linear(2, 1), torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    >>> tangent_kernel(model, x)  # x·x' + 1
    tensor([[ 6.,  4.],
            [ 4., 10.]])
    >>> tangent_kernel(model, x, diag=True)
    tensor([ 6., 10.])
    >>> file = numpy.memmap(tempfile.mkdtemp() + "/gram", dtype="float32", mode="w+", shape=(2, 2))
    >>> _ = tangent_kernel(model, x, out=file)
    >>> file.tolist()
    [[6.0, 4.0], [4.0, 10.0]]
    """
    require_inputs(x1, x2, diag=diag)
    with torch.random.fork_rng(devices=[]):
        kernel = TangentKernel(model, x1, outputs, batch, memory)
        return integrate(kernel, iter([1.0]), x1, x2, diag=diag, out=out, progress=(progress, 1))

r"""Per-example gradients from one backward pass: every use of a parameter is seen and its factors kept.

While active, :class:`Capture` sees each torch call. Where a parameter meets data (a *contact*: linear,
convolution, embedding, norm, elementwise with broadcasting) it keeps what the parameter was applied to and
the graph edge of what came out; the gradient at that edge then gives every example's own parameter gradient.
Which axis holds the examples is not guessed from sizes: :class:`Layout` is measured by running two batches of
different length. A parameter used in any other way is *loose*, and its per-example gradients are taken by one
backward pass per example. So every model is served, and the usual ones at the cost of one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from kxexplain.gradients.derived import Derivations
from kxexplain.gradients.interception import name_of, transparent
from kxexplain.gradients.sources import Source
from kxexplain.gradients.two_point import METADATA

Place = tuple[int, ...]
"""Which call of the forward code, and which torch call within it (and which of its outputs, of several): the same for
every batch."""


FUSED = frozenset(f"{cell}{kind}" for cell in ("lstm", "gru", "rnn_tanh", "rnn_relu") for kind in ("", "_cell")) | {
    "embedding_bag"
}
"""Operations with several outputs (some have one, in some calls) whose examples have to be found in each."""

OVERWRITING = frozenset({"mul_", "div_"})
"""Operations that overwrite what a parameter meets, which its gradient needs."""


@dataclass(frozen=True)
class Axis:
    """Where an output keeps its examples: an axis, ``inner`` entries per example, examples outermost or not."""

    axis: int
    inner: int = 1
    outermost: bool = True


@dataclass(frozen=True)
class Layout:
    """The example axis of every torch call's output in a forward pass, by the call's place in it.

    Attributes:
        axes: where outputs that grow with the batch keep their examples.
        fixed: shapes of outputs that do not.
        lengths: how many calls each composite function made, so that one of no interest can be run whole.
        loose: parameters whose uses were seen to be missed; their gradients are taken one by one.
        blind: the forward code does not bear being watched: every parameter is loose.
    """

    axes: Mapping[Place, Axis]
    fixed: Mapping[Place, torch.Size]
    lengths: Mapping[tuple[Place, Any], int] = field(default_factory=dict)
    loose: frozenset[str] = frozenset()
    blind: bool = False

    def axis(self, call: Place, shape: torch.Size, rows: int) -> Axis | None:
        """The measured axis, if the output's shape agrees with it."""
        found = self.axes.get(call)
        if found is None or found.axis >= len(shape) or shape[found.axis] != rows * found.inner:
            return None
        return found

    def is_fixed(self, call: Place, output: Any) -> bool:
        """Whether the call's output was seen not to depend on how many examples there are."""
        return isinstance(output, Tensor) and self.fixed.get(call) == output.shape


@dataclass(frozen=True)
class Use:
    """One contact: what to do with the gradient at ``edge`` is known to the contact's kind."""

    kind: str
    sources: Mapping[str, Source]
    edge: GradientEdge
    axis: Axis
    rows: int
    shape: torch.Size
    held: Mapping[str, Any] = field(default_factory=dict)


class Capture(TorchFunctionMode):
    """Sees the uses of the given parameters in the code run inside it.

    Args:
        parameters: name → tensor, the leaves whose per-example gradients are wanted; frozen ones have none.
        layout: where the examples are; ``None`` while that is being measured.
        rows: number of examples in the batch.
    """

    def __init__(self, parameters: Mapping[str, Tensor], layout: Layout | None, rows: int) -> None:
        super().__init__()
        self.sources = {id(t): Source(name, t, t.numel()) for name, t in parameters.items() if t.requires_grad}
        self.layout, self.rows = layout, rows
        self.uses: list[Use] = []
        self.loose = set() if layout is None else set(parameters if layout.blind else layout.loose)
        self.outputs: dict[Place, Any] = {}
        self.lengths: dict[tuple[Place, Any], int] = {}
        self.place: Place = (0, 0)
        self.derivations = Derivations(parameters)

    def around(self) -> AbstractContextManager[Any]:
        """Entered around the forward pass."""
        return nullcontext() if self.layout is not None and self.layout.blind else self

    def enter(self, call: int) -> None:
        """The forward code has come to its next call (told by a tracer that makes several calls of one)."""
        if call != self.place[0]:
            self.place = (call, 0)

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = name_of(func)
        if name in METADATA:
            return func(*args, **kwargs)
        place, body = self.place, transparent(func)
        sources = [] if self.layout is None else self._sources((*args, *kwargs.values()))
        if body is not None:
            length = None if self.layout is None or sources else self.layout.lengths.get((place, func))
            if length is not None:
                self.place = (place[0], place[1] + length)
                return func(*args, **kwargs)
            with self:
                output = body(*args, **kwargs)
            self.lengths[place, func] = self.place[1] - place[1]
            return output
        before = args
        if sources and name in OVERWRITING:
            before = (args[0].detach().clone(), *args[1:])
        output = func(*args, **kwargs)
        self.place = (place[0], place[1] + 1)
        several = name in FUSED and isinstance(output, tuple)
        if several and sources:  # a gradient at one output must not come by way of another
            output = tuple(t.view_as(t) for t in output)
        if self.layout is None:
            self.outputs |= {(*place, leaf): t for leaf, t in enumerate(output)} if several else {place: output}
        elif sources:
            self._meet(place, name, func, before, kwargs, output, sources)
        return output

    def _sources(self, values: Iterable[Any]) -> list[Source]:
        found = []
        for value in values:
            if isinstance(value, Tensor):
                source = self.sources.get(id(value))
                if source is not None:
                    found.append(source)
            elif isinstance(value, (tuple, list)):
                found += self._sources(value)
        return found

    def _meet(
        self,
        place: Place,
        name: str,
        func: Any,
        args: Any,
        kwargs: Any,
        output: Any,
        sources: Sequence[Source],
    ) -> None:
        """File a call that involves parameters: as a contact, a rearrangement, a value derived from them, or loose."""
        from kxexplain.gradients import contacts

        assert self.layout is not None
        tensors = [t for t in (output if isinstance(output, (tuple, list)) else [output]) if isinstance(t, Tensor)]
        if not any(t.requires_grad for t in tensors):
            return
        uses = self._uses(place, name, func, args, kwargs, output)
        if uses is not None:
            self.uses += uses
            return
        fixed = self.layout.is_fixed(place, output) or isinstance(output, (tuple, list))
        if fixed and name in contacts.REARRANGEMENTS and self._rearranged(func, args, kwargs, output, sources):
            return
        if fixed and isinstance(output, Tensor) and not name.endswith("_"):
            derived = self.derivations.derive(func, args, kwargs, output, self.sources)
            if derived is not None:
                self.sources[id(output)] = derived
                return
        self.loose.update(*(self.derivations.parameters(source.name) for source in sources))

    def _uses(self, place: Place, name: str, func: Any, args: Any, kwargs: Any, output: Any) -> list[Use] | None:
        """The call as a contact, one use for each of its outputs; ``None`` if it is none."""
        from kxexplain.gradients import registry

        assert self.layout is not None
        several = name in FUSED
        outputs = output if several and isinstance(output, tuple) else (output,)
        uses = []
        for leaf, value in enumerate(outputs):
            if several and not (isinstance(value, Tensor) and value.requires_grad):
                continue
            at = (*place, leaf) if len(outputs) > 1 else place
            axis = self.layout.axis(at, value.shape, self.rows) if isinstance(value, Tensor) else None
            if axis is None:
                return None
            made = registry.made(name, func, self.sources, args, kwargs, value, axis, leaf)
            if made is None:
                return None
            kind, used, held = made
            uses.append(Use(kind, used, get_gradient_edge(value), axis, self.rows, value.shape, held))
        return uses

    def _rearranged(self, func: Any, args: Any, kwargs: Any, output: Any, sources: Sequence[Source]) -> bool:
        """Follow slices, transposes, look-ups: the same call on element positions says which element went where."""
        (source, *others) = sources
        if others or source.tensor is not args[0]:
            return False
        moved = source.moved(func, args, kwargs)
        tensors = output if isinstance(output, (tuple, list)) else [output]
        for tensor, index in zip(tensors, moved if isinstance(moved, (tuple, list)) else [moved], strict=True):
            self.sources[id(tensor)] = Source(source.name, tensor, source.size, index.long())
        return True

    def edges(self) -> list[GradientEdge]:
        """The graph edges whose gradients :meth:`factors` needs, in order."""
        return [use.edge for use in self.uses]


Run = Callable[[Tensor, Capture], Tensor]
"""Runs the forward pass on the examples of these numbers inside the capture given; returns the outputs, [n, c]."""

ORDERS = ((1, 2, 0), (1, 0, 2))
"""Rearrangements of three examples; only what leaves every example in its place commutes with both."""


def measure(run: Run, parameters: Mapping[str, Tensor]) -> Layout:
    """Find the example axis of every call by running 2 and 3 examples.

    An axis is believed if its rows follow the examples when these are rearranged: code may sort its batch or turn it
    round. Where the code draws at random and no two runs agree, every output must depend on its own row. Where
    examples share an axis with something else (n·r rows after a reshape), the rows that stay as they are when a third
    example joins show the order; where examples influence each other (batch norm), their outputs' gradients do.
    """

    def outputs_of(order: Sequence[int]) -> dict[Place, Any]:
        capture = Capture(parameters, None, 3)
        with torch.no_grad():
            run(torch.tensor(order), capture)
        return capture.outputs

    two, three = Capture(parameters, None, 2), Capture(parameters, None, 3)
    with torch.enable_grad():
        outputs = run(torch.arange(2), two)
        with torch.no_grad():
            run(torch.arange(3), three)
    again, rearranged = outputs_of((0, 1, 2)), [(torch.tensor(order), outputs_of(order)) for order in ORDERS]
    axes: dict[Place, Axis] = {}
    fixed: dict[Place, torch.Size] = {}
    for place, a in two.outputs.items():
        b = three.outputs.get(place)
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            continue
        found = _axis(a, b, outputs)
        if found is not None and found.inner == 1:
            moved = [(order, run_outputs.get(place)) for order, run_outputs in rearranged]
            settled = _same(b, again.get(place))
            if not (all(_follows(b, c, order, found) for order, c in moved) if settled else _own(a, outputs, found)):
                continue
        if found is not None:
            axes[place] = found
        elif a.shape == b.shape:
            fixed[place] = a.shape
    return Layout(axes, fixed, {call: n for call, n in two.lengths.items() if three.lengths.get(call) == n})


def _axis(two: Tensor, three: Tensor, outputs: Tensor) -> Axis | None:
    if two.dim() != three.dim():
        return None
    grown = [d for d in range(two.dim()) if two.shape[d] != three.shape[d]]
    if len(grown) != 1:
        return None
    (axis,) = grown
    inner = three.shape[axis] - two.shape[axis]
    if two.shape[axis] != 2 * inner or three.shape[axis] != 3 * inner:
        return None
    if inner == 1:
        return Axis(axis)
    for fits in (_values_fit, _gradients_fit):
        orders = [outermost for outermost in (True, False) if fits(two, three, outputs, Axis(axis, inner, outermost))]
        if len(orders) == 1:
            return Axis(axis, inner, orders[0])
    return None


def _same(a: Tensor, b: Any) -> bool:
    """Whether two runs on the same examples agree."""
    return isinstance(b, Tensor) and a.shape == b.shape and _close(a, b)


def _follows(before: Tensor, after: Any, order: Tensor, at: Axis) -> bool:
    """Whether the rows followed the examples when these were rearranged."""
    if not isinstance(after, Tensor) or after.shape != before.shape:
        return False
    return _close(before.detach().index_select(at.axis, order.to(before.device)), after)


def _close(a: Tensor, b: Tensor) -> bool:
    a, b = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (a.detach(), b.detach()))
    a, b = (torch.nan_to_num(t.to(torch.float64)) for t in (a, b))
    return torch.allclose(a, b, rtol=1e-3, atol=1e-5 * float(a.abs().max()) if a.numel() else 0.0)


def _own(two: Tensor, outputs: Tensor, at: Axis) -> bool:
    """No output depends more on the other example's row than on its own."""
    if not two.requires_grad:
        return True
    for example in (0, 1):
        (gradient,) = torch.autograd.grad(outputs[example].sum(), two, retain_graph=True, allow_unused=True)
        if gradient is not None:
            own, other = (_split(gradient, at, 2)[row].norm() for row in (example, 1 - example))
            if float(own) < 0.5 * float(other):
                return False
    return True


def _split(value: Tensor, at: Axis, rows: int) -> Tensor:
    """The shared axis taken apart, [example, inner, rest]."""
    flat = value.detach().movedim(at.axis, 0).reshape(rows * at.inner, -1)
    if at.outermost:
        return flat.view(rows, at.inner, -1)
    return flat.view(at.inner, rows, -1).transpose(0, 1)


def _values_fit(two: Tensor, three: Tensor, outputs: Tensor, at: Axis) -> bool:
    """The first two examples' rows are the same whether or not a third is there."""
    return _close(_split(two, at, 2)[:2], _split(three, at, 3)[:2])


def _gradients_fit(two: Tensor, three: Tensor, outputs: Tensor, at: Axis) -> bool:
    """No example's output depends on the other's rows."""
    if not two.requires_grad:
        return False
    for example in (0, 1):
        (gradient,) = torch.autograd.grad(outputs[example].sum(), two, retain_graph=True, allow_unused=True)
        if gradient is None or bool(_split(gradient, at, 2)[1 - example].any()):
            return False
    return True

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
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from kxexplain.gradients import registry
from kxexplain.gradients.contacts import REARRANGEMENTS
from kxexplain.gradients.derived import Derivations
from kxexplain.gradients.interception import name_of, transparent
from kxexplain.gradients.sources import Source
from kxexplain.gradients.two_point import METADATA
from kxexplain.gradients.uses import Layout, Place, Use

FUSED = frozenset(f"{cell}{kind}" for cell in ("lstm", "gru", "rnn_tanh", "rnn_relu") for kind in ("", "_cell")) | {
    "embedding_bag"
}
"""Operations with several outputs (some have one, in some calls) whose examples have to be found in each."""

OVERWRITING = frozenset({"mul_", "div_"})
"""Operations that overwrite what a parameter meets, which its gradient needs."""


class Capture(TorchFunctionMode):
    """Sees the uses of the given parameters in the code run inside it.

    Args:
        parameters: name → tensor, the leaves whose per-example gradients are wanted; frozen ones have none.
        layout: where the examples are; ``None`` while that is being measured.
        rows: number of examples in the batch.
    """

    def __init__(self, parameters: Mapping[str, Tensor], layout: Layout | None, rows: int) -> None:
        super().__init__()
        self.parameters, self.layout = parameters, layout
        self.free: list[bool] = []
        self.sources: dict[int, Source] = {}
        self.begin(rows)

    def begin(self, rows: int) -> None:
        """Forget what was seen: another batch of so many examples comes."""
        layout, parameters = self.layout, self.parameters
        self.rows = rows
        self.uses: list[Use] = []
        self.loose = set() if layout is None else set(parameters if layout.blind else layout.loose)
        self.outputs: dict[Place, Any] = {}
        self.lengths: dict[tuple[Place, Any], int] = {}
        self.place: Place = (0, 0)
        self.derivations = Derivations(parameters)
        self._find_sources()

    def around(self) -> AbstractContextManager[Any]:
        """Entered around the forward pass."""
        self._find_sources()
        return nullcontext() if self.layout is not None and self.layout.blind else self

    def _find_sources(self) -> None:
        """The parameters that are free now: replay freezes and frees some."""
        free = [t.requires_grad for t in self.parameters.values()]
        if free != self.free or len(self.sources) != sum(free):  # others, or a forward pass has added to them
            self.free = free
            self.sources = {id(t): Source(name, t, t.numel()) for name, t in self.parameters.items() if t.requires_grad}

    def enter(self, call: int) -> None:
        """The forward code has come to its next call (told by a tracer that makes several calls of one)."""
        if call != self.place[0]:
            self.place = (call, 0)

    def shifted(self, value: Tensor, shift: Tensor) -> Tensor:
        """What an operation has just made (none of its inputs) plus a constant: no operation of the forward code.

        In place where no other tensor shares the memory: the graph stays. A value that parameters alone were made into
        is computed again later (:class:`Derivations`), and the constant with it.
        """
        if id(value) not in self.sources and value.grad_fn is not None and not value._is_view():
            with torch.no_grad():
                return value.add_(shift)
        with torch.enable_grad():
            output = value + shift
        if id(value) in self.sources:
            derived = self.derivations.derive(torch.add, (value, shift), {}, output, self.sources)
            assert derived is not None
            self.sources[id(output)] = derived
        return output

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
        assert self.layout is not None
        if not (output.requires_grad if isinstance(output, Tensor) else _any_free(output)):
            return
        uses = self._uses(place, name, func, args, kwargs, output)
        if uses is not None:
            self.uses += uses
            return
        fixed = self.layout.is_fixed(place, output) or isinstance(output, (tuple, list))
        if fixed and name in REARRANGEMENTS and self._rearranged(func, args, kwargs, output, sources):
            return
        if fixed and isinstance(output, Tensor) and not name.endswith("_"):
            derived = self.derivations.derive(func, args, kwargs, output, self.sources)
            if derived is not None:
                self.sources[id(output)] = derived
                return
        self.loose.update(*(self.derivations.parameters(source.name) for source in sources))

    def _uses(self, place: Place, name: str, func: Any, args: Any, kwargs: Any, output: Any) -> list[Use] | None:
        """The call as a contact, one use for each of its outputs; ``None`` if it is none."""
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
        for tensor, index in zip(_each(output), _each(moved), strict=True):
            self.sources[id(tensor)] = Source(source.name, tensor, source.size, index.long())
        return True

    def edges(self) -> list[GradientEdge]:
        """The graph edges whose gradients :meth:`factors` needs, in order."""
        return [use.edge for use in self.uses]


def _any_free(output: Any) -> bool:
    return any(isinstance(t, Tensor) and t.requires_grad for t in _each(output))


def _each(output: Any) -> Sequence[Any]:
    return output if isinstance(output, (tuple, list)) else (output,)

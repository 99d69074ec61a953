"""A tensor known at both ends of a parameter change, and the tracer that carries it through a model.

Every value v computed from the parameters is carried three times: ``start`` = v(θ), ``end`` = v(θ') and
``middle``, whose value is their mean and whose autograd graph holds, for each operation passed, the linear
map J of :mod:`kxexplain.gradients.rules` with J(u'−u) = v'−v. Backward through the middle therefore gives
the discrete gradient D with ⟨D, θ'−θ⟩ = f(θ')−f(θ), exactly and for steps of any size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kxexplain.gradients import nested
from kxexplain.gradients.interception import name_of, out_of_place, transparent


class Untraceable(RuntimeError):
    """The forward code left torch, or branched on a value that differs between the ends."""


@runtime_checkable
class Watch(Protocol):
    """Sees the operations on middle values."""

    def enter(self, call: int) -> None:
        """The forward code has come to this call."""

    def shifted(self, value: Tensor, shift: Tensor) -> Tensor:
        """What an operation has just made, with another value in the same graph."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *details: Any) -> None: ...


class Extent(Enum):
    """What a tensor's shape was measured to hold."""

    EXAMPLES = "one row per example, along the first axis"
    FIXED = "the same whatever the number of examples"
    OTHER = "examples along another axis, or not measured"


Place = tuple[int, int]
"""Which call of the forward code, and which operation within it."""


@dataclass
class Trace:
    """One pass over the forward code.

    Attributes:
        rows: number of examples in the batch; the first axis of what is taken per example.
        watch: entered around every operation on middle values (the capture of parameter uses).
        call: how many calls the forward code has made.
        extents: what the outputs of every operation hold; empty while that is being measured.
        shapes: the outputs' shapes met, by place and position in the output.
        place: the operation being carried through.
        inexact: some operation had no exact linear map (a comparison flipped with nothing to lay it on).
        mixed: an operation without a rule had no example axis, so its secant joined the examples.
        asked: there was an operation without a rule.
    """

    rows: int
    watch: Watch
    extents: Mapping[tuple[Place, int], Extent] = field(default_factory=dict)
    shapes: dict[tuple[Place, int], torch.Size] = field(default_factory=dict)
    call: int = 0
    place: Place = (0, 0)
    inexact: bool = False
    mixed: bool = False
    asked: bool = False

    def step(self) -> Place:
        """On to the next operation."""
        self.place = (self.call, self.place[1] + 1 if self.place[0] == self.call else 0)
        return self.place

    def met(self, place: Place, output: Any) -> None:
        """Note what an operation's outputs hold."""
        for leaf, value in enumerate(nested.leaves(output)):
            if isinstance(value, TwoPoint):
                self.shapes[place, leaf] = value.start.shape
                value.extent = self.extents.get((place, leaf), Extent.OTHER)
            elif isinstance(value, Tensor):
                self.shapes[place, leaf] = value.shape

    def per_example(self, place: Place, leaf: int, inputs: list[TwoPoint]) -> bool:
        """Whether an operation without a rule may be taken example by example; notes if it joins them."""
        self.asked = True
        extent, others = self.extents.get((place, leaf), Extent.OTHER), {u.extent for u in inputs}
        if extent is Extent.EXAMPLES and Extent.OTHER not in others:
            return True
        if not (extent is Extent.FIXED and others == {Extent.FIXED}) and self.rows > 1:
            self.mixed = True
        return False

    def watching(self) -> Watched:
        """Entered around every operation on middle values: they are part of the graph, and seen."""
        return Watched(self)


class Watched:
    """:meth:`Trace.watching`, written out: there are many in every pass."""

    __slots__ = ("grad", "trace")

    def __init__(self, trace: Trace) -> None:
        self.trace = trace

    def __enter__(self) -> None:
        self.trace.watch.enter(self.trace.call)
        self.trace.watch.__enter__()
        self.grad = torch.is_grad_enabled()
        torch.set_grad_enabled(True)

    def __exit__(self, *details: Any) -> None:
        torch.set_grad_enabled(self.grad)
        self.trace.watch.__exit__(*details)


class TwoPoint(Tensor):
    """A tensor at both ends of a parameter change; see the module's docstring."""

    start: Tensor
    end: Tensor
    middle: Tensor
    tracer: Trace
    extent: Extent

    @staticmethod
    def __new__(cls, start: Tensor, end: Tensor, middle: Tensor, trace: Trace) -> TwoPoint:
        """A tensor without storage of its own that stands for the three."""
        made: TwoPoint = torch.Tensor._make_wrapper_subclass(
            cls, start.shape, dtype=start.dtype, device=start.device, requires_grad=False
        )
        made.start, made.end, made.middle, made.tracer = start, end, middle, trace
        made.extent = Extent.OTHER
        return made

    def __init__(self, *_: Any) -> None:
        super().__init__()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return dispatch(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it as a disabled function
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise Untraceable(f"{func} reached a tensor that is known at two points")

    @staticmethod
    def beside(parts: Sequence[TwoPoint]) -> TwoPoint:
        """Tensors [n, c] side by side, as by ``torch.cat``; the mean of the ends stays the mean."""
        with parts[0].tracer.watching():
            middle = torch.cat([part.middle for part in parts], 1)
        start, end = (torch.cat([getattr(part, at) for part in parts], 1) for at in ("start", "end"))
        return TwoPoint(start, end, middle, parts[0].tracer)

    def column(self) -> TwoPoint:
        """A tensor [n] as [n, 1]."""
        with self.tracer.watching():
            middle = self.middle[:, None]
        return TwoPoint(self.start[:, None], self.end[:, None], middle, self.tracer)

    def become(self, other: TwoPoint) -> TwoPoint:
        """Take the other's values, as an in-place operation does."""
        self.start, self.end, self.middle = other.start, other.end, other.middle
        self.extent = other.extent
        return self


class Substitution(TorchFunctionMode):
    """While active, the given tensors (parameters, buffers) count as their two-point versions."""

    def __init__(self, pairs: dict[int, TwoPoint], trace: Trace) -> None:
        super().__init__()
        self.pairs, self.trace = pairs, trace

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if name_of(func) in METADATA:
            return func(*args, **(kwargs or {}))
        self.trace.call += 1
        swap = lambda value: self.pairs.get(id(value), value)  # noqa: E731
        args, kwargs = nested.change(args, swap), nested.change(kwargs, swap) if kwargs else {}
        if first(args, kwargs) is None:
            return func(*args, **kwargs)
        return dispatch(func, args, kwargs)


METADATA = frozenset(
    f"get:{name}"
    for name in (
        "shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_mps", "is_sparse", "is_nested", "names",
        "is_quantized", "is_leaf", "requires_grad", "itemsize", "nbytes", "is_meta", "is_mkldnn", "is_xpu",
    )
) | {"size", "dim", "numel", "element_size", "ndimension", "nelement", "is_floating_point", "is_complex", "stride",
     "is_contiguous", "get_device", "len", "is_tensor", "is_inference", "is_conj", "is_neg", "is_signed",
     "result_type", "is_same_size"}  # fmt: skip
"""Questions about a tensor whose answer is the same at both ends."""


def dispatch(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Carry one call through: by its rule if it has one, through its body if composite, else by secant."""
    name = name_of(func)
    if name in METADATA or name.startswith("set:"):
        return at("start", func, args, kwargs)
    if kwargs:
        args, kwargs = _leading(args, kwargs)
    trace = tracer(args, kwargs)
    place = trace.step()
    output = _carry(func, name, args, kwargs)
    trace.met(place, output)
    return output


def _carry(func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from kxexplain.gradients import rules, table  # they are written with the tensors of this module

    rule, body = table.RULES.get(name), transparent(func)
    if body is not None and (rule is None or func.__module__ != "torch._tensor"):
        return body(*args, **kwargs)
    if rule is not None:
        return rule(func, args, kwargs)
    original = out_of_place(name)
    if name.endswith("_") and not isinstance(args[0], TwoPoint):
        raise Untraceable("a two-point value is written into a plain tensor")
    if original is not None:
        return args[0].become(dispatch(original, args, kwargs))
    return rules.secant(func, args, kwargs)


def _leading(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Operands given by name, put where rules look for them."""
    for place, name in ((0, "input"), (1, "other"), (1, "exponent")):
        if name in kwargs and len(args) == place:
            args, kwargs = (*args, kwargs[name]), {k: v for k, v in kwargs.items() if k != name}
    return args, kwargs


def is_two_point(value: Any) -> bool:
    """Whether the value is carried at two points."""
    return isinstance(value, TwoPoint)


def two_points(args: Any) -> list[TwoPoint]:
    """The two-point tensors among (nested) arguments, in order."""
    return [leaf for leaf in nested.leaves(args) if isinstance(leaf, TwoPoint)]


def first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> TwoPoint | None:
    """The first of :func:`two_points`, mostly without looking at them all."""
    for value in args:
        if isinstance(value, TwoPoint):
            return value
        if isinstance(value, (tuple, list, dict)):
            break
    return next(iter(two_points((args, kwargs))), None)


def tracer(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
    """The pass that a call with two-point arguments belongs to."""
    found = first(args, kwargs)
    assert found is not None
    return found.tracer


def at(place: str, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The call evaluated at one place: ``"start"``, ``"end"`` or ``"middle"``."""
    read = _READ[place]
    return (
        func(*nested.change(args, read), **nested.change(kwargs, read)) if kwargs else func(*nested.change(args, read))
    )


_READ: dict[str, Callable[[Any], Any]] = {
    "start": lambda value: value.start if isinstance(value, TwoPoint) else value,
    "end": lambda value: value.end if isinstance(value, TwoPoint) else value,
    "middle": lambda value: value.middle if isinstance(value, TwoPoint) else value,
}


def both_ends(func: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The call evaluated at both ends, without a graph."""
    with torch.no_grad():
        return at("start", func, args, kwargs), at("end", func, args, kwargs)


def in_middle(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The call evaluated on the middle values, in their graph and seen by the trace's watch."""
    with tracer(args, kwargs).watching():
        return at("middle", func, args, kwargs)

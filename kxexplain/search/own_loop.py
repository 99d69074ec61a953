"""Features of a loop of one's own: its forward and backward passes are seen by hooks, which change nothing.

The forward pass runs inside a :class:`kxexplain.gradients.capture.Capture`; hooks on the graph note the gradients that
the loop's own backward pass brings to the uses of parameters. That these are the examples' shares is not believed but
checked, in every step: their sum must be the gradient that the optimiser is given, and a row of the batch the example
that the loop says it is. Where that fails the index is made by a replay, and a warning says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kxexplain.errors import ArgumentError, KxError
from kxexplain.gradients.factors import Factors, concatenate, signature
from kxexplain.gradients.ordinary import StepGradients
from kxexplain.search.recording import FeatureRecorder
from kxexplain.shapes import Inputs, Tensors
from kxexplain.trajectory import Trajectory, fetch
from kxexplain.trajectory.batches import leaves, take
from kxexplain.trajectory.clipping import Clipping
from kxexplain.trajectory.keep import Keep
from kxexplain.trajectory.objective import Objective
from kxexplain.trajectory.records import Manifest

AGREE = 10.0
"""Sums agree that differ by less than this many roots of the rounding unit, of the whole gradient's length."""

IDLE = 8
"""Forward passes that wait for a backward pass; an older one will have none, and its memory is given back."""


@dataclass(eq=False)
class Pass:
    """One forward pass, and what backward passes brought to it.

    Attributes:
        inputs: of the model.
        watch: has seen the uses of parameters.
        around: what the forward pass runs inside.
        gradients: at the uses, where a backward pass came by.
    """

    inputs: Inputs
    watch: StepGradients
    around: AbstractContextManager[Any]
    gradients: dict[int, Tensor] = field(default_factory=dict)

    def listen(self) -> None:
        """Note the gradients at the uses of parameters from now on.

        What hangs on the graph must not hold the graph: a hook knows the notes alone.
        """
        for number, edge in enumerate(self.watch.capture.edges()):
            edge.node.register_prehook(noting(self.gradients, number, edge.output_nr))

    def collect(self) -> None:
        """Turn the gradients into factors."""
        uses = [self.gradients.get(number) for number in range(len(self.watch.capture.uses))]
        pull = torch.zeros(self.watch.rows, 1)  # nobody asks how hard the losses pulled
        with torch.no_grad():
            self.watch.collect([*uses, pull])


def noting(notes: dict[int, Tensor], number: int, output: int) -> Callable[[Sequence[Tensor | None]], None]:
    """A hook that adds up the gradients at one output of a graph's node."""

    def note(gradients: Sequence[Tensor | None]) -> None:
        gradient = gradients[output]
        if gradient is not None:
            earlier = notes.get(number)
            notes[number] = gradient.detach() if earlier is None else earlier + gradient.detach()

    return note


class LoopFeatures:
    """Collects features beside a recorder (:class:`kxexplain.trajectory.beside.Beside`).

    Args:
        features: what they are added up in.

    Raises:
        ArgumentError: a run with a penalty on gradients, whose backward pass is not one of a sum over examples.
    """

    def __init__(self, features: FeatureRecorder) -> None:
        settings = features.manifest.settings
        if Objective.noted(settings).parameter_penalty:
            raise ArgumentError(
                f"features={features.dim}: a penalty on the gradient passes through the graph a second time; leave "
                "features out, and call GradientIndex.build afterwards"
            )
        self.features, self.model, self.clipping = features, features.model, Clipping.noted(settings)
        self.steady = not features.manifest.dataset.random
        self.passes: list[Pass] = []
        self.given: Tensors = {}
        self._inside: Pass | None = None

    @classmethod
    def of(
        cls, model: nn.Module, optimizer: torch.optim.Optimizer, manifest: Manifest, keep: Keep, dataset: Any, *,
        dim: int, segments: int | None,
    ) -> LoopFeatures:  # fmt: skip
        """For a run that is about to be recorded."""
        return cls(FeatureRecorder(model, optimizer, manifest, keep, dataset, dim, segments=segments))

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks are on the model and the optimiser inside the block."""

        # Plain functions: a copy of the model made meanwhile keeps them, and must not report here.
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if module is self.model and torch.is_grad_enabled() and not self.features.lost:
                self._before_forward(args, kwargs)

        def after(module: nn.Module, *_: Any) -> None:
            if module is self.model:
                self._after_forward()

        def step(*_: Any) -> None:
            if not self.features.lost:
                self.given = {n: p.grad for n, p in self.features.parameters.items() if p.grad is not None}
                self.features.before()

        handles = [
            self.model.register_forward_pre_hook(before, with_kwargs=True),
            self.model.register_forward_hook(after, always_call=True),
            self.features.optimizer.register_step_pre_hook(step),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._after_forward()
            self.passes.clear()
            self.given.clear()

    def logged(self, step: int, indices: list[int], rates: tuple[float, ...], factor: float) -> None:
        """Add the features of a logged step."""
        passes, self.passes = [one for one in self.passes if one.gradients], []
        if self.features.lost:
            return
        for one in passes:
            one.collect()
        pieces = [one.watch.factors for one in passes]
        sums = _added(pieces)
        trouble = self._examples(passes, indices, step) or self._sums(sums, factor)
        if not trouble and len({signature(piece) for piece in pieces}) > 1:
            trouble = "its forward passes are of different kinds"
        if trouble:
            self.features.lose(f"step {step}: {trouble}")
            return
        gradients = {
            n: g / factor if factor and self.clipping.value is None else sums[n].view_as(g)
            for n, g in self.given.items()
        }
        found = concatenate(pieces)
        self.features.take(step, torch.as_tensor(indices), found, gradients, rates=rates, factor=factor)

    def saved(self, step: int) -> None:
        """A segment ends."""
        if step:
            self.features.borders.append(step)

    def complete(self, trajectory: Trajectory) -> None:
        """Write the index."""
        self.features.complete(trajectory)

    def _before_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._after_forward()  # of a pass that Ctrl-C broke off
        inputs: Any = args[0] if len(args) == 1 else args
        try:
            if args and kwargs:
                raise ArgumentError("the model is called with positional and with keyword arguments")
            inputs = inputs if args else kwargs
            watch = self.features.watch(inputs)
        except KxError as error:
            self.features.lose(str(error))
            return
        layout = watch.layout
        if layout.blind or layout.loose:
            what = "the model" if layout.blind else ", ".join(sorted(layout.loose))
            self.features.lose(f"per-example gradients of {what} take passes of their own")
            return
        self._inside = Pass(inputs, watch, watch.forward(inputs))
        self._inside.around.__enter__()

    def _after_forward(self) -> None:
        inside, self._inside = self._inside, None
        if inside is None:
            return
        inside.around.__exit__(None, None, None)
        if inside.watch.capture.loose:
            names = ", ".join(sorted(inside.watch.capture.loose))
            self.features.lose(f"per-example gradients of {names} take passes of their own")
            return
        inside.listen()
        self.passes.append(inside)
        idle = [one for one in self.passes if not one.gradients]
        if len(idle) > IDLE:
            self.passes.remove(idle[0])

    def _examples(self, passes: list[Pass], indices: list[int], step: int) -> str:
        """What is wrong where the rows of the passes are not these examples.

        At the first step all are looked at, afterwards one in every step.
        """
        rows = sum(one.watch.rows for one in passes)
        if rows != len(indices):
            return f"the loop differentiated the model at {rows} rows, for {len(indices)} examples"
        if not self.steady:
            return ""  # the recorder has compared them with those it fetched
        first = 0
        for one in passes:
            places = range(one.watch.rows) if self.features.steps == 0 else [step % one.watch.rows]
            device = next(leaf for _, leaf in leaves(one.inputs)).device
            served, _ = fetch(self.features.dataset, [indices[first + at] for at in places], device)
            if not _same(served, take(one.inputs, torch.tensor(places, device=device))):
                return "the batch's rows are not the examples of these indices, in this order, as the dataset has them"
            first += one.watch.rows
        return ""

    def _sums(self, sums: Tensors, factor: float) -> str:
        """What is wrong where the shares do not add up to the gradient that the optimiser was given."""
        gap = size = eps = 0.0
        for name in sums.keys() | self.given.keys():
            parameter = self.features.parameters[name]
            made = self.clipping.clamped(sums[name] * factor) if name in sums else torch.zeros_like(parameter).flatten()
            wanted = self.given[name].to_dense().flatten() if name in self.given else torch.zeros_like(made)
            gap += float((made - wanted).square().sum())
            size += float(wanted.square().sum())
            eps = max(eps, torch.finfo(parameter.dtype).eps)
        if gap <= AGREE**2 * eps * size:
            return ""
        off = (gap / size) ** 0.5 if size else float("inf")
        return f"the examples' gradients do not add up to the one that the optimiser was given (off by {off:.0e} of it)"


def _added(pieces: Sequence[Factors]) -> Tensors:
    """The gradients summed over all examples, by parameter, flattened."""
    sums: Tensors = {}
    for factor in (factor for piece in pieces for factor in piece):
        for name, value in factor.total().items():
            sums[name] = sums[name] + value if name in sums else value
    return sums


def _same(served: Inputs, seen: Inputs) -> bool:
    """Whether two batches hold the same."""
    pairs = list(zip(leaves(served), leaves(seen), strict=False))
    return len(pairs) == len(list(leaves(served))) and all(
        a.shape == b.shape and torch.equal(a.to(b.dtype), b) for (_, a), (_, b) in pairs
    )

"""Gradient features collected while a run trains, so that its index needs no pass of its own."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kxexplain.attribution.rounding import cancelled, without
from kxexplain.attribution.stretches import Step, is_elementwise
from kxexplain.errors import ArgumentError
from kxexplain.gradients.factors import Factors, Outer
from kxexplain.gradients.ordinary import StepGradients, layout_of
from kxexplain.gradients.projection import WIDTH, Projection
from kxexplain.gradients.uses import Layout
from kxexplain.search import files
from kxexplain.search.building import Plan
from kxexplain.search.delayed import Delayed, lag
from kxexplain.search.index import GradientIndex
from kxexplain.search.updates import UpdateFeatures, projection_for
from kxexplain.shapes import Inputs, Tensors
from kxexplain.trajectory import Trajectory, count, rng
from kxexplain.trajectory.forward import private_copy
from kxexplain.trajectory.keep import Keep
from kxexplain.trajectory.objective import Objective
from kxexplain.trajectory.optimizers import RECURSIONS, STILL, Recursion
from kxexplain.trajectory.records import Manifest

INDEX = "index"
"""The index' folder in the trajectory's."""

NONE = torch.empty(0)


class FeatureRecorder:
    """Adds up what every step's examples put into the parameters, as training makes the step.

    Args:
        model: that trains.
        optimizer: that moves its parameters.
        manifest: of the run.
        keep: which states will be recorded: they are the segments' borders.
        dataset: the training examples.
        dim: numbers per example.
        segments: how many stretches between recorded states are expected; where there come to be more, the last block
            of coordinates takes them, where fewer, the last blocks stay empty. As many as there are blocks if ``None``.
        borders: where the segments begin, and the end of the last, where that is known beforehand.

    Raises:
        ArgumentError: an optimiser whose steps are not itemised, an input penalty, a budget of bytes (whose states are
            thinned out later), a number of segments below 1, or a dimension below 16.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        manifest: Manifest,
        keep: Keep,
        dataset: Any,
        dim: int,
        *,
        segments: int | None = None,
        borders: Sequence[int] = (0,),
    ) -> None:
        _check(manifest, keep, dim, segments)
        self.model, self.optimizer, self.manifest, self.dataset, self.dim = model, optimizer, manifest, dataset, dim
        names = {name for group in manifest.optimizer.groups for name in group.names}
        self.parameters: dict[str, nn.Parameter] = {n: p for n, p in model.named_parameters() if n in names}
        self.names = {id(p): n for n, p in self.parameters.items()}
        shapes = {n: tuple(p.shape) for n, p in self.parameters.items() if p.requires_grad}
        planned = segments or len(borders) - 1 or (max(1, dim // WIDTH) if isinstance(dim, int) else 1)
        self.projection = Projection(shapes, planned, dim)
        examples = manifest.dataset.count
        self.features = UpdateFeatures(self.projection, torch.arange(examples), examples)
        self.delayed = Delayed(list(self.parameters), lag(manifest.optimizer), self.features.add)
        self.borders = list(borders)
        """Where segments begin, so far as is known."""
        self.segment, self.steps = 0, 0
        self.lost = ""
        """Why the features are not complete, if they are not."""
        self._held: dict[str, dict[str, Any]] = {}
        self._layout: Layout | None = None

    def layout(self, inputs: Inputs) -> Layout:
        """Where the model keeps its examples; measured once."""
        if self._layout is None:
            copy = private_copy(self.model)
            own: Tensors = {n: p for n, p in copy.named_parameters() if n in self.parameters}
            with rng.fork(next(copy.parameters()).device):
                self._layout = layout_of(copy, inputs, own)
        return self._layout

    def watch(self, inputs: Inputs) -> StepGradients:
        """Looks on while a step is made."""
        return StepGradients(self.layout(inputs), dict(self.parameters), count(inputs), steady=False)

    def before(self) -> None:
        """The optimiser is about to step."""
        self._held = {name: dict(self.optimizer.state.get(p, {})) for name, p in self.parameters.items()}

    def take(
        self, step: int, indices: Tensor, factors: Factors, gradients: Tensors, *, rates: Sequence[float], factor: float
    ) -> None:
        """Add what a step's examples did, once the optimiser has stepped.

        ``factors`` are their shares of the ``gradients``, which the loop multiplied by ``factor``.
        """
        if self.lost:
            return
        while self.segment + 1 < len(self.borders) and step >= self.borders[self.segment + 1]:
            self.segment += 1
        recursions = self._recursions(gradients, rates)
        still = [n for n, r in recursions.items() if r is STILL and self._held[n]]
        if self.delayed.lag and still:
            self.lose(f"step {step}: {still[0]} stands still, and keeps its moment for longer than a step waits")
            return
        adaptive = [n for n, r in recursions.items() if is_elementwise((r.direct, r.intake, r.applied))]
        masks, _ = cancelled(factors, gradients, adaptive)
        kept = without(factors, masks)
        if self.delayed.lag:  # the loop may use its batch's memory again
            kept = [replace(f, a=f.a.clone()) if isinstance(f, Outer) else f for f in kept]
        done = Step(indices, kept, NONE, None, factor, recursions, {}, {}, {})
        if not self.delayed.fits(done):
            self.lose(
                f"{self.delayed.lag + 1} steps of {self.manifest.optimizer.title} have to be held, "
                f"{done.bytes / 1e6:.1f} MB each"
            )
            return
        self.delayed.put(self.segment, done)
        self.steps += 1

    def _recursions(self, gradients: Tensors, rates: Sequence[float]) -> dict[str, Recursion]:
        """What the optimiser has made of these gradients."""
        itemised, found = RECURSIONS[self.manifest.optimizer.name], dict.fromkeys(self.parameters, STILL)
        for group, rate in zip(self.manifest.optimizer.groups, rates, strict=True):
            for name in set(group.names) & gradients.keys():
                new = self.optimizer.state.get(self.parameters[name], {})
                found[name] = itemised.rule(group.options, rate, self._held[name], new)
        return found

    def lose(self, why: str) -> None:
        """Collect no longer; the index will be made by a replay."""
        self.lost = why
        self.delayed.waiting.clear()
        self.features.blocks.clear()

    def complete(self, trajectory: Trajectory, *, progress: bool = False) -> None:
        """Write the index of the finished run; what was not watched (before a run was resumed) is replayed.

        Raises:
            IndexFileError: the folder cannot be written, or holds something else.
            ReplayError: the log does not lead to the recorded states.
        """
        folder = trajectory.path / INDEX
        if files.is_index(folder):
            manifest = files.read_manifest(folder)
            if manifest["trajectory"] == files.identity(trajectory) and manifest["dim"] == self.dim:
                return
        if not len(trajectory):
            return
        plan = replace(Plan.checked(trajectory, self.model, self.dataset, dim=self.dim), projection=self.projection)
        watched = self.steps == len(trajectory) and self.borders == [state.step for state in trajectory.states]
        if self.lost:
            warnings.warn(
                f"features could not be collected while training ({self.lost}); the index is made by a replay of the "
                "run",
                UserWarning,
                stacklevel=3,
            )
        shapes = projection_for(trajectory, self.dim).shapes
        if self.lost or not watched or shapes != self.projection.shapes:
            GradientIndex.build(trajectory, self.model, self.dataset, self.dim, out=folder, progress=progress)
            return
        self.delayed.close()
        features = torch.zeros(self.features.count, self.dim)
        for block, values in self.features.taken().items():
            features[:, self.projection.block(block)] = values
        GradientIndex.of(plan, features).save(folder)


def borders_of(keep: Keep, steps: int, batches: int) -> list[int]:
    """Where the states of a run of so many steps will be recorded, ``batches`` of them an epoch.

    >>> borders_of(Keep("epoch"), 7, 3), borders_of(Keep("steps", 4), 7, 3)
    ([0, 3, 6, 7], [0, 4, 7])
    """
    inner = [s for s in range(1, steps) if keep.wants(s, epoch_ended=s % batches == 0)]
    return [0, *inner, steps]


def _check(manifest: Manifest, keep: Keep, dim: int, segments: int | None) -> None:
    afterwards = "leave features out, and call GradientIndex.build afterwards"
    if manifest.optimizer.name not in RECURSIONS:
        raise ArgumentError(
            f"features={dim}: steps of {manifest.optimizer.title} are not divided among the examples; an index can be "
            f"made of those of {', '.join(RECURSIONS)}"
        )
    if Objective.noted(manifest.settings).input_penalty:
        raise ArgumentError(f"features={dim}: an input penalty's gradients are found example by example; {afterwards}")
    if keep.kind == "budget":
        raise ArgumentError(
            f"features={dim}: with keep={manifest.keep!r} the recorded states are thinned out later; keep states every "
            f'"epoch" or every so many steps, or {afterwards}'
        )
    if segments is not None and (isinstance(segments, bool) or not isinstance(segments, int) or segments < 1):
        raise ArgumentError(f"got segments={segments!r}; expected how many states the run will record after the first")

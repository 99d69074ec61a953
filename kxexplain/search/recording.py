"""Gradient features collected while a run trains, so that its index needs no pass of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kxexplain.errors import ArgumentError
from kxexplain.gradients.factors import scale
from kxexplain.gradients.ordinary import StepGradients, layout_of
from kxexplain.gradients.projection import Projection
from kxexplain.gradients.uses import Layout
from kxexplain.search import files
from kxexplain.search.building import Plan
from kxexplain.search.index import GradientIndex
from kxexplain.search.updates import UpdateFeatures, described
from kxexplain.shapes import Inputs, Tensors
from kxexplain.trajectory import StepRecord, Trajectory, count, rng, split
from kxexplain.trajectory.forward import private_copy
from kxexplain.trajectory.keep import Keep
from kxexplain.trajectory.objective import Objective
from kxexplain.trajectory.records import Manifest

INDEX = "index"
"""The index' folder in the trajectory's."""


class FeatureRecorder:
    """Adds up what every step's examples put into the parameters, as training makes the step.

    Args:
        model: that trains.
        manifest: of the run; it must train by SGD without momentum, where a step is its own examples' updates.
        keep: which states will be recorded: they are the segments' borders.
        dataset: the training examples.
        dim: numbers per example.
        batches: steps per epoch.

    Raises:
        ArgumentError: another optimiser, an input penalty, a budget of bytes (whose segments nobody knows beforehand),
            or a dimension below 16.
    """

    def __init__(
        self, model: nn.Module, manifest: Manifest, keep: Keep, dataset: Any, dim: int, batches: int
    ) -> None:  # fmt: skip
        groups = manifest.optimizer.groups
        if split(manifest.optimizer, _record(0, torch.zeros(1), [1.0] * len(groups), 1.0)) is None:
            raise ArgumentError(
                f"features={dim}: steps of {described(manifest.optimizer)} go on moving the parameters later, so "
                "features cannot be collected while training; leave it out, and call GradientIndex.build afterwards"
            )
        if Objective.noted(manifest.settings).input_penalty:
            raise ArgumentError(
                f"features={dim}: an input penalty's gradients are found example by example; leave features out, and "
                "call GradientIndex.build afterwards"
            )
        if keep.kind == "budget":
            raise ArgumentError(
                f"features={dim}: with keep={manifest.keep!r} the recorded states are thinned out later; keep states "
                'every "epoch" or every so many steps, or call GradientIndex.build afterwards'
            )
        self.model, self.manifest, self.dataset, self.dim = model, manifest, dataset, dim
        total = manifest.settings["epochs"] * batches
        self.borders = [s for s in range(1, total) if keep.wants(s, epoch_ended=s % batches == 0)]
        self.borders = [0, *self.borders, total]
        names = {name for group in groups for name in group.names}
        self.parameters: Tensors = {n: p for n, p in model.named_parameters() if n in names}
        shapes = {n: tuple(p.shape) for n, p in self.parameters.items() if p.requires_grad}
        self.projection = Projection(shapes, len(self.borders) - 1, dim)
        examples = manifest.dataset.count
        self.features = UpdateFeatures(self.projection, torch.arange(examples), examples)
        self.segment, self.steps = 0, 0
        self._layout: Layout | None = None

    def watch(self, inputs: Inputs) -> StepGradients:
        """Looks on while a step is made."""
        if self._layout is None:
            copy = private_copy(self.model)
            own: Tensors = {n: p for n, p in copy.named_parameters() if n in self.parameters}
            with rng.fork(next(copy.parameters()).device):
                self._layout = layout_of(copy, inputs, own)
        return StepGradients(self._layout, self.parameters, count(inputs), steady=not self.manifest.dataset.random)

    def take(self, watch: StepGradients, step: int, indices: Tensor, rates: Sequence[float], clip: float) -> None:
        """Add the updates of a step that was watched."""
        while step >= self.borders[self.segment + 1]:
            self.segment += 1
        parts = split(self.manifest.optimizer, _record(step, indices, rates, clip))
        assert parts is not None
        with torch.no_grad():
            self.features.add(self.segment, indices, scale(watch.factors, parts.gradient))
        self.steps += 1

    def complete(self, path: Path, loss: Any, own: Any) -> None:
        """Write the index of the finished run; what was not watched (before a run was resumed) is replayed.

        Raises:
            IndexFileError: the folder cannot be written, or holds something else.
            ReplayError: the log does not lead to the recorded states.
        """
        trajectory, folder = Trajectory.open(path, loss if callable(loss) else None, own), path / INDEX
        if files.is_index(folder):
            manifest = files.read_manifest(folder)
            if manifest["trajectory"] == files.identity(trajectory) and manifest["dim"] == self.dim:
                return
        plan = Plan.checked(trajectory, self.model, self.dataset, dim=self.dim)
        watched = self.steps == len(trajectory) and self.borders == [state.step for state in trajectory.states]
        if not (watched and plan.projection.shapes == self.projection.shapes):
            GradientIndex.build(trajectory, self.model, self.dataset, self.dim, out=folder)
            return
        features = torch.zeros(self.features.count, self.dim)
        for block, values in self.features.taken().items():
            features[:, self.projection.block(block)] = values
        GradientIndex.of(plan, features).save(folder)


def _record(step: int, indices: Tensor, rates: Sequence[float], clip: float) -> StepRecord:
    return StepRecord(step, 0, tuple(rates), indices.numpy(), loss=0.0, gradient_norm=0.0, clip=clip)

"""Trying a run before it begins, so that one that cannot begin costs nothing, above all no older run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kxexplain.errors import ArgumentError, DatasetError, KxError, ModelError, TrainingError
from kxexplain.shapes import Inputs
from kxexplain.trajectory import rng
from kxexplain.trajectory.batches import all_targets, call, fetch, leaves
from kxexplain.trajectory.clipping import Clipping
from kxexplain.trajectory.forward import assign, descend, private_copy, reduced
from kxexplain.trajectory.losses import OWN, LossFunction, check_losses
from kxexplain.trajectory.objective import Objective, input_penalty
from kxexplain.trajectory.observe import check_precision, gradient_norm
from kxexplain.trajectory.records import Manifest
from kxexplain.trajectory.signature import MakeOptimizer, build_optimizer

T = TypeVar("T")

CLASSIFYING = ("cross_entropy", "hinge")
"""The losses whose targets are class numbers."""

IGNORED = -100
"""The class number that torch's cross-entropy passes over."""


def rehearse(
    model: nn.Module,
    manifest: Manifest,
    dataset: Any,
    batches: Iterable[Tensor],
    loss: LossFunction,
    own: MakeOptimizer | None = None,
) -> None:
    """Compute on each of ``batches``, and step on the first, with a private copy of the model.

    ``ModelError``, ``DatasetError`` or ``ArgumentError`` says what fails there, ``TrainingError`` that the first loss
    or gradient is not finite. The caller's model, optimiser and random generators are left as they are.
    """
    device = next(model.parameters()).device
    check_precision(device)
    with rng.fork(device):
        private = private_copy(model)
        optimizer = build_optimizer(manifest.optimizer, dict(private.named_parameters()), own)
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        first: list[Tensor | None] = []
        objective = Objective.noted(manifest.settings)
        for indices in batches:
            inputs, targets = fetch(dataset, indices, device)
            inputs = objective.tracked(inputs)
            outputs, losses = _computed(private, manifest.loss, loss, (inputs, targets), indices)
            if objective.input_penalty:
                losses = losses + objective.input_penalty * _differentiated(lambda: input_penalty(outputs, inputs))  # noqa: B023 - called at once
            total = reduced(losses, manifest.reduction)
            found = _differentiated(lambda: descend(total, trained, objective).found)  # noqa: B023 - called at once
            if not first:
                _check_finite("loss", total.item())
                _check_finite("gradient", gradient_norm([g for g in found if g is not None]))
                _check_all_classes(manifest.loss, outputs, dataset)
                first = found
        _clip(Clipping.noted(manifest.settings), first, trained)
        try:
            optimizer.step()
        except Exception as error:
            raise ArgumentError(
                f"the optimizer {manifest.optimizer.title} fails on the first step: {_words(error)}; use another one"
            ) from error


def evaluate(model: nn.Module, name: str, loss: LossFunction, dataset: Any, examples: int) -> None:
    """Compute the losses of the first examples, and look at every example's class.

    ``ModelError``, ``DatasetError`` or ``ArgumentError`` says what fails there.
    """
    indices, device = torch.arange(examples), next(model.parameters()).device
    with rng.fork(device), torch.no_grad():
        outputs, _ = _computed(model, name, loss, fetch(dataset, indices, device), indices)
    _check_all_classes(name, outputs, dataset)


def _computed(
    model: nn.Module, name: str, loss: LossFunction, batch: tuple[Inputs, Tensor], indices: Tensor
) -> tuple[Tensor, Tensor]:
    """A batch's outputs and losses, the targets looked at in between."""
    inputs, targets = batch
    outputs = _outputs(model, inputs)
    _check_classes(name, outputs, targets, indices)
    return outputs, _losses(name, loss, outputs, targets)


def _outputs(model: nn.Module, inputs: Inputs) -> Tensor:
    try:
        return call(model, inputs)
    except KxError:
        raise
    except Exception as error:
        shapes = ", ".join(f"{tuple(leaf.shape)} of {leaf.dtype}" for _, leaf in leaves(inputs))
        raise ModelError(
            f"the model fails on a batch of the dataset, inputs {shapes}: {_words(error)}; "
            "give it inputs of the shape and type it takes"
        ) from error


def _losses(name: str, loss: LossFunction, outputs: Tensor, targets: Tensor) -> Tensor:
    try:
        losses = loss(outputs, targets)
    except KxError:
        raise
    except Exception as error:
        words = (
            f"fails on outputs of shape {tuple(outputs.shape)} and targets of shape {tuple(targets.shape)}, "
            f"{targets.dtype}: {_words(error)}"
        )
        if name.startswith(OWN):
            raise ArgumentError(f"the loss function {words}; it takes (outputs, targets) of a batch") from error
        raise DatasetError(f"the loss {name!r} {words}; give targets that fit it, or another loss") from error
    check_losses(losses, targets.shape[0])
    return losses


def _differentiated(compute: Callable[[], T]) -> T:
    try:
        return compute()
    except KxError:
        raise
    except Exception as error:
        raise ModelError(
            f"the loss cannot be differentiated: {_words(error)}; model and loss must consist of operations "
            "that torch can differentiate"
        ) from error


def _clip(clipping: Clipping, found: list[Tensor | None], parameters: list[nn.Parameter]) -> None:
    try:
        assign(parameters, clipping.applied(found, clipping.factor(found)))
    except Exception as error:  # torch's own reasons, such as sparse gradients
        message = str(error).splitlines()[0]
        raise ArgumentError(
            f"these gradients cannot be clipped: {type(error).__name__}: {message}; leave out clip_norm and clip_value"
        ) from error


def _check_classes(loss: str, outputs: Tensor, targets: Tensor, indices: Tensor) -> None:
    """``DatasetError`` naming the first of ``indices`` whose target is no class of the model."""
    classes = outputs.shape[1] if outputs.dim() > 1 else 1
    if loss not in CLASSIFYING or classes < 2 or (loss == "cross_entropy" and targets.is_floating_point()):
        return
    numbers = targets.long()
    wrong = (numbers < 0) | (numbers >= classes)
    if loss == "cross_entropy":
        wrong &= numbers != IGNORED
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        raise DatasetError(
            f"example {int(indices[place[0]])} is of class {targets[place].item()}, but the model's {classes} outputs "
            f"stand for the classes 0 to {classes - 1}; renumber the targets, or give the model more outputs"
        )


def _check_all_classes(loss: str, outputs: Tensor, dataset: Any) -> None:
    everything = all_targets(dataset)
    if everything is not None:
        _check_classes(loss, outputs, everything, torch.arange(len(everything)))


def _check_finite(what: str, value: float) -> None:
    if not math.isfinite(value):
        raise TrainingError(
            f"the {what} at step 0 is {value}; training did not begin, and nothing was written. "
            "Check the data and the initial weights"
        )


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"

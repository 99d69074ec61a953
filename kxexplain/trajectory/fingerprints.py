"""Telling two datasets apart, and saying how they differ."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from kxexplain.errors import DatasetError
from kxexplain.shapes import Inputs
from kxexplain.trajectory import rng
from kxexplain.trajectory.batches import fetch, leaves, size

CHUNK_BYTES = 1 << 20
"""Bytes of examples held at once, so few that they stay in the cache; no result depends on it."""

SEED = 0
"""Of the state of torch's generator that examples are asked for from."""

PROBES = 4
"""How often a few examples are asked for: a coin may fall the same way twice."""


@dataclass(frozen=True)
class Fingerprint:
    """What a dataset contains: its length, a hash in order, and one that ignores the order.

    ``random`` says that serving examples draws from torch's global generator (augmentation); the hashes are then of
    what each example is served as from one and the same state of that generator.
    """

    count: int
    ordered: str
    unordered: str
    random: bool = False

    def difference(self, other: Fingerprint) -> str | None:
        """In words, how ``other`` differs from this one; ``None`` if it does not."""
        if self == other:
            return None
        if self.count != other.count:
            return f"{other.count} examples instead of {self.count}"
        if self.random != other.random:
            alike, drawn = "always served alike", "drawn at random (augmented)"
            now, before = (drawn, alike) if other.random else (alike, drawn)
            return f"as many examples, but {now} instead of {before}"
        if self.unordered == other.unordered:
            return "the same examples in another order"
        return "as many examples, but with other contents"


def fingerprint(dataset: Any) -> Fingerprint:
    """Hash every example of ``dataset``; a few are fetched several times first to see that they stay equal.

    The result depends on the examples alone (values, dtypes, shapes), not on the class that serves
    them. A dataset may draw from torch's global generator: it is asked from a fixed state of it, which is then as
    before. ``DatasetError`` if the dataset is empty, has no length, serves anything but
    (input, target), or serves something else the second time (random by other means).

    >>> from torch.utils.data import Subset, TensorDataset
    >>> data = TensorDataset(torch.eye(3), torch.arange(3))
    >>> fingerprint(data).difference(fingerprint(Subset(data, [2, 0, 1])))
    'the same examples in another order'
    """
    total = size(dataset)
    if type(dataset) is TensorDataset and len(dataset.tensors) == 2:  # it serves what it holds
        inputs, targets = dataset.tensors
        with _Digest() as digest:
            for rows in _chunks(total, (inputs, targets)):
                digest.update((inputs[rows.start : rows.stop], targets[rows.start : rows.stop]))
            return digest.result()
    with rng.fork(torch.device("cpu")), _Digest() as digest:
        _check_served_alike(dataset, total)
        random = False
        for rows in _chunks(total, _served(dataset, [0])[0]):
            if not random:
                batch, random = _served(dataset, rows)
            digest.update(fetch(_EachAlone(dataset), rows) if random else batch)
        return replace(digest.result(), random=random)


def _chunks(total: int, like: tuple[Inputs, Tensor]) -> Iterator[range]:
    """All rows, so many at once as fit; ``like`` are some."""
    row = sum(leaf.nbytes // len(leaf) for _, leaf in leaves(like))
    step = max(1, CHUNK_BYTES // max(1, row))
    for start in range(0, total, step):
        yield range(start, min(start + step, total))


def _served(dataset: Any, rows: Sequence[int]) -> tuple[tuple[Inputs, Tensor], bool]:
    """Examples as served from a fixed state of the generator, and whether they drew from it."""
    generator = torch.default_generator.manual_seed(SEED)
    before = generator.get_state()
    return fetch(dataset, rows), not torch.equal(generator.get_state(), before)


class _EachAlone:
    """Serves each example from the fixed state, so that what it draws does not depend on those before it."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Any:
        torch.default_generator.manual_seed(SEED)
        return self.dataset[index]


def _check_served_alike(dataset: Any, total: int) -> None:
    """``DatasetError`` if a few examples do not stay the same, though the generator begins in the same state."""
    probe = sorted({0, 1 % total, total // 2, total - 1})
    seen = set()
    for _ in range(PROBES):
        with _Digest() as digest:
            digest.update(_served(dataset, probe)[0])
            seen.add(digest.result())
    if len(seen) > 1:
        raise DatasetError(
            "the dataset served different values for the same index when asked again; random augmentation can be "
            "replayed only if it draws from torch's global generator (torch.rand and its like; not numpy, Python's "
            "random, another device, or a generator of its own): draw from that, or apply it once, beforehand"
        )


class _Digest:
    """Both hashes of a dataset, from chunks of any size.

    In order: one SHA-256 per tensor of an example, each over that tensor's rows. Regardless of
    order: the sum of a number per row, Σ_j m_j·w_j over its folded 64-bit words w_j, then mixed,
    modulo 2^64. Only the former says that two datasets are equal; the latter words a message. The former is taken in
    a thread of its own, since each of both takes as long as reading the rows.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "kxexplain-fingerprint")
        self._hashing: Future[None] | None = None
        self.rows = 0
        self.layout: list[str] | None = None
        self.streams: list[Any] = []
        self.factors: list[np.ndarray] = []
        self.sum = np.zeros(1, np.uint64)

    def __enter__(self) -> _Digest:
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.shutdown()

    def update(self, batch: tuple[Inputs, Tensor]) -> None:
        """Take in the next rows."""
        parts = list(leaves(batch))
        layout = [f"{path}:{leaf.dtype}:{tuple(leaf.shape[1:])}" for path, leaf in parts]
        words = [_words(leaf) for _, leaf in parts]
        if self.layout is None:
            self.layout = layout
            self.streams = [hashlib.sha256() for _ in parts]
            self.factors = [_factors(i, w.shape[1]) for i, w in enumerate(words)]
        if layout != self.layout:
            raise DatasetError(f"examples differ in shape or type: {self.layout} and {layout}")
        self._hashed()
        self._hashing = self._thread.submit(self._hash, words)
        keys = sum(_folded(w) @ m for w, m in zip(words, self.factors, strict=True))
        self.sum += _mixed(cast(np.ndarray, keys)).sum(dtype=np.uint64)
        self.rows += len(words[0])

    def _hash(self, words: list[np.ndarray]) -> None:
        for stream, word in zip(self.streams, words, strict=True):
            stream.update(memoryview(cast(Any, word)))

    def _hashed(self) -> None:
        """Wait for the rows being hashed."""
        if self._hashing is not None:
            self._hashing.result()

    def result(self) -> Fingerprint:
        """The fingerprint of the rows so far."""
        self._hashed()
        head = f"{self.rows};{self.layout};".encode()
        streams = b"".join(stream.digest() for stream in self.streams)
        ordered = hashlib.sha256(head + streams).hexdigest()
        unordered = hashlib.sha256(head + self.sum.tobytes()).hexdigest()
        return Fingerprint(self.rows, ordered, unordered)


def _words(leaf: Tensor) -> np.ndarray:
    """A tensor's bytes as (rows, 64-bit words), each row filled up with zeros."""
    flat = leaf.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    data = flat.reshape(len(leaf), flat.size // len(leaf))
    missing = -data.shape[1] % 8
    if missing:
        data = np.pad(data, ((0, 0), (0, missing)))
    return cast(np.ndarray, data.view(np.uint64))


def _folded(words: np.ndarray) -> np.ndarray:
    """Bits spread and high ones folded down: else changes of two highest bits cancel in the sum."""
    spread = words * np.uint64(0x9E3779B97F4A7C15)
    return cast(np.ndarray, spread ^ (spread >> np.uint64(32)))


def _factors(position: int, words: int) -> np.ndarray:
    return np.random.SeedSequence([position, words]).generate_state(words, np.uint64)


def _mixed(keys: np.ndarray) -> np.ndarray:
    """Every bit of a key spread over all of them (the finaliser of SplitMix64)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        keys = (keys ^ (keys >> np.uint64(shift))) * np.uint64(factor)
    return cast(np.ndarray, keys ^ (keys >> np.uint64(31)))

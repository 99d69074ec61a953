"""Fetching examples, calling models on them, and telling two datasets apart.

An example's identity is its index in the dataset, never its place in a loader's order. Everything
here works on nested inputs: a tensor, a tuple or a dict of tensors that share their first axis.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset, default_collate

from kxexplain.errors import ArgumentError, DatasetError, ModelError
from kxexplain.shapes import Inputs

Indices: TypeAlias = Sequence[int] | np.ndarray | Tensor

CHUNK_BYTES = 8 << 20
"""Bytes of examples that a fingerprint holds at once; the result does not depend on it."""


def fetch(dataset: Any, indices: Indices, device: torch.device | str | None = None) -> tuple[Inputs, Tensor]:
    """The examples at ``indices`` as one batch ``(inputs, targets)`` with ``len(indices)`` rows.

    A ``TensorDataset``, also below ``Subset``, is indexed directly; of any other dataset the items
    are collated by torch's default rules. ``DatasetError`` if that yields no (input, target) pair.

    >>> data = TensorDataset(torch.arange(6.0).reshape(3, 2), torch.tensor([0, 1, 0]))
    >>> fetch(data, [2, 0])
    (tensor([[4., 5.],
            [0., 1.]]), tensor([0, 0]))
    """
    if len(indices) == 0:
        raise ArgumentError("got no indices to fetch; give at least one example")
    while type(dataset) is Subset:
        indices, dataset = _below(dataset.indices, indices), dataset.dataset
    if type(dataset) is TensorDataset:
        rows = torch.as_tensor(indices, dtype=torch.int64, device=dataset.tensors[0].device)
        return _pair([t.index_select(0, rows) for t in dataset.tensors], device)
    items = [dataset[int(i)] for i in indices]
    _check_item(items[0])
    try:
        return _pair(default_collate(items), device)
    except (RuntimeError, TypeError) as error:
        raise DatasetError(
            f"examples {_short(indices)} cannot be put in one batch: {error}. "
            "Give every example the same shape and type (pad them, for instance)"
        ) from error


def call(model: nn.Module, inputs: Inputs) -> Tensor:
    """``model(inputs)``; a tuple becomes positional and a dict keyword arguments.

    ``ModelError`` if the model returns anything but a tensor whose first axis is the batch.

    >>> call(nn.Linear(2, 1), torch.zeros(3, 2)).shape
    torch.Size([3, 1])
    """
    if isinstance(inputs, Tensor):
        outputs = model(inputs)
    elif isinstance(inputs, Mapping):
        outputs = model(**inputs)
    else:
        outputs = model(*inputs)
    if not isinstance(outputs, Tensor) or outputs.dim() == 0:
        got = "a scalar" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
        raise ModelError(
            f"the model returned {got}, expected a tensor with one row per example; wrap it in an "
            "nn.Module whose forward returns that tensor"
        )
    return outputs


def take(inputs: Inputs, rows: slice | Tensor) -> Inputs:
    """The given rows of a batch, of the same nesting as ``inputs``.

    >>> take((torch.arange(4), {"mask": torch.ones(4)}), slice(0, 2))
    (tensor([0, 1]), {'mask': tensor([1., 1.])})
    """
    if isinstance(inputs, Tensor):
        return inputs[rows]
    if isinstance(inputs, Mapping):
        return {key: take(value, rows) for key, value in inputs.items()}
    return tuple(take(value, rows) for value in inputs)


def count(inputs: Inputs) -> int:
    """Number of rows of a batch; ``DatasetError`` if its tensors disagree.

    >>> count({"x": torch.zeros(5, 2)})
    5
    """
    sizes = {leaf.shape[0] if leaf.dim() else -1 for _, leaf in leaves(inputs)}
    if len(sizes) != 1 or -1 in sizes:
        raise DatasetError(f"the inputs' first axes must agree and be the batch, got {sizes}")
    return sizes.pop()


def outputs_2d(outputs: Tensor) -> Tensor:
    """Outputs as (n, C): ``(n,)`` gains an axis, further axes are flattened into one.

    >>> outputs_2d(torch.zeros(4)).shape, outputs_2d(torch.zeros(4, 2, 3)).shape
    (torch.Size([4, 1]), torch.Size([4, 6]))
    """
    if outputs.dim() == 1:
        return outputs.unsqueeze(1)
    return outputs if outputs.dim() == 2 else outputs.flatten(1)


def leaves(inputs: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a nested batch with their paths, dict keys in sorted order."""
    if isinstance(inputs, Tensor):
        yield path, inputs
    elif isinstance(inputs, Mapping):
        for key in sorted(inputs):
            yield from leaves(inputs[key], f"{path}.{key}")
    elif isinstance(inputs, Sequence) and not isinstance(inputs, str):
        for position, value in enumerate(inputs):
            yield from leaves(value, f"{path}.{position}")
    else:
        raise DatasetError(
            f"an example holds a {type(inputs).__name__}; expected tensors, arrays or numbers, "
            "alone or in a tuple or dict"
        )


@dataclass(frozen=True)
class Fingerprint:
    """What a dataset contains: its length, a hash in order, and one that ignores the order."""

    count: int
    ordered: str
    unordered: str

    def difference(self, other: Fingerprint) -> str | None:
        """In words, how ``other`` differs from this one; ``None`` if it does not."""
        if self == other:
            return None
        if self.count != other.count:
            return f"{other.count} examples instead of {self.count}"
        if self.unordered == other.unordered:
            return "the same examples in another order"
        return "as many examples, but with other contents"


def fingerprint(dataset: Any) -> Fingerprint:
    """Hash every example of ``dataset``; a few are fetched twice first to see that they stay equal.

    The result depends on the examples alone (values, dtypes, shapes), not on the class that serves
    them. ``DatasetError`` if the dataset is empty, has no length, serves anything but
    (input, target), or serves something else the second time (random augmentation).

    >>> data = TensorDataset(torch.eye(3), torch.arange(3))
    >>> fingerprint(data).difference(fingerprint(Subset(data, [2, 0, 1])))
    'the same examples in another order'
    """
    total = size(dataset)
    probe = sorted({0, 1 % total, total // 2, total - 1})
    first, again = _Digest(), _Digest()
    first.update(fetch(dataset, probe))
    again.update(fetch(dataset, probe))
    if first.result() != again.result():
        raise DatasetError(
            "the dataset served different values for the same index when asked twice; random "
            "augmentation cannot be replayed: apply it once, beforehand, and train on the result"
        )
    row = sum(leaf.nbytes for _, leaf in leaves(fetch(dataset, probe[:1])))
    step = max(1, CHUNK_BYTES // max(1, row))
    digest = _Digest()
    for start in range(0, total, step):
        digest.update(fetch(dataset, np.arange(start, min(start + step, total))))
    return digest.result()


class _Digest:
    """Both hashes of a dataset, from chunks of any size.

    In order: one SHA-256 per tensor of an example, each over that tensor's rows. Regardless of
    order: the sum of a number per row, Σ_j m_j·w_j over its folded 64-bit words w_j, then mixed,
    modulo 2^64. Only the former says that two datasets are equal; the latter words a message.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.layout: list[str] | None = None
        self.streams: list[Any] = []
        self.factors: list[np.ndarray] = []
        self.sum = np.zeros(1, np.uint64)

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
        for stream, word in zip(self.streams, words, strict=True):
            stream.update(memoryview(cast(Any, word)))
        keys = sum(_folded(w) @ m for w, m in zip(words, self.factors, strict=True))
        self.sum += _mixed(cast(np.ndarray, keys)).sum(dtype=np.uint64)
        self.rows += len(words[0])

    def result(self) -> Fingerprint:
        """The fingerprint of the rows so far."""
        head = f"{self.rows};{self.layout};".encode()
        streams = b"".join(stream.digest() for stream in self.streams)
        ordered = hashlib.sha256(head + streams).hexdigest()
        unordered = hashlib.sha256(head + self.sum.tobytes()).hexdigest()
        return Fingerprint(self.rows, ordered, unordered)


def _words(leaf: Tensor) -> np.ndarray:
    """A tensor's bytes as (rows, 64-bit words), each row filled up with zeros."""
    flat = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
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


def size(dataset: Any) -> int:
    """``len(dataset)``; ``DatasetError`` if it has none or is empty."""
    try:
        total = len(dataset)
    except (TypeError, NotImplementedError) as error:
        raise DatasetError(
            f"a {type(dataset).__name__} has no length; expected a map-style dataset, whose "
            "examples can be asked for by index"
        ) from error
    if total == 0:
        raise DatasetError("the dataset is empty; give at least one example")
    return total


def _below(table: Any, indices: Indices) -> Indices:
    """Indices into a ``Subset`` as indices into the dataset below it."""
    if isinstance(table, Tensor):
        return table[torch.as_tensor(indices, dtype=torch.int64)]
    if isinstance(table, np.ndarray):
        return cast(np.ndarray, table[np.asarray(indices, dtype=np.int64)])
    return [int(table[int(i)]) for i in indices]


def _pair(batch: Any, device: torch.device | str | None) -> tuple[Inputs, Tensor]:
    _check_item(batch)
    inputs, targets = batch
    if not isinstance(targets, Tensor):
        raise DatasetError(
            f"targets collate to a {type(targets).__name__}, expected a tensor; "
            "give numbers, arrays or tensors as targets"
        )
    if device is None:
        return inputs, targets
    return _move(inputs, device), targets.to(device)


def _check_item(item: Any) -> None:
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        got = f"{len(item)} parts" if isinstance(item, (tuple, list)) else type(item).__name__
        raise DatasetError(
            f"an example of the dataset is {got}, expected a pair (input, target); "
            "several inputs go into one tuple or dict: ((a, b), target)"
        )


def _move(inputs: Inputs, device: torch.device | str) -> Inputs:
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {key: _move(value, device) for key, value in inputs.items()}
    return tuple(_move(value, device) for value in inputs)


def _short(indices: Indices) -> str:
    shown = [int(i) for i in indices[:4]]
    return f"{shown}"[:-1] + (", …]" if len(indices) > 4 else "]")

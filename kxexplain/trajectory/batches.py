"""Fetching examples and calling models on them.

An example's identity is its index in the dataset, never its place in a loader's order. Everything
here works on nested inputs: a tensor, a tuple or a dict of tensors that share their first axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset, default_collate

from kxexplain.errors import ArgumentError, DatasetError, ModelError
from kxexplain.shapes import Inputs

Indices: TypeAlias = Sequence[int] | np.ndarray | Tensor


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


class Fetcher:
    """Fetches batches of one dataset onto one device, as :func:`fetch` does; a ``TensorDataset`` there in two look-ups.

    >>> data = TensorDataset(torch.arange(6.0).reshape(3, 2), torch.tensor([0, 1, 0]))
    >>> Fetcher(data, torch.device("cpu"))(torch.tensor([1]))
    (tensor([[2., 3.]]), tensor([1]))
    """

    def __init__(self, dataset: Any, device: torch.device) -> None:
        self._dataset, self._device = dataset, device
        self._ready = type(dataset) is TensorDataset and [t.device for t in dataset.tensors] == [device] * 2

    def __call__(self, indices: Tensor) -> tuple[Inputs, Tensor]:
        """The examples at ``indices``."""
        if self._ready:  # this runs in every step of a training: no more than the two look-ups
            inputs, targets = self._dataset.tensors
            indices = indices.to(self._device)
            return inputs.index_select(0, indices), targets.index_select(0, indices)
        return fetch(self._dataset, indices, self._device)


def all_targets(dataset: Any) -> Tensor | None:
    """Every target of a ``TensorDataset``, also below ``Subset``; ``None`` of any other dataset, which must be fetched.

    >>> all_targets(TensorDataset(torch.zeros(3, 2), torch.tensor([0, 1, 0])))
    tensor([0, 1, 0])
    """
    if type(dataset) is Subset:
        below = all_targets(dataset.dataset)
        return None if below is None else below[torch.as_tensor(dataset.indices, dtype=torch.int64)]
    return dataset.tensors[1] if type(dataset) is TensorDataset and len(dataset.tensors) == 2 else None


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
    return mapped(inputs, lambda x: x[rows])


def copied(inputs: Inputs) -> Inputs:
    """A batch of its own, which a model may change in place; made outside tracers, which would count the copying.

    >>> batch = torch.zeros(2)
    >>> copied(batch).add_(1), batch
    (tensor([1., 1.]), tensor([0., 0.]))
    """
    return mapped(inputs, Tensor.clone)


def mapped(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """The same nesting, with every tensor changed.

    >>> mapped((torch.ones(1), {"mask": torch.ones(2)}), torch.neg)
    (tensor([-1.]), {'mask': tensor([-1., -1.])})
    """
    if isinstance(inputs, Tensor):
        return change(inputs)
    if isinstance(inputs, Mapping):
        return {key: mapped(value, change) for key, value in inputs.items()}
    return tuple(mapped(value, change) for value in inputs)


def alike(first: Inputs, second: Inputs) -> bool:
    """Whether two batches hold examples of one kind, so that they can be joined.

    >>> alike(torch.zeros(2, 3), torch.zeros(4, 3)), alike(torch.zeros(2, 3), torch.zeros(2, 4))
    (True, False)
    """
    one, other = (
        [(path, x.shape[1:], x.dtype, x.device, x.layout) for path, x in leaves(batch)] for batch in (first, second)
    )
    return one == other


def joined(first: Inputs, second: Inputs) -> Inputs:
    """One batch after the other, of the same nesting; a batch of its own.

    >>> joined((torch.zeros(1), {"mask": torch.ones(1)}), (torch.ones(1), {"mask": torch.ones(1)}))
    (tensor([0., 1.]), {'mask': tensor([1., 1.])})
    """
    if isinstance(first, Tensor):
        return torch.cat([first, cast(Tensor, second)])
    if isinstance(first, Mapping):
        return {key: joined(value, cast(Mapping[str, Any], second)[key]) for key, value in first.items()}
    return tuple(joined(*pair) for pair in zip(first, cast(Sequence[Any], second), strict=True))


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


def size(dataset: Any) -> int:
    """``len(dataset)``; ``DatasetError`` if it has none or is empty."""
    try:
        total = len(dataset)
    except (TypeError, NotImplementedError) as error:
        raise DatasetError(
            f"a {type(dataset).__name__} has no length; expected a map-style dataset, whose "
            "examples can be asked for by index"
        ) from error
    if not hasattr(dataset, "__getitem__"):
        hint = "; give its dataset: loader.dataset" if hasattr(dataset, "dataset") else ""
        raise DatasetError(
            f"the examples of a {type(dataset).__name__} cannot be asked for by index, as those of a map-style dataset "
            f"can{hint}"
        )
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
    return mapped(inputs, lambda x: x.to(device)), targets.to(device)


def _check_item(item: Any) -> None:
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        got = f"{len(item)} parts" if isinstance(item, (tuple, list)) else type(item).__name__
        raise DatasetError(
            f"an example of the dataset is {got}, expected a pair (input, target); "
            "several inputs go into one tuple or dict: ((a, b), target)"
        )


def _short(indices: Indices) -> str:
    shown = [int(i) for i in indices[:4]]
    return f"{shown}"[:-1] + (", …]" if len(indices) > 4 else "]")

"""Features of a loop of one's own are those of a replay; a loop that they cannot be had from is told, and replayed."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import kxexplain as kx
from kxexplain.errors import ArgumentError
from kxexplain.search import GradientIndex, delayed
from kxexplain.search.updates import projection_for, update_features

EXAMPLES, BATCH = 22, 4


def setting(dropout: float = 0.3) -> tuple[nn.Module, TensorDataset]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3))
    return model, TensorDataset(torch.randn(EXAMPLES, 5), torch.randint(3, (EXAMPLES,)))


def batches(epochs: int = 3) -> Iterator[Tensor]:
    for epoch in range(epochs):
        yield from torch.randperm(EXAMPLES, generator=torch.Generator().manual_seed(epoch)).split(BATCH)


Loop = Callable[[kx.Recorder, nn.Module, torch.optim.Optimizer, Any], None]


def plain(recorder: kx.Recorder, model: nn.Module, optimizer: torch.optim.Optimizer, data: Any) -> None:
    """Clips, looks at the outputs in between, and zeroes gradients at the end."""
    for indices in batches():
        inputs, targets = data[indices]
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clip = torch.clamp(1.0 / (norm + 1e-6), max=1.0).item()
        recorder.step(indices, loss, clip=clip)


def accumulating(recorder: kx.Recorder, model: nn.Module, optimizer: torch.optim.Optimizer, data: Any) -> None:
    """Each batch in two forward passes, and a glance with gradients enabled that leads nowhere."""
    for indices in batches():
        optimizer.zero_grad()
        for half in indices.chunk(2):
            inputs, targets = data[half]
            losses = nn.functional.cross_entropy(model(inputs), targets, reduction="none")
            (losses.sum() / len(indices)).backward()
        model(data[:3][0])
        optimizer.step()
        recorder.step(indices)


def recorded(
    out: Path, loop: Loop, make: Callable[[Any], torch.optim.Optimizer], *, smooth: bool = False, **options: Any
) -> tuple[kx.Trajectory, nn.Module, TensorDataset]:
    model, data = setting()
    if smooth:  # nothing that looks at a whole batch, or draws
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    torch.manual_seed(1)
    optimizer = make([{"params": p, "lr": 0.02 * (1 + i)} for i, p in enumerate(model.parameters())])
    with kx.record(model, optimizer, "cross_entropy", data, out=out, **options) as recorder:
        loop(recorder, model, optimizer, data)
    return recorder.trajectory, model, data


def close(folder: Path, parts: tuple[kx.Trajectory, nn.Module, TensorDataset], dim: int, segments: int | None) -> None:
    loaded = GradientIndex.load(folder / "index", *parts)
    features = update_features(*parts, projection_for(parts[0], dim, segments=segments))
    assert features is not None
    largest = float(features.abs().max())
    assert largest > 0
    torch.testing.assert_close(loaded.features, features, rtol=1e-3, atol=1e-5 * largest)
    assert torch.equal(loaded.labels, parts[2].tensors[1])


SGD = lambda groups: torch.optim.SGD(groups, weight_decay=0.01)  # noqa: E731
ADAM = lambda groups: torch.optim.Adam(groups, betas=(0.1, 0.9))  # noqa: E731


@pytest.mark.parametrize(
    ("loop", "make", "options"),
    [
        (plain, SGD, {"segments": 3, "features": 600}),
        (plain, SGD, {"keep": 4, "features": 600}),
        (accumulating, SGD, {"smooth": True, "features": 64}),
        (accumulating, ADAM, {"smooth": True, "keep": 5, "features": 64}),
        pytest.param(plain, ADAM, {"features": 64}, marks=pytest.mark.slow),
        pytest.param(plain, torch.optim.RMSprop, {"features": 64, "clip_value": 0.02}, marks=pytest.mark.slow),
    ],
    ids=["sgd", "sgd-unannounced", "accumulating", "accumulating-adam", "adam", "clamped"],
)
def test_as_replayed(
    loop: Loop, make: Any, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GradientIndex, "build", None)  # a second pass would fail

    def clamped(recorder: kx.Recorder, model: nn.Module, optimizer: torch.optim.Optimizer, data: Any) -> None:
        for indices in batches():
            optimizer.zero_grad()
            inputs, targets = data[indices]
            nn.functional.cross_entropy(model(inputs), targets).backward()
            nn.utils.clip_grad_value_(model.parameters(), 0.02)
            optimizer.step()
            recorder.step(indices)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parts = recorded(tmp_path / "a", clamped if "clip_value" in options else loop, make, **options)
    kept = {k: v for k, v in options.items() if k not in ("features", "segments")}
    without = recorded(tmp_path / "b", clamped if "clip_value" in options else loop, make, **kept)[1]
    for name, value in parts[1].state_dict().items():
        assert torch.equal(value, without.state_dict()[name]), name
    dim = options["features"]
    close(tmp_path / "a", parts, dim, options.get("segments", max(1, dim // 256)))


def test_more_segments_than_announced(tmp_path: Path) -> None:
    """The last block takes the rest: approximations are as good, and the index is kept, searched and added to."""
    parts = recorded(tmp_path, plain, SGD, keep=3, features=2048, segments=2)
    index = GradientIndex.load(tmp_path / "index", *parts)
    assert (len(parts[0].states) - 1, index.projection.blocks) == (6, 2)
    exact = kx.explain(*parts, parts[2].tensors[0][:4], kernel=False).contributions
    found = index.search(parts[2].tensors[0][:4], k=EXAMPLES, rerank=0).proponents
    gap = (found.scores - exact.gather(1, found.ids)).norm() / exact.norm()
    assert gap < 0.3
    fewer = index.remove([3, 4]).add([4, 3])
    order = fewer.sketches.ids.argsort()
    torch.testing.assert_close(fewer.features[order], index.features, rtol=1e-3, atol=1e-6)


def loader(recorder: kx.Recorder, model: nn.Module, optimizer: torch.optim.Optimizer, data: Any) -> None:
    """Indices from a loader's order, as datasets often give them."""
    numbered = TensorDataset(*data.tensors, torch.arange(EXAMPLES))
    for inputs, targets, indices in DataLoader(Subset(numbered, range(EXAMPLES)), BATCH, shuffle=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        recorder.step(indices)


def misordered(recorder: kx.Recorder, model: nn.Module, optimizer: torch.optim.Optimizer, data: Any) -> None:
    for indices in batches():
        optimizer.zero_grad()
        inputs, targets = data[indices]
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        recorder.step(indices.sort().values)


def scaled(recorder: kx.Recorder, model: nn.Module, optimizer: torch.optim.Optimizer, data: Any) -> None:
    for indices in batches():
        optimizer.zero_grad()
        inputs, targets = data[indices]
        (8 * nn.functional.cross_entropy(model(inputs), targets)).backward()
        for parameter in model.parameters():
            parameter.grad /= 8
        optimizer.step()
        recorder.step(indices)


def around_the_model(recorder: kx.Recorder, model: nn.Module, optimizer: torch.optim.Optimizer, data: Any) -> None:
    for indices in batches():
        optimizer.zero_grad()
        inputs, targets = data[indices]
        nn.functional.cross_entropy(model.forward(inputs), targets).backward()
        optimizer.step()
        recorder.step(indices)


def freezing(recorder: kx.Recorder, model: nn.Module, optimizer: torch.optim.Optimizer, data: Any) -> None:
    """In one step a parameter stands still, and its moment with it."""
    for at, indices in enumerate(batches()):
        optimizer.zero_grad()
        model[2].weight.requires_grad_(at != 7)
        inputs, targets = data[indices]
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        recorder.step(indices)


def test_a_loaders_order_counts(tmp_path: Path) -> None:
    parts = recorded(tmp_path, loader, SGD, smooth=True, features=64)
    close(tmp_path, parts, 64, 1)


@pytest.mark.parametrize(
    ("loop", "words"),
    [
        (misordered, "step 0: the batch's rows are not the examples of these indices"),
        (scaled, "step 0: the examples' gradients do not add up .*off by 7e"),
        (around_the_model, "step 0: the loop differentiated the model at 0 rows, for 4 examples"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_loop_that_cannot_be_watched_is_replayed(loop: Loop, words: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=rf"could not be collected while training \({words}.*by a replay"):
        parts = recorded(tmp_path, loop, SGD, smooth=True, features=64)
    close(tmp_path, parts, 64, None)


def test_a_moment_that_outlives_its_wait_is_replayed(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="step 7: .* stands still, and keeps its moment"):
        parts = recorded(tmp_path, freezing, ADAM, smooth=True, features=64, keep=4)
    close(tmp_path, parts, 64, None)


class Strange(nn.Module):
    """Its parameter goes through a function with a derivative of its own."""

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, weight: Tensor) -> Tensor:
            return 2 * weight

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            return 2 * gradient

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ Strange.Twice.apply(self.weight).T


def test_models_that_take_passes_of_their_own_are_replayed(tmp_path: Path) -> None:
    _, data = setting()
    model = Strange()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.warns(UserWarning, match="per-example gradients of weight take passes of their own"),
        kx.record(model, sgd, "cross_entropy", data, out=tmp_path, features=64) as recorder,
    ):
        loader(recorder, model, sgd, data)
    close(tmp_path, (recorder.trajectory, model, data), 64, None)


def test_an_interrupted_loop_goes_on_and_is_replayed(tmp_path: Path) -> None:
    def stopping(recorder: kx.Recorder, model: nn.Module, optimizer: torch.optim.Optimizer, data: Any) -> None:
        loader(recorder, model, optimizer, data)
        model(data[:4][0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recorded(tmp_path, stopping, SGD, smooth=True, features=64)
    assert not (tmp_path / "index").exists()
    parts = recorded(tmp_path, loader, SGD, smooth=True, features=64, resume=True)
    assert len(parts[0]) == 12
    close(tmp_path, parts, 64, None)


def test_graphs_are_given_back(tmp_path: Path) -> None:
    """Hooks on a graph that hold it would keep every batch in memory."""
    model, data = setting()
    alive: list[weakref.ref[Tensor]] = []

    class Remembers(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            alive.append(weakref.ref(x))
            return x

    model = nn.Sequential(model[0], Remembers(), model[4])
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with kx.record(model, sgd, "cross_entropy", data, out=tmp_path, features=64) as recorder:
        loader(recorder, model, sgd, data)
        for _ in range(30):
            model(data[:4][0])
        assert sum(ref() is not None for ref in alive) < 12
    assert not any(ref() is not None for ref in alive)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": "1MB"}, "thinned out"),
        ({"features": 3}, "dim=3"),
        ({"segments": 0}, "segments=0"),
        ({"objective": kx.Objective(input_penalty=0.1)}, "input penalty"),
        ({"objective": kx.Objective(parameter_penalty=0.1)}, "second time"),
    ],
    ids=str,
)
def test_refused_before_the_folder_is_touched(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    model, data = setting()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ArgumentError, match=words):
        kx.record(model, sgd, "cross_entropy", data, out=tmp_path / "run", **{"features": 64} | options)
    assert not (tmp_path / "run").exists()


def test_waiting_steps_do_not_share_the_loops_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that fills one buffer with batch after batch, under momentum."""

    def reusing(recorder: kx.Recorder, model: nn.Module, optimizer: torch.optim.Optimizer, data: Any) -> None:
        room = torch.empty(BATCH, 5)
        for indices in batches():
            optimizer.zero_grad()
            inputs, targets = data[indices]
            room[: len(indices)] = inputs
            nn.functional.cross_entropy(model(room[: len(indices)]), targets).backward()
            optimizer.step()
            recorder.step(indices)

    momentum = lambda groups: torch.optim.SGD(groups, momentum=0.9)  # noqa: E731
    parts = recorded(tmp_path, reusing, momentum, smooth=True, features=64, keep=7)
    assert delayed.lag(parts[0].manifest.optimizer) == 197
    close(tmp_path, parts, 64, 1)


def test_a_resumed_loop_is_refused_before_its_model_is_set(tmp_path: Path) -> None:
    data = TensorDataset(torch.eye(3), torch.tensor([0, 1, 0]))
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with kx.record(model, optimizer, "cross_entropy", data, out=tmp_path) as recorder:
        loss = nn.functional.cross_entropy(model(data.tensors[0]), data.tensors[1])
        loss.backward()
        optimizer.step()
        recorder.step(range(3), loss)
    with torch.no_grad():
        model.weight.zero_()
    with pytest.raises(ArgumentError, match="dim=0"):
        kx.record(model, optimizer, "cross_entropy", data, out=tmp_path, resume=True, features=0)
    assert not model.weight.any()
    with pytest.raises(ArgumentError, match="segments=2 without features"):
        kx.record(model, optimizer, "cross_entropy", data, out=tmp_path / "new", segments=2)

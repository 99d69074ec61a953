"""What people do when they train: each practice keeps the bill exact, and replay at rounding."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import kxexplain as kx
from kxexplain.errors import ArgumentError, DatasetError, ReplayError, TrainingError, TrajectoryError
from kxexplain.trajectory import Recorder, record, resolve
from kxexplain.trajectory.store import Writer
from tests.cases import CASES, Case, Problem, vectors
from tests.laws import assert_close, assert_complete, assert_same_bill
from tests.runs import order, run
from tests.trajectory.runs import order as epoch_order
from tests.trajectory.runs import unchecked

DTYPES = [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)]
KEPT = {torch.float64: 1e-10, torch.float32: 1e-5}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.2, weight_decay=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, weight_decay=0.05),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=0.05),
}
WALKS = ["sgd", "adam"]
"""One optimiser for each way along a trajectory: forward, and backward with a co-state."""


def explained(problem: Problem, trajectory: kx.Trajectory, target: Any = "all", **options: Any) -> kx.Explanation:
    return kx.explain(trajectory, problem.model, problem.data, problem.queries, target, **options)


def told_of_a_clamp() -> Any:
    """A warning says how much is unattributed, and that a clamp is why."""
    return pytest.warns(kx.UnattributedWarning, match="clamped")


def assert_exact(problem: Problem, trajectory: kx.Trajectory, *, clamped: bool = False) -> kx.Explanation:
    """Complete; nothing unattributed but for a clamp; no drift."""
    dtype = next(problem.model.parameters()).dtype
    for stride in (None,) if dtype == torch.float64 else (2, None):
        with told_of_a_clamp() if clamped else nullcontext():
            found = explained(problem, trajectory, stride=stride, kernel=False)
        assert_complete(found, KEPT[dtype])
        change = float((found.prediction - found.baseline).norm())
        unattributed = float(found.unattributed.norm())
        assert unattributed > 0.01 * change if clamped else unattributed <= KEPT[dtype] * change
        assert float(found.contributions.norm()) > 0
        assert found.facts["drift"] <= 10 * torch.finfo(dtype).eps
    return found


def trained(problem: Problem, out: Path, name: str = "sgd", **options: Any) -> kx.Trajectory:
    """By ``kx.train``: three epochs with a short last batch."""
    settings = {"epochs": 3, "batch_size": 5, **options}
    return kx.train(problem.model, problem.data, optimizer=OPTIMIZERS[name], out=out, **settings)


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, data: Any, clip: Callable[..., Any]) -> list[float]:
    """Training as people write it, with the order of ``kx.train``; the factor of each step's clipping."""
    factors = []
    for epoch in range(3):
        for indices in epoch_order(len(data), 0, epoch).split(5):
            inputs, targets = data[indices]
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets, reduction="none").mean().backward()
            before = torch.cat([p.grad.flatten() for p in model.parameters()])
            clip(model.parameters())
            after = torch.cat([p.grad.flatten() for p in model.parameters()])
            factors.append(float((after.norm() / before.norm()).double()))
            optimizer.step()
    return factors


# Clipping

CLIPS: dict[str, tuple[dict[str, float], Callable[..., Any]]] = {
    "norm": ({"clip_norm": 0.25}, lambda p: nn.utils.clip_grad_norm_(p, 0.25)),
    "value": ({"clip_value": 0.05}, lambda p: nn.utils.clip_grad_value_(p, 0.05)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", WALKS)
@pytest.mark.parametrize("clip", list(CLIPS))
def test_clipping_is_torchs(clip: str, name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """To the last bit what torch's functions do in a plain loop."""
    options, torchs = CLIPS[clip]
    problem, by_hand = (CASES["mlp-relu"].build(dtype) for _ in range(2))
    trajectory = kx.train(
        problem.model, problem.data, optimizer=OPTIMIZERS[name], epochs=3, batch_size=5, out=tmp_path, **options
    )
    factors = plain(by_hand.model, OPTIMIZERS[name](by_hand.model.parameters()), by_hand.data, torchs)
    for ours, torchs_own in zip(problem.model.parameters(), by_hand.model.parameters(), strict=True):
        assert torch.equal(ours, torchs_own)
    logged = [step.clip for step in trajectory.steps]
    if clip == "norm":
        assert logged == pytest.approx(factors, rel=1e-5)
        assert min(logged) < 0.5
    else:
        assert logged == [1.0] * 9
        assert min(factors) < 0.9
    assert trajectory.manifest.settings.items() >= options.items()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("clip", list(CLIPS))
def test_clipping(clip: str, name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    problem = CASES["mlp-relu"].build(dtype)
    trajectory = trained(problem, tmp_path, name, **CLIPS[clip][0])
    assert assert_exact(problem, trajectory, clamped=clip == "value").facts["drift"] == 0


def test_some_steps_are_below_the_limit(tmp_path: Path) -> None:
    problem = CASES["mlp-relu"].build()
    trajectory = kx.train(problem.model, problem.data, epochs=3, batch_size=5, out=tmp_path, clip_norm=0.5, norms=True)
    assert {step.clip == 1 for step in trajectory.steps} == {True, False}
    assert all(step.gradient_norm <= 0.5 for step in trajectory.steps)
    assert_exact(problem, trajectory)


def moved_by_clamping(
    name: str, data: TensorDataset, start: Tensor, batches: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """For a linear model: where each example's gradient went, [n, d], and what clamping added, [d]; step by step.

    Every example has a moment of its own, and so has the clamp; both forget and are scaled as the optimiser does.
    """
    inputs, targets = data.tensors
    weight = start.clone().requires_grad_()
    optimizer, (n, d) = OPTIMIZERS[name]([weight]), inputs.shape
    options = optimizer.param_groups[0]
    moments, moved = torch.zeros(n + 1, d, dtype=torch.float64), torch.zeros(n + 1, d, dtype=torch.float64)
    for step, batch in enumerate(batches):
        rows = torch.as_tensor(batch)
        pull = 2 * (inputs[rows] @ weight.detach() - targets[rows, 0]) / len(rows)
        gradients = torch.zeros(n + 1, d, dtype=torch.float64)
        gradients[rows] = pull[:, None] * inputs[rows]
        whole = gradients.sum(0)
        weight.grad = whole.clamp(-0.05, 0.05)
        gradients[n] = weight.grad - whole
        optimizer.step()
        if name == "adam":
            first, second = options["betas"]
            moments = first * moments + (1 - first) * gradients
            root = (optimizer.state[weight]["exp_avg_sq"] / (1 - second ** (step + 1))).sqrt() + options["eps"]
            moved -= options["lr"] * moments / (1 - first ** (step + 1)) / root
        else:
            moments = options["momentum"] * moments + gradients
            moved -= options["lr"] * moments
    return moved[:n], moved[n]


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_what_clamping_took_away(name: str, tmp_path: Path) -> None:
    """Examples' shares are those of the gradient before it, and what the clamp added is the unattributed line."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(12, 4, dtype=torch.float64), torch.randn(12, 1, dtype=torch.float64))
    model = nn.Linear(4, 1, bias=False).double()
    start, batches = model.weight.detach()[0].clone(), order(12)
    problem = Problem(model, data, TensorDataset(*(t[:3] for t in data.tensors)), "mse")
    optimizer = OPTIMIZERS[name](model.parameters())
    with kx.record(model, optimizer, "mse", data, out=tmp_path, clip_value=0.05) as recorder:
        for indices in batches:
            optimizer.zero_grad()
            inputs, targets = data[indices]
            F.mse_loss(model(inputs), targets).backward()
            nn.utils.clip_grad_value_(model.parameters(), 0.05)
            optimizer.step()
            recorder.step(indices)
    by_examples, by_clamp = moved_by_clamping(name, data, start, batches)
    queries = problem.queries.tensors[0]
    for memory in ("1GB", 1):
        with told_of_a_clamp():
            found = explained(problem, recorder.trajectory, 0, memory=memory)
        assert_close(found.contributions, queries @ by_examples.T, 1e-11)
        assert_close(found.unattributed, queries @ by_clamp, 1e-11)
        assert_complete(found)


def test_clamped_after_the_factor(tmp_path: Path) -> None:
    """A loop that ascends, scales and clamps: sign and clip come first, in replay as well."""
    problem = CASES["mlp-relu"].build()
    model, (inputs, targets) = problem.model, problem.examples
    for name in WALKS:
        optimizer = OPTIMIZERS[name](model.parameters())
        out = tmp_path / name
        with kx.record(model, optimizer, problem.loss, problem.data, out=out, clip_value=0.02) as recorder:
            for step, indices in enumerate(order()):
                optimizer.zero_grad()
                F.cross_entropy(model(inputs[indices]), targets[indices]).backward()
                sign, clip = 1 - 2 * (step % 2), 1 / (1 + step % 3)
                for p in model.parameters():
                    p.grad.mul_(sign * clip).clamp_(-0.02, 0.02)
                optimizer.step()
                recorder.step(indices, sign=sign, clip=clip)
        assert_exact(problem, recorder.trajectory, clamped=True)


@pytest.mark.parametrize("clip", list(CLIPS))
def test_clipping_without_telling(clip: str, tmp_path: Path) -> None:
    problem = CASES["mlp-relu"].build()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.2)

    def unseen(*_: Any) -> None:
        CLIPS[clip][1](problem.model.parameters())

    optimizer.register_step_pre_hook(unseen)
    trajectory = run(problem, tmp_path, optimizer=optimizer)
    with pytest.raises(ReplayError, match=r"clipped or changed without telling.*clip=factor.*clip_value"):
        explained(problem, trajectory)


@pytest.mark.parametrize("wrong", [0, -1.0, float("nan"), float("inf"), True, "1"])
def test_limits_that_are_none(wrong: Any, tmp_path: Path) -> None:
    problem = CASES["mlp-relu"].build()
    for name in ("clip_norm", "clip_value"):
        with pytest.raises(ArgumentError, match=f"{name} must be a positive number"):
            unchecked(kx.train)(problem.model, problem.data, epochs=1, out=tmp_path / "run", **{name: wrong})
    optimizer = OPTIMIZERS["sgd"](problem.model.parameters())
    with pytest.raises(ArgumentError, match="clip_value must be a positive number"):
        unchecked(record)(problem.model, optimizer, "mse", problem.data, out=tmp_path, clip_value=wrong)
    assert not any(tmp_path.iterdir())


def test_clipping_that_cannot_be(tmp_path: Path) -> None:
    """Both ways at once, sparse gradients, a run resumed with another limit, a manifest that was edited."""
    problem = CASES["mlp-relu"].build()
    with pytest.raises(ArgumentError, match="exclude each other"):
        kx.train(problem.model, problem.data, epochs=1, out=tmp_path, clip_norm=1.0, clip_value=1.0)
    words = nn.Sequential(nn.Embedding(7, 3, sparse=True), nn.Flatten())
    data = TensorDataset(torch.arange(6)[:, None], torch.arange(6) % 3)
    for options in ({"clip_norm": 0.1}, {"clip_value": 0.1}):
        with pytest.raises(ArgumentError, match="cannot be clipped"):
            kx.train(words, data, epochs=1, out=tmp_path, **options)
    assert not any(tmp_path.iterdir())
    trajectory = kx.train(problem.model, problem.data, epochs=1, out=tmp_path, clip_value=0.1)
    for options in ({"clip_value": 0.2}, {"clip_norm": 0.1}, {}):
        with pytest.raises(ArgumentError, match="another clip_"):
            kx.train(problem.model, problem.data, epochs=2, out=tmp_path, resume=True, **options)
    edited = json.loads(trajectory.manifest.to_json())
    edited["settings"]["clip_value"] = "much"
    writer = Writer.reopen(tmp_path, trajectory.states, len(trajectory))
    writer.replace_manifest(json.dumps(edited))
    writer.close()
    with pytest.raises(TrajectoryError, match="clip_value is 'much'"):
        explained(problem, kx.Trajectory.open(tmp_path))


# Augmentation


class Augmented(Dataset):
    """Examples with noise, some of them turned round: drawn from torch's generator whenever they are served."""

    def __init__(self, data: TensorDataset) -> None:
        self.x, self.y = data.tensors
        self.served: list[tuple[int, Tensor]] = []

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x = self.x[i] + 0.3 * torch.randn(6, dtype=self.x.dtype)
        x = x.flip(0) if torch.rand(()) < 0.5 else x
        self.served.append((i, x))
        return x, self.y[i]


def augmented(dtype: torch.dtype = torch.float64, *, dropout: bool = False) -> Problem:
    middle = nn.Dropout(0.3) if dropout else nn.Identity()
    make = lambda: nn.Sequential(nn.Linear(6, 8), middle, nn.Tanh(), nn.Linear(8, 3))  # noqa: E731
    problem = Case("augmented", make, vectors).build(dtype)
    return Problem(problem.model, Augmented(problem.data), problem.queries, problem.loss)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("name", WALKS)
def test_augmentation(name: str, dropout: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    """Several epochs, in each of which an example is another one; the same bill as from tensors of all it was."""
    problem = augmented(dtype, dropout=dropout)
    start = {k: v.clone() for k, v in problem.model.state_dict().items()}
    trajectory = trained(problem, tmp_path / "random", name)
    served = problem.data.served[-sum(len(step.indices) for step in trajectory.steps) :]
    found = assert_exact(problem, trajectory)
    assert found.facts["drift"] == 0
    assert trajectory.manifest.dataset.random
    if dropout:
        return
    numbers = torch.tensor([i for i, _ in served])
    fixed = TensorDataset(torch.stack([x for _, x in served]), problem.data.y[numbers])
    assert len({tuple(x.tolist()) for x in fixed.tensors[0]}) == len(served)
    problem.model.load_state_dict(start)
    every = Problem(problem.model, fixed, problem.queries, problem.loss)
    batches = torch.arange(len(served)).split([len(s.indices) for s in trajectory.steps])
    keep = [s.step for s in trajectory.states][1]
    again = explained(
        every,
        run(every, tmp_path / "fixed", batches=[b.tolist() for b in batches], keep=keep,
            optimizer=OPTIMIZERS[name](problem.model.parameters())),
        kernel=False,
    )  # fmt: skip
    summed = torch.zeros_like(found.contributions).index_add_(1, numbers, again.contributions)
    assert_close(found.contributions, summed, 1e-11 if dtype == torch.float64 else 1e-5)


def test_augmented_training_is_a_plain_loop(tmp_path: Path) -> None:
    problem, by_hand = augmented(dropout=True), augmented(dropout=True)
    state = torch.get_rng_state()
    trained(problem, tmp_path, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    optimizer = OPTIMIZERS["sgd"](by_hand.model.parameters())
    torch.manual_seed(4)
    for epoch in range(3):
        for indices in epoch_order(14, 4, epoch).split(5):
            batch = [by_hand.data[int(i)] for i in indices]
            optimizer.zero_grad()
            outputs = by_hand.model(torch.stack([x for x, _ in batch]))
            F.cross_entropy(outputs, torch.stack([y for _, y in batch]), reduction="none").mean().backward()
            optimizer.step()
    for ours, theirs in zip(problem.model.parameters(), by_hand.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


class Stopping(Augmented):
    """Interrupts in the middle of a batch."""

    left = -1

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return super().__getitem__(i)


@pytest.mark.parametrize("after", [14, 25])
def test_augmented_training_resumed(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = augmented(dropout=True), augmented(dropout=True)
    expected = trained(whole, tmp_path / "whole")
    plain_data, parts.data = parts.data, Stopping(TensorDataset(parts.data.x, parts.data.y))
    train = kx.learning.run.Run.train

    def begin(self: Any, **options: Any) -> None:
        parts.data.left = after
        train(self, **options)

    monkeypatch.setattr(kx.learning.run.Run, "train", begin)
    with pytest.raises(KeyboardInterrupt):
        trained(parts, tmp_path / "parts")
    monkeypatch.undo()
    assert len(kx.Trajectory.open(tmp_path / "parts")) == (after - 1) // 14 * 3 + (after - 1) % 14 // 5
    parts.data = plain_data
    resumed = trained(parts, tmp_path / "parts", resume=True)
    assert list(resumed.steps) == list(expected.steps)
    for one, two in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, two)
    assert_exact(parts, resumed)


def test_which_augmented_dataset_it_was(tmp_path: Path) -> None:
    """Asking does not move the generator; the plain examples, or others augmented, are refused."""
    problem = augmented()
    trajectory = trained(problem, tmp_path)
    state = torch.get_rng_state()
    trajectory.check_dataset(problem.data)
    trajectory.check_dataset(Subset(problem.data, range(14)))
    explained(problem, trajectory)
    explained(Problem(problem.model, problem.data, problem.data, problem.loss), trajectory)
    assert torch.equal(torch.get_rng_state(), state)
    plain_data = TensorDataset(problem.data.x, problem.data.y)
    with pytest.raises(DatasetError, match="always served alike instead of drawn at random"):
        trajectory.check_dataset(plain_data)
    with pytest.raises(DatasetError, match="other contents"):
        trajectory.check_dataset(Augmented(TensorDataset(problem.data.x + 1, problem.data.y)))


def own_loop(
    problem: Problem, out: Path, name: str, batch_of: Callable[[Recorder, Tensor], tuple[Tensor, Tensor]]
) -> kx.Trajectory:
    """A loop over a loader of indices, which shuffles by the generator that the dataset draws from, too."""
    torch.manual_seed(2)
    optimizer = OPTIMIZERS[name](problem.model.parameters())
    with kx.record(problem.model, optimizer, problem.loss, problem.data, out=out) as recorder:
        for _ in range(3):
            for indices in DataLoader(range(14), batch_size=5, shuffle=True):
                inputs, targets = batch_of(recorder, indices)
                optimizer.zero_grad()
                F.cross_entropy(problem.model(inputs), targets).backward()
                optimizer.step()
                recorder.step(indices)
    return recorder.trajectory


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("name", WALKS)
def test_augmentation_in_ones_own_loop(name: str, dropout: bool, tmp_path: Path) -> None:
    problem = augmented(dropout=dropout)
    trajectory = own_loop(problem, tmp_path, name, lambda recorder, indices: recorder.fetch(indices))
    assert trajectory.rng_steps >= {3, 6}  # epochs begin with the loader's own draws
    assert assert_exact(problem, trajectory).facts["drift"] == 0


def test_augmented_batches_that_replay_could_not_draw(tmp_path: Path) -> None:
    problem = augmented()
    before = {k: v.clone() for k, v in problem.model.state_dict().items()}

    def by_oneself(_: Recorder, indices: Tensor) -> tuple[Tensor, Tensor]:
        batch = [problem.data[int(i)] for i in indices]
        return torch.stack([x for x, _ in batch]), torch.stack([y for _, y in batch])

    with pytest.raises(TrainingError, match=r"draws at random, but .* step 0 was not fetched by recorder\.fetch"):
        own_loop(problem, tmp_path / "one", "sgd", by_oneself)
    assert all(torch.equal(problem.model.state_dict()[k], v) for k, v in before.items())
    for wrong in (lambda i: i.flip(0), lambda i: i[:-1], lambda i: torch.cat([i, i]), lambda i: (i + 1) % 14):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        with pytest.raises(ArgumentError, match="step 0 was made of other examples"):
            own_loop(problem, out, "sgd", lambda recorder, indices, wrong=wrong: recorder.fetch(wrong(indices)))


@pytest.mark.parametrize("name", WALKS)
def test_augmented_batches_thrown_away_and_put_together(name: str, tmp_path: Path) -> None:
    """A batch that the loop fetched but did not use; and one fetched in two parts."""
    problem = augmented()

    def batch_of(recorder: Recorder, indices: Tensor) -> tuple[Tensor, Tensor]:
        recorder.fetch(indices.flip(0))
        (one, first), (two, second) = recorder.fetch(indices[:1]), recorder.fetch(indices[1:])
        return torch.cat([one, two]), torch.cat([first, second])

    trajectory = own_loop(problem, tmp_path, name, batch_of)
    assert assert_exact(problem, trajectory).facts["drift"] == 0


# Loops and losses of one's own


def looped(
    problem: Problem,
    out: Path,
    name: str,
    *,
    reduction: str = "mean",
    batches: Iterable[Sequence[int]] | None = None,
    micro: int | None = None,
    schedule: Callable[[torch.optim.Optimizer], Any] = lambda optimizer: None,
) -> kx.Trajectory:
    """One's own loop; ``micro`` is the most examples in one forward pass, over which gradients are accumulated."""
    model, loss = problem.model.train(), resolve(problem.loss)[1]
    optimizer = OPTIMIZERS[name](model.parameters())
    scheduler = schedule(optimizer)
    torch.manual_seed(1)
    with kx.record(model, optimizer, problem.loss, problem.data, out=out, reduction=reduction) as recorder:
        for indices in order() if batches is None else batches:
            rows = torch.as_tensor(indices)
            optimizer.zero_grad()
            for part in rows.split(micro or len(rows)):
                inputs, targets = problem.data[part]
                total = loss(model(inputs), targets).sum()
                (total / len(rows) if reduction == "mean" else total).backward()
            optimizer.step()
            recorder.step(indices)
            if scheduler is not None:
                scheduler.step()
    return recorder.trajectory


def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    """Targets are (class, weight)."""
    return F.cross_entropy(outputs, targets[:, 0].long(), reduction="none") * targets[:, 1]


def smoothed(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none", label_smoothing=0.2)


CLASS_WEIGHTS = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)


def by_class(outputs: Tensor, targets: Tensor) -> Tensor:
    """Torch's weighted mean over a batch: Σ w ℓ / Σ w."""
    w = CLASS_WEIGHTS.to(outputs.dtype)[targets]
    return F.cross_entropy(outputs, targets, reduction="none") * w * (len(w) / w.sum())


def with_weights(problem: Problem, weights: Tensor) -> Problem:
    inputs, targets = problem.data.tensors
    data, queries = (
        TensorDataset(x, torch.stack([y.to(x.dtype), w.to(x.dtype)], 1))
        for x, y, w in ((inputs, targets, weights), (*problem.queries.tensors, torch.ones(len(problem.queries))))
    )
    return Problem(problem.model, data, queries, weighted)


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def dropped() -> nn.Module:
    return nn.Sequential(nn.Dropout(0.2), nn.Linear(6, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3))


def warm(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 4)


def made(how: str, dtype: torch.dtype) -> tuple[Problem, dict[str, Any]]:
    """A problem, and how its loop goes."""
    model = {"batch norm": normed, "dropout": dropped}.get(how)
    problem = (CASES["mlp-relu"] if model is None else Case(how, model, vectors)).build(dtype)
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {}
    if "sample weights" in how:
        problem = with_weights(problem, torch.rand(14, generator=generator) * 2)
    if "class weights" in how or how == "label smoothing":
        problem.loss = by_class if "class" in how else smoothed
    if how.endswith("sum"):
        options["reduction"] = "sum"
    if "accumulated" in how:
        options["micro"] = 2
    if how == "with replacement":
        options["batches"] = torch.randint(14, (8, 6), generator=generator).tolist()
    if how == "schedule":
        options["schedule"] = warm
    return problem, options


HOW = [
    "accumulated, sum", "sample weights", "sample weights, sum", "class weights", "label smoothing",
    "with replacement", "dropout", "batch norm", "schedule",
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WALKS)
@pytest.mark.parametrize("how", HOW)
def test_loops(how: str, name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Two epochs with a short last batch, under L2 decay."""
    problem, options = made(how, dtype)
    trajectory = looped(problem, tmp_path, name, **options)
    found = assert_exact(problem, trajectory)
    assert (float(found.buffers.norm()) > 0) == (how == "batch norm")
    assert float(found.regularizer.norm()) > 0
    if how == "schedule":
        assert len({step.rates for step in trajectory.steps}) == 4
    if how == "with replacement":
        assert any(len(set(step.indices.tolist())) < 6 for step in trajectory.steps)


@pytest.mark.parametrize("name", WALKS)
def test_accumulated_as_in_one_pass(name: str, tmp_path: Path) -> None:
    one, several = (CASES["mlp-relu"].build() for _ in range(2))
    whole = explained(one, looped(one, tmp_path / "one", name), kernel=False)
    parts = assert_exact(several, looped(several, tmp_path / "several", name, micro=2))
    assert_same_bill(parts, whole, 1e-11)


@pytest.mark.parametrize("name", WALKS)
def test_accumulation_that_replay_cannot_repeat(name: str, tmp_path: Path) -> None:
    """Batch norm sees micro-batches, but replay the whole one: an error, not a wrong bill."""
    problem, _ = made("batch norm", torch.float64)
    trajectory = looped(problem, tmp_path, name, micro=2, batches=[[0, 1, 2, 3], [4, 5, 6, 7]])
    with pytest.raises(ReplayError):
        explained(problem, trajectory)


@pytest.mark.parametrize("name", WALKS)
def test_a_weight_is_a_number_of_visits(name: str, tmp_path: Path) -> None:
    """An example of weight two puts in what it would, were it twice in the batch."""
    weights = torch.arange(14) % 3
    plain_problem, problem = CASES["mlp-relu"].build(), with_weights(CASES["mlp-relu"].build(), weights)
    often = [[i for i in batch for _ in range(int(weights[i]))] for batch in order()]
    repeated = explained(
        plain_problem, looped(plain_problem, tmp_path / "often", name, reduction="sum", batches=often), stride=1
    )
    found = explained(problem, looped(problem, tmp_path / "weighted", name, reduction="sum"), stride=1)
    assert_same_bill(found, repeated, 1e-11)
    assert float(found.contributions[:, weights == 0].abs().max()) == 0


def test_class_weights_are_torchs(tmp_path: Path) -> None:
    """The loss function for class weights that the documentation gives trains as torch's weighted mean does."""
    (problem, _), (by_hand, _) = (made("class weights", torch.float64) for _ in range(2))
    looped(problem, tmp_path, "adam")
    optimizer = OPTIMIZERS["adam"](by_hand.model.parameters())
    for indices in order():
        inputs, targets = by_hand.data[indices]
        optimizer.zero_grad()
        nn.CrossEntropyLoss(weight=CLASS_WEIGHTS)(by_hand.model(inputs), targets).backward()
        optimizer.step()
    for ours, theirs in zip(problem.model.parameters(), by_hand.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)

"""Importing a training's checkpoints: which files, in which order, what is in them, and what is refused."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from kxexplain import import_checkpoints
from kxexplain.errors import ArgumentError, DatasetError, KxError, ModelError, TrainingError, TrajectoryError
from kxexplain.trajectory import Replayer, Trajectory, record
from kxexplain.trajectory.checkpoints import files
from tests.trajectory.runs import CASES, build, examples, named, unchecked

DATA = examples(12)


class Noisy(Dataset):
    """Examples with noise of torch's generator, another one whenever they are served."""

    def __len__(self) -> int:
        return len(DATA)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, target = DATA[index]
        return inputs + torch.randn_like(inputs), target


def model_of(case: str = "mlp") -> nn.Module:
    return build(CASES[case])[0]


def states(model: nn.Module, count: int = 3) -> list[dict[str, Tensor]]:
    """State dicts of a model that moves at random."""
    made, draw = [], torch.Generator().manual_seed(1)
    for _ in range(count):
        made.append({name: value.clone() for name, value in model.state_dict().items()})
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=draw))
    return made


WRITERS: dict[str, tuple[str, Callable[[dict[str, Tensor], Path], Any]]] = {
    "safetensors": (".safetensors", lambda s, f: safetensors.torch.save_file(s, f)),
    "torch": (".pt", lambda s, f: torch.save(s, f)),
    "ordered": (".pth", lambda s, f: torch.save(OrderedDict(s), f)),
    "state_dict": (".bin", lambda s, f: torch.save({"epoch": 3, "state_dict": s}, f)),
    "model_state_dict": (".pt", lambda s, f: torch.save({"optimizer": {"state": {}}, "model_state_dict": s}, f)),
    "model": (".pt", lambda s, f: torch.save({"model": s, "args": {"lr": 0.1}}, f)),
    "DataParallel": (".pt", lambda s, f: torch.save({f"module.{k}": v for k, v in s.items()}, f)),
    "half precision": (".pt", lambda s, f: torch.save({k: v.half().float().half() for k, v in s.items()}, f)),
}


@pytest.mark.parametrize("name", list(WRITERS))
def test_what_is_written_is_read(name: str, tmp_path: Path) -> None:
    """The numbers order the files, also 2 before 10, and the folder that is written opens and is whole."""
    suffix, write = WRITERS[name]
    model = model_of()
    made = states(model)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").touch()
    for number, state in zip((1, 2, 10), made, strict=True):
        write(state, tmp_path / "in" / f"epoch_{number}{suffix}")
    before = named(model)
    trajectory = import_checkpoints(tmp_path / "in", model, DATA, out=tmp_path / "out")
    assert trajectory.manifest.settings["checkpoints"] == [f"epoch_{number}{suffix}" for number in (1, 2, 10)]
    assert (len(trajectory), trajectory.manifest.logged) == (2, False)
    Trajectory.open(tmp_path / "out").check_files()
    for recorded, state in zip(trajectory.states, made, strict=True):
        found = trajectory.state(recorded.step).parameters
        expected = {k: v.half().float() for k, v in state.items()} if name == "half precision" else state
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert all(torch.equal(before[key], value) for key, value in named(model).items())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in", "out"]


def test_a_list_keeps_its_order(tmp_path: Path) -> None:
    model = model_of()
    made = states(model)
    paths = [tmp_path / f"{name}.pt" for name in ("initial", "best", "final")]
    for path, state in zip(paths, made, strict=True):
        torch.save(state, path)
    trajectory = import_checkpoints(iter(map(str, paths)), model, DATA, out=tmp_path / "out")
    assert torch.equal(trajectory.state(1).parameters["0.weight"], made[1]["0.weight"])
    with pytest.raises(ArgumentError, match=r"order of the checkpoints .* cannot be told .*best.pt, final.pt"):
        files(tmp_path)


def test_equal_numbers_tell_no_order(tmp_path: Path) -> None:
    for name in ("e1.pt", "e01.pt"):
        (tmp_path / name).touch()
    with pytest.raises(ArgumentError, match="cannot be told"):
        files(tmp_path)


@pytest.mark.parametrize("case", ["tied", "batch norm", "frozen"])
def test_tied_buffers_and_frozen(case: str, tmp_path: Path) -> None:
    """A tied tensor has two names in a state dict; buffers come along; frozen parameters are none of the examples'."""
    model = model_of(case)
    made = states(model)
    for number, state in enumerate(made):
        torch.save(state, tmp_path / f"{number}.pt")
    trajectory = import_checkpoints(tmp_path, model, DATA, out=tmp_path / "out")
    state = trajectory.state(1)
    for name, value in {**state.parameters, **state.buffers}.items():
        assert torch.equal(value, made[1][name])
    assert {**state.parameters, **state.buffers}.keys() == named(model).keys()
    assert ("0.weight" in trajectory.manifest.optimizer.groups[0].names) is (case == "batch norm")


def test_a_tied_tensor_under_its_other_name(tmp_path: Path) -> None:
    model = model_of("tied")
    for number, state in enumerate(states(model)):
        state.pop("first.weight")
        torch.save(state, tmp_path / f"{number}.pt")
    trajectory = import_checkpoints(tmp_path, model, DATA, out=tmp_path / "out")
    assert "first.weight" in trajectory.state(0).parameters


def test_a_buffer_that_is_not_saved(tmp_path: Path) -> None:
    model = model_of()
    model.register_buffer("scale", torch.tensor(2.0), persistent=False)
    for number, state in enumerate(states(model)):
        torch.save(state, tmp_path / f"{number}.pt")
    assert float(import_checkpoints(tmp_path, model, DATA, out=tmp_path / "out").state(1).buffers["scale"]) == 2


class Evil:
    """Would make a file when it is read."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("owned",)


def changed(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path, dict[str, Tensor]], None]:
    return lambda file, state: torch.save(change(state), file)


def evil(file: Path, state: dict[str, Tensor]) -> None:
    file.write_bytes(pickle.dumps({"state_dict": state, "x": Evil()}, protocol=2))


def zipped_evil(file: Path, state: dict[str, Tensor]) -> None:
    torch.save({"state_dict": state, "x": Evil()}, file)


BAD: dict[str, tuple[Callable[[Path, dict[str, Tensor]], Any], type[KxError], str]] = {
    "missing key": (
        changed(lambda s: {k: v for k, v in s.items() if k != "2.weight"}),
        ModelError,
        r"'2.weight' has shape .* lacks it",
    ),
    "another shape": (changed(lambda s: {**s, "0.weight": torch.zeros(2, 2)}), ModelError, r"the file has \(2, 2\)"),
    "no tensor": (changed(lambda s: {**s, "0.weight": 3}), ModelError, "the file has int"),
    "another model": (
        changed(lambda s: {**s, "head.bias": torch.zeros(1)}),
        ModelError,
        "'head.bias', which the model",
    ),
    "no dict": (changed(lambda s: [1, 2]), ModelError, "holds no named tensors"),
    "not finite": (changed(lambda s: {**s, "2.bias": s["2.bias"] * torch.nan}), TrainingError, "not finite"),
    "runs code": (evil, TrajectoryError, "cannot be read as a checkpoint"),
    "runs code, zipped": (zipped_evil, TrajectoryError, "need code to be read are refused"),
    "a whole module": (lambda f, s: torch.save(nn.Linear(2, 2), f), TrajectoryError, "state dict"),
    "noise": (lambda f, s: f.write_bytes(b"no checkpoint"), TrajectoryError, "cannot be read"),
    "nothing": (lambda f, s: f.write_bytes(b""), TrajectoryError, "cannot be read"),
    "a huge value": (changed(lambda s: {k: v * 1e30 for k, v in s.items()}), TrainingError, "the loss is nan|inf"),
}


@pytest.mark.parametrize("existing", [False, True], ids=["new", "overwritten"])
@pytest.mark.parametrize("name", list(BAD))
def test_bad_files_leave_nothing_behind(
    name: str, existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last file but one is bad; an older trajectory in the folder stays as it is."""
    monkeypatch.chdir(tmp_path)
    write, error, words = BAD[name]
    model, out = model_of(), tmp_path / "out"
    (tmp_path / "in").mkdir()
    for number, state in enumerate(states(model)):
        torch.save(state, tmp_path / "in" / f"{number}.pt")
    if existing:
        import_checkpoints(tmp_path / "in", model, DATA, out=out)
    kept = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    write(tmp_path / "in" / "1.pt", states(model_of())[1])
    with pytest.raises(error, match=words) as caught:
        import_checkpoints(tmp_path / "in", model, DATA, out=out, overwrite=existing)
    assert isinstance(caught.value, KxError)
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == kept
    assert sorted(file.name for file in tmp_path.iterdir()) == (["in", "out"] if existing else ["in"])


def test_a_bad_safetensors_file(tmp_path: Path) -> None:
    for number in (0, 1):
        (tmp_path / f"{number}.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(TrajectoryError, match=r"0\.safetensors cannot be read"):
        import_checkpoints(tmp_path, model_of(), DATA, out=tmp_path / "out")


def test_arguments(tmp_path: Path) -> None:
    model, out = model_of(), tmp_path / "out"
    for number, state in enumerate(states(model)):
        torch.save(state, tmp_path / f"{number}.pt")
    (tmp_path / "empty").mkdir()
    for checkpoints, error, words in (
        (tmp_path / "empty", ArgumentError, "holds no checkpoints"),
        (tmp_path / "nowhere", TrajectoryError, "is no folder"),
        ([], ArgumentError, "got 0 checkpoints"),
        ([tmp_path / "0.pt"], ArgumentError, "got 1 checkpoint;"),
        ([tmp_path / "0.pt", tmp_path / "9.pt"], TrajectoryError, "no checkpoint file"),
        ([tmp_path / "0.pt", tmp_path / "1.pt", tmp_path / "0.pt"], ArgumentError, r"0\.pt is given twice"),
    ):
        with pytest.raises(error, match=words):
            import_checkpoints(checkpoints, model, DATA, out=out)
    for options, words in (
        ({"rate": 0.1}, "rate=0.1 and steps=None"),
        ({"rate": -1.0, "steps": 3}, "a positive learning rate"),
        ({"rate": 0.1, "steps": 0}, "at least 1"),
        ({"reduction": "max"}, "unknown reduction"),
        ({"loss": "unheard of"}, "unknown loss"),
    ):
        with pytest.raises(ArgumentError, match=words):
            unchecked(import_checkpoints)(tmp_path, model, DATA, out=out, **options)
    with pytest.raises(DatasetError, match="empty"):
        import_checkpoints(tmp_path, model, TensorDataset(torch.zeros(0, 6), torch.zeros(0)), out=out)
    with pytest.raises(DatasetError, match="draws at random"):
        import_checkpoints(tmp_path, model, Noisy(), out=out)
    inputs, targets = DATA.tensors
    with pytest.raises(ModelError, match="fails on a batch of the dataset"):
        import_checkpoints(tmp_path, model, TensorDataset(inputs[:, :-1], targets), out=out)
    with pytest.raises(DatasetError, match="example 2 is of class 99"):
        import_checkpoints(tmp_path, model, TensorDataset(inputs, targets.index_fill(0, torch.tensor(2), 99)), out=out)
    assert not out.exists()
    import_checkpoints(tmp_path, model, DATA, out=out)
    with pytest.raises(TrajectoryError, match="already holds a trajectory"):
        import_checkpoints(tmp_path, model, DATA, out=out)
    import_checkpoints(tmp_path, model, DATA, out=out, rate=0.5, steps=4, overwrite=True)
    assert [step.rates for step in Trajectory.open(out).steps] == [(2.0,), (2.0,)]


def test_what_needs_a_log_is_refused(tmp_path: Path) -> None:
    model = model_of()
    for number, state in enumerate(states(model)):
        torch.save(state, tmp_path / f"{number}.pt")
    trajectory = import_checkpoints(tmp_path, model, DATA, out=tmp_path / "out")
    assert "unknown, cross_entropy, 2 chords, 3 states" in repr(trajectory)
    with pytest.raises(ArgumentError, match="no step of the training was logged"):
        Replayer(trajectory, model, DATA)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ArgumentError, match="cannot resume what was made of checkpoints"):
        record(model, optimizer, "cross_entropy", DATA, out=tmp_path / "out", resume=True)


def test_a_loss_of_ones_own(tmp_path: Path) -> None:
    """It is given again on opening, as of a recorded run."""
    model = model_of()
    for number, state in enumerate(states(model)):
        torch.save(state, tmp_path / f"{number}.pt")
    own = lambda outputs, targets: outputs[:, 0].square()  # noqa: E731
    trajectory = import_checkpoints(tmp_path, model, DATA, own, out=tmp_path / "out")
    assert trajectory.loss is own
    with pytest.raises(ArgumentError, match="loss of its own"):
        _ = Trajectory.open(tmp_path / "out").loss

"""What a damaged, foreign or hostile folder does, and what a killed process leaves behind."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from kxexplain.errors import TrajectoryError
from kxexplain.trajectory import Replayer, Trajectory, record, store
from kxexplain.trajectory.states import decode, encode
from tests.trajectory.runs import CASES, build, examples, plain_loop

DATA = examples()


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    out = tmp_path_factory.mktemp("store") / "run"
    model, optimizer, scheduler = build(CASES["adamw, dropout"])
    with record(model, optimizer, "cross_entropy", DATA, out=out) as recorder:
        plain_loop(model, optimizer, scheduler, DATA, after=lambda i, loss, e: recorder.step(i, loss))
    return out


@pytest.fixture
def folder(original, tmp_path):
    shutil.copytree(original, tmp_path / "run")
    return tmp_path / "run"


STATE = "states/00000006.safetensors"
FILES = ["manifest.json", "steps.sqlite", STATE]


def test_only_plain_files_are_left(folder):
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == ["manifest.json", *(f"states/{s:08d}.safetensors" for s in (0, 6, 12, 18)), "steps.sqlite"]
    Trajectory.open(folder).check_files()


@pytest.mark.parametrize("name", FILES)
def test_missing(folder, name):
    (folder / name).unlink()
    with pytest.raises(TrajectoryError, match=name):
        Trajectory.open(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
def test_truncated(folder, name, part):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(part * len(data))])
    with pytest.raises(TrajectoryError, match=name):
        Trajectory.open(folder).check_files()


def test_a_byte_too_long(folder):
    data = (folder / STATE).read_bytes()
    (folder / STATE).write_bytes(data + b"x")
    with pytest.raises(TrajectoryError, match=f"altered: it has {len(data) + 1} bytes instead of {len(data)}"):
        Trajectory.open(folder)


@pytest.mark.parametrize("name", ["manifest.json", STATE])
@pytest.mark.parametrize("place", [0.1, 0.5, 0.95])
def test_one_bit_altered(folder, name, place):
    data = bytearray((folder / name).read_bytes())
    data[int(place * len(data))] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(TrajectoryError, match=name):
        Trajectory.open(folder).check_files()


def test_states_are_checked_when_loaded(folder):
    shutil.copy(folder / "states/00000000.safetensors", folder / "states/spare")
    data = (folder / STATE).read_bytes()
    (folder / STATE).write_bytes(data[:-4] + b"abcd")
    trajectory = Trajectory.open(folder)
    trajectory.state(0)
    with pytest.raises(TrajectoryError, match=r"00000006\.safetensors was altered"):
        trajectory.state(6)


def edit(folder, *statements):
    with sqlite3.connect(folder / "steps.sqlite") as log:
        for statement in statements:
            log.execute(statement)
    log.close()


@pytest.mark.parametrize(
    "statement",
    [
        "DROP TABLE steps",
        "DROP TABLE states",
        "DELETE FROM steps WHERE step = 5",
        "DELETE FROM steps WHERE step > 16",
        "DELETE FROM states",
        "UPDATE states SET sha256 = 7 WHERE step = 6",
        "UPDATE states SET bytes = 'many'",
        "UPDATE states SET step = 7 WHERE step = 6",
        "UPDATE steps SET indices = 'text' WHERE step = 3",
        "UPDATE steps SET indices = x'00' WHERE step = 3",
        "UPDATE steps SET loss = 'low' WHERE step = 3",
        "UPDATE steps SET rates = NULL WHERE step = 3",
        "UPDATE steps SET loss = loss + 1e-9 WHERE step = 3",
        "UPDATE steps SET gradient_norm = 1 WHERE step = 17",
        "DELETE FROM facts WHERE key = 'steps'",
        "ALTER TABLE steps ADD COLUMN more",
        "UPDATE facts SET key = 'manifest:' || key",
    ],
)
def test_altered_log(folder, statement):
    edit(folder, statement)
    with pytest.raises(TrajectoryError, match="run"):
        Trajectory.open(folder).check_files()


@pytest.mark.parametrize("text", ["nonsense", '{"a": 1}', "[1]"])
def test_altered_modes(folder, text):
    edit(folder, f"INSERT OR REPLACE INTO modes VALUES (4, '{text}', '[]')")
    with pytest.raises(TrajectoryError, match="modes"):
        _ = Trajectory.open(folder).modes


@pytest.mark.parametrize("what", ["nothing", "file", "empty", "other"])
def test_folders_that_are_no_trajectory(tmp_path, what):
    path = tmp_path / "x"
    if what == "file":
        path.write_text("hello")
    elif what != "nothing":
        path.mkdir()
        if what == "other":
            (path / "manifest.json").write_text('{"format": "other"}')
    with pytest.raises(TrajectoryError, match="x"):
        Trajectory.open(path)


class Bomb:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("form", ["pickle", "torch"])
@pytest.mark.parametrize("listed", [True, False], ids=["checksum forged", "checksum kept"])
def test_a_strangers_folder_runs_no_code(folder, tmp_path, form, listed):
    bomb = tmp_path / "exploded"
    if form == "pickle":
        (folder / STATE).write_bytes(pickle.dumps(Bomb(bomb)))
    else:
        torch.save({"weight": Bomb(bomb)}, folder / STATE)
    if listed:
        data = (folder / STATE).read_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        edit(folder, f"UPDATE states SET sha256 = '{sha256}', bytes = {len(data)} WHERE step = 6")
    with pytest.raises(TrajectoryError):
        Trajectory.open(folder).check_files()
    model, _, _ = build(CASES["adamw, dropout"])
    if listed:
        with Replayer(Trajectory.open(folder), model, DATA) as replayer, pytest.raises(TrajectoryError, match=STATE):
            replayer.seek(6)
    assert not bomb.exists()


def forged(folder, change):
    """A state altered by somebody who mends the checksums too."""
    state = decode((folder / STATE).read_bytes())
    change(state)
    data = encode(state)
    (folder / STATE).write_bytes(data)
    sha256 = hashlib.sha256(data).hexdigest()
    edit(folder, f"UPDATE states SET sha256 = '{sha256}', bytes = {len(data)} WHERE step = 6")


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.parameters.pop("0.weight"),
        lambda state: state.parameters.update({"0.weight": torch.zeros(2)}),
        lambda state: state.rng.clear() or state.parameters.clear(),
        lambda state: object.__setattr__(state, "rates", (0.1, 0.2)),
        lambda state: object.__setattr__(state, "step", 12),
    ],
)
def test_states_that_do_not_fit_the_manifest(folder, change):
    forged(folder, change)
    with pytest.raises(TrajectoryError, match=STATE):
        Trajectory.open(folder).state(6)


@pytest.mark.parametrize(
    "data",
    [b"", b"\x00" * 8, b"\xff" * 64, b'\x10\x00\x00\x00\x00\x00\x00\x00{"a":{}}        '],
    ids=["empty", "zeros", "ones", "other"],
)
def test_decode_refuses_other_bytes(data):
    with pytest.raises(TrajectoryError, match="not a recorded state"):
        decode(data)


@pytest.mark.parametrize(
    "rest", ["{}", "[]", "7", '{"step": 1, "rates": [], "optimizer": [], "extra": {}}', '{"step": "x"}']
)
def test_decode_refuses_other_metadata(rest):
    from safetensors.torch import save

    with pytest.raises(TrajectoryError, match="not a recorded state"):
        decode(save({"parameters/a": torch.zeros(1)}, {"rest": rest}))
    with pytest.raises(TrajectoryError, match="not a recorded state"):
        decode(save({"elsewhere": torch.zeros(1)}))


def test_state_names_are_never_paths(folder):
    """A file is found by its step number, so a row cannot lead out of the folder."""
    edit(folder, "UPDATE states SET step = -6 WHERE step = 6")
    with pytest.raises(TrajectoryError):
        Trajectory.open(folder)


def test_reading_while_training(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "FLUSH_SECONDS", 0)
    model, optimizer, scheduler = build(CASES["mlp"])
    seen = []

    def look(indices, loss, epoch):
        recorder.step(indices, loss)
        trajectory = Trajectory.open(tmp_path)
        trajectory.check_files()
        seen.append((len(trajectory), recorder.position))

    with record(model, optimizer, "cross_entropy", DATA, out=tmp_path, keep=2) as recorder:
        plain_loop(model, optimizer, scheduler, DATA, after=look)
    # a state counts when its file is on the disk, which the loop does not wait for: one may still be on its way
    assert all(position - position % 2 - length in (0, 2) for length, position in seen)
    assert len(Trajectory.open(tmp_path)) == recorder.position


def test_a_reader_does_not_hinder_the_writer(tmp_path):
    """An open read transaction during the whole run, and at its end."""
    model, optimizer, scheduler = build(CASES["mlp"])
    with record(model, optimizer, "cross_entropy", DATA, out=tmp_path, keep=2) as recorder:
        reader = sqlite3.connect(tmp_path / "steps.sqlite", isolation_level=None)
        reader.execute("BEGIN")
        assert reader.execute("SELECT COUNT(*) FROM steps").fetchone() == (0,)
        start = time.monotonic()
        plain_loop(model, optimizer, scheduler, DATA, after=lambda i, loss, e: recorder.step(i, loss))
    assert time.monotonic() - start < 20
    assert reader.execute("SELECT COUNT(*) FROM steps").fetchone() == (0,)
    reader.close()
    assert len(Trajectory.open(tmp_path)) == 18


def test_rows_appear_within_half_a_second(tmp_path):
    model, optimizer, scheduler = build(CASES["mlp"])
    rows = []

    def slowly(indices, loss, epoch):
        time.sleep(0.06)
        recorder.step(indices, loss)
        with sqlite3.connect(tmp_path / "steps.sqlite") as log:
            rows.append(recorder.position - log.execute("SELECT COUNT(*) FROM steps").fetchone()[0])
        log.close()

    with record(model, optimizer, "cross_entropy", DATA, out=tmp_path, keep=1000) as recorder:
        plain_loop(model, optimizer, scheduler, DATA, after=slowly)
    assert max(rows) <= 9
    assert 0 in rows


KILLED = """
import sys, torch
from torch import nn
from tests.trajectory.runs import CASES, build, examples, plain_loop
from kxexplain.trajectory import record
torch.set_num_threads(1)
case = CASES["adamw, dropout"]
data = examples()
model, optimizer, scheduler = build(case)
with record(model, optimizer, "cross_entropy", data, out=sys.argv[1], keep=int(sys.argv[2])) as recorder:
    print("begun", flush=True)
    plain_loop(model, optimizer, scheduler, data, epochs=10**6, after=lambda i, loss, e: recorder.step(i, loss))
"""


@pytest.mark.parametrize(("keep", "wait"), [(1, 0.7), pytest.param(50, 1.3, marks=pytest.mark.slow)])
def test_killed_in_the_middle(tmp_path, keep, wait):
    out = tmp_path / "run"
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONWARNINGS": "ignore"}
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(out), str(keep)], stdout=subprocess.PIPE, env=environment, cwd=root
    )
    assert child.stdout.readline() == b"begun\n"
    timer = threading.Timer(wait, child.send_signal, [signal.SIGKILL])
    timer.start()
    assert child.wait(60) == -signal.SIGKILL
    child.stdout.close()
    trajectory = Trajectory.open(out)
    trajectory.check_files()
    assert len(trajectory) >= 1
    torch.set_num_threads(1)
    model, _, _ = build(CASES["adamw, dropout"])
    start = trajectory.states[-min(3, len(trajectory.states))].step
    with Replayer(trajectory, model, DATA) as replayer:
        replayer.seek(start)
        while replayer.position < len(trajectory):
            replayer.advance()
    assert replayer.drift == 0.0


def test_manifest_is_readable_json(folder):
    values = json.loads((folder / "manifest.json").read_text())
    assert values["optimizer"]["name"] == "AdamW"
    assert values["dataset"]["count"] == 22
    assert values["versions"]["torch"] == torch.__version__

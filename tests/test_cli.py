"""The commands, called in this process: what they print, write, and answer to wrong use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kxexplain.attribution import Explanation
from kxexplain.cli import app
from kxexplain.cli.console import numbers
from kxexplain.search import GradientIndex
from kxexplain.trajectory import Trajectory

COMMANDS = ("demo", "train", "import", "explain", "neighbors", "compare", "increment", "verify", "info")
FRESH = count()

MINE = """
import torch

def model():
    return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))

def data():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(30, 3, generator=draw)
    y = (x[:, 0] > 0).long()
    part = torch.utils.data.TensorDataset
    return part(x[:20], y[:20]), part(x[20:], y[20:])

def single():
    return data()[0]

def odd():
    return 3

def broken():
    raise RuntimeError("no such disk")
"""


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder, configuration folder and import path of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def mine(tmp_path: Path) -> str:
    """A user's module in the working folder; imported modules stay, so each has a name of its own."""
    name = f"mine{next(FRESH)}"
    (tmp_path / f"{name}.py").write_text(MINE)
    return name


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A trained run on the toy data."""
    ok("train", "--data", "toy", "--model", "mlp-6", "--epochs", "2", "--lr", "0.5", "--out", "run")
    return tmp_path / "run"


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def ok(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return str(result.stdout)


def read(*arguments: object) -> dict[str, Any]:
    """What a command prints with --json, which must be one document and nothing else."""
    found = json.loads(ok(*arguments, "--json"))
    assert isinstance(found, dict)
    return found


def fails(code: int, *arguments: object) -> str:
    """The message of a command that fails: one line on stderr for code 1, no traceback, nothing on stdout."""
    result = call(*arguments)
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    if code == 1:
        assert result.stdout == ""
        assert result.stderr.startswith("kxexplain: ")
        assert result.stderr.count("\n") == 1
    return " ".join(str(result.stderr).replace("│", " ").split())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_there_with_examples(name: str) -> None:
    text = ok(name, "--help")
    assert "Example" in text
    assert f"kxexplain {name}" in text
    assert "--json" in text


def test_the_package_is_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kxexplain", "info", "nowhere"], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("kxexplain: nowhere is no trajectory")


def test_help_lists_the_commands() -> None:
    text = ok("--help")
    assert all(name in text for name in COMMANDS)


def test_train_tells_and_records(run: Path) -> None:
    trajectory = Trajectory.open(run)
    assert len(trajectory) == 14
    assert trajectory.manifest.optimizer.groups[0].options["lr"] == 0.5
    facts = read("train", "--data", "toy", "--model", "mlp-6", "--epochs", "2", "--out", "other", "--keep", "5")
    assert [s.step for s in Trajectory.open("other").states] == [0, 5, 10, 14]
    assert facts["steps"] == 14
    assert 0 <= facts["test_accuracy"] <= 1


def test_train_resumes_and_overwrites(run: Path) -> None:
    again = ("train", "--out", run, "--epochs", "2", "--lr", "0.5")
    message = fails(1, *again)
    assert "already holds a trajectory" in message
    assert "--resume" in message
    assert "--overwrite" in message
    assert "overwrite=" not in message
    assert "not both" in fails(2, *again, "--resume", "--overwrite")
    assert json.loads((run / "run.json").read_text())["data"] == "toy"  # a failed start changes nothing
    assert read(*again, "--resume")["steps"] == 14
    assert read("train", "--out", run, "--epochs", "3", "--lr", "0.5", "--resume")["steps"] == 21
    more = read("train", "--data", "toy", "--epochs", "1", "--overwrite", "--out", run)
    assert more["steps"] == 7
    assert json.loads((run / "run.json").read_text())["model"] == "mlp-64-32"


def test_train_takes_an_optimizer_and_its_options() -> None:
    options = ("--optimizer", "SGD", "--momentum", "0.5", "--weight-decay", "0.01", "--clip-norm", "0.1")
    read("train", "--data", "toy", "--epochs", "1", "--out", "run", *options)
    trajectory = Trajectory.open("run")
    recorded = trajectory.manifest.optimizer.groups[0].options
    assert (recorded["momentum"], recorded["weight_decay"]) == (0.5, 0.01)
    assert trajectory.steps[0].clip < 1
    read("train", "--data", "toy", "--epochs", "1", "--out", "clamped", "--clip-value", "0.01")
    assert Trajectory.open("clamped").manifest.settings["clip_value"] == 0.01
    assert "no optimizer 'nosuch'" in fails(1, "train", "--out", "x", "--optimizer", "nosuch")
    assert "momentum" in fails(1, "train", "--out", "x", "--optimizer", "adam", "--momentum", "0.5")


def stopped(monkeypatch: pytest.MonkeyPatch, place: str, *arguments: object) -> str:
    """What a command says when Ctrl-C is pressed as ``place`` is reached."""

    def press(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(place, press)
        result = call(*arguments)
    assert result.exit_code == 130
    assert result.stdout == ""
    assert result.stderr.startswith("kxexplain: stopped")
    assert result.stderr.count("\n") == 1
    return str(result.stderr)


@pytest.mark.parametrize(
    "place", ["cli.training.build_data", "learning.trainer.describe", "trajectory.recorder.prepare"]
)
def test_stopped_before_anything_is_recorded(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told = stopped(monkeypatch, f"kxexplain.{place}", "train", "--data", "toy", "--epochs", "1", "--out", "run")
    assert "--resume" not in told
    assert not Path("run").exists()


@pytest.mark.parametrize("option", ["--overwrite", "--resume"])
def test_stopped_before_an_older_run_is_touched(run: Path, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("train", "--data", "toy", "--model", "mlp-9", "--epochs", "1", "--out", run, option)
    stopped(monkeypatch, "kxexplain.learning.trainer.describe", *arguments)
    assert json.loads((run / "run.json").read_text())["model"] == "mlp-6"
    assert read("info", run)["steps"] == 14


def test_stopped_on_the_way_then_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("train", "--data", "toy", "--model", "mlp-6", "--epochs", "1", "--out", "run")
    place = "kxexplain.trajectory.recorder.Recorder.step"
    assert "--resume" in stopped(monkeypatch, place, *arguments)
    assert json.loads(Path("run/run.json").read_text())["model"] == "mlp-6"
    assert read(*arguments, "--resume")["steps"] == 7


def test_a_diverged_run_is_told_and_kept() -> None:
    arguments = ("train", "--data", "toy", "--model", "mlp-6", "--lr", "1e30", "--out", "run")
    assert fails(1, *arguments)
    assert Trajectory.open("run").states


def test_explain_prints_bills_and_writes_files(run: Path) -> None:
    text = ok("explain", run, "--queries", "0,3", "--out", "why")
    assert "test example 3" in text
    assert "prediction" in text
    assert {p.name for p in Path("why").iterdir()} == {"query-0.png", "query-3.png", "explanation.safetensors"}
    assert len(Explanation.load("why/explanation.safetensors")) == 2


@pytest.mark.parametrize("command", ["explain", "neighbors", "compare", "demo"])
@pytest.mark.parametrize("out", ["file", "file/below"])
def test_a_folder_that_cannot_be_made_is_noticed_before_work(
    command: str, out: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("work began")

    for module, name in (("explaining", "explain"), ("comparing", "compare_svm"), ("demo", "run")):
        monkeypatch.setattr(sys.modules[f"kxexplain.cli.{module}"], name, work)
    monkeypatch.setattr(GradientIndex, "build", work)
    Path("file").touch()
    message = fails(1, command, *(() if command == "demo" else (run,)), "--out", out)
    assert f"{out} " in message
    assert "give a folder" in message
    if command == "neighbors":
        assert f"--index {out} " in fails(1, command, run, "--index", out)


@pytest.mark.parametrize("optimizer", [("Adam",), ("adamw",), ("sgd", "--momentum", "0.9"), ("rmsprop",)])
def test_optimisers_with_a_memory_are_itemised(optimizer: tuple[str, ...]) -> None:
    options = ("--data", "toy", "--model", "mlp-6", "--epochs", "2", "--lr", "0.02", "--weight-decay", "0.1")
    read("train", *options, "--out", "run", "--optimizer", *optimizer)
    line, charged = (read("explain", "run", "--queries", "0", "--decay", way) for way in ("line", "charged"))
    assert (line["decay"], charged["decay"]) == ("line", "charged")
    for found in (line, charged):
        bill = found["queries"][0]
        assert abs(bill["remainder"]) + abs(bill["unattributed"]) < 1e-5 * abs(bill["prediction"] - bill["baseline"])
        assert bill["contributions"] != 0
    assert line["queries"][0]["regularizer"] != pytest.approx(charged["queries"][0]["regularizer"], rel=1e-3)
    assert "unattributed" not in ok("explain", "run", "--queries", "0")
    assert read("verify", "run", "--examples", "2")["passed"] is True
    assert read("neighbors", "run", "--dim", "64", "-k", "3")["queries"][0]["proponents"][0]["contribution"] != 0
    assert "neither line nor charged" in fails(2, "explain", "run", "--decay", "spread")


def test_what_is_unattributed_is_said_in_one_line(tmp_path: Path) -> None:
    """On stderr, so that --json stays JSON; without file names or code of the library's."""
    options = ("--data", "toy", "--model", "mlp-6", "--epochs", "2", "--lr", "0.02")
    read("train", *options, "--out", "run", "--optimizer", "nadam")
    for extra in ((), ("--json",)):
        result = CliRunner().invoke(app, ["explain", "run", "--queries", "0,1", *extra], catch_exceptions=False)
        assert result.exit_code == 0
        (line,) = [part for part in result.stderr.splitlines() if part]
        assert line.startswith("kxexplain: note: the bill's line 'unattributed' is 100 % of the change")
        assert "(2-norms over the 2 queries): how NAdam turns gradients into steps is not itemised" in line
    assert json.loads(result.stdout)["queries"][0]["unattributed"] != 0


def test_checkpoints_are_imported(run: Path, tmp_path: Path) -> None:
    """The states of a run as bare checkpoints: imported, explained, verified, told about."""
    trajectory = Trajectory.open(run)
    paths = [tmp_path / "saved" / f"epoch-{s.step}.pt" for s in trajectory.states]
    (tmp_path / "saved").mkdir()
    for path, state in zip(paths, trajectory.states, strict=True):
        torch.save(trajectory.state(state.step).parameters, path)
    options = ("--data", "toy", "--model", "mlp-6")
    made = read("import", "saved", *options, "--out", "old")
    assert made["checkpoints"] == [path.name for path in paths]
    assert len(made["losses"]) == len(made["rates"]) == len(paths) - 1
    shown = ok("import", *paths, *options, "--out", "old", "--overwrite", "--lr", "0.5", "--steps", "4")
    assert "kxexplain explain old" in " ".join(shown.split())
    assert read("info", "old")["step_log"] is False
    result = call("explain", "old", "--json")
    assert "made of checkpoints" in result.stderr
    assert json.loads(result.stdout)["queries"][0]["contributions"] != 0
    checked = read("verify", "old", "--examples", "2")
    assert checked["passed"] is True
    assert [check["passed"] for check in checked["checks"]] == [True, True, True, None, True]
    assert "at least two" in fails(1, "import", paths[0], *options, "--out", "new")


@pytest.mark.parametrize("target", ["predicted", "label", "margin", "loss", "1"])
def test_explain_in_json_adds_up(run: Path, target: str) -> None:
    found = read("explain", run, "--queries", "0-2", "--target", target, "-k", "3")
    assert [q["query"] for q in found["queries"]] == [0, 1, 2]
    for one in found["queries"]:
        names = ("baseline", "contributions", "regularizer", "penalty", "buffers", "unattributed", "remainder")
        assert sum(one[name] for name in names) == pytest.approx(one["prediction"], abs=1e-5)
        assert len(one["proponents"]) <= 3
        assert all(entry["contribution"] > 0 for entry in one["proponents"])


def test_explain_all_outputs(run: Path) -> None:
    one = read("explain", run, "--target", "all")["queries"][0]
    assert len(one["prediction"]) == len(one["contributions"]) == 2


def test_neighbors_with_a_kept_index(run: Path) -> None:
    first = read("neighbors", run, "--queries", "0,1", "-k", "4", "--dim", "64", "--index", "index", "--out", "near")
    again = read("neighbors", run, "--queries", "0,1", "-k", "4", "--index", "index")
    assert again["queries"] == first["queries"]
    assert [len(first["queries"][0][name]) for name in ("nearest", "proponents", "opponents")] == [4, 4, 4]
    assert Path("near/neighbors-1.png").stat().st_size > 5000
    bill = read("explain", run, "--queries", "0", "-k", "1")["queries"][0]["proponents"][0]
    top = first["queries"][0]["proponents"][0]
    assert top["example"] == bill["example"]
    assert top["contribution"] == pytest.approx(bill["contribution"], rel=1e-4)


def test_index_built_searched_and_told_about(run: Path) -> None:
    for shard in ("0/2", "1/2"):
        assert "share" in ok("index", "build", run, "--out", "index", "--dim", "64", "--shard", shard)
    made = read("index", "build", run, "--out", "index", "--dim", "64", "--dtype", "float16")
    assert (made["examples"], made["factory"]) == (200, "Flat")
    facts = read("index", "info", "index")
    assert (facts["dim"], facts["dtype"], facts["bytes_an_example"]) == (64, "float16", 132)
    assert "float16" in ok("index", "info", "index")
    found = read("index", "search", "index", run, "--queries", "0", "-k", "4", "--label", "1", "--out", "near")
    assert {hit["label"] for hit in found["queries"][0]["proponents"]} == {1}
    assert Path("near/neighbors-0.png").stat().st_size > 5000
    assert "opponent" in ok("index", "search", "index", run, "--rerank", "0")
    assert "--shard" in fails(2, "index", "build", run, "--out", "other", "--shard", "half")
    assert "at most" in fails(1, "index", "build", run, "--out", "other", "--shard", "3/999")
    assert "--label" in fails(2, "index", "search", "index", run, "--label", "seven")
    assert "no complete index" in fails(1, "index", "info", "nowhere")
    Path("index/units.npy").write_bytes(b"")
    assert "truncated or altered" in fails(1, "index", "search", "index", run)
    for command in ("build", "search"):
        assert "Example" in ok("index", command, "--help")


def test_index_of_a_recall(run: Path) -> None:
    made = read("index", "build", run, "--out", "index", "--recall", "0.9")
    assert made["dim"] in (64, 128)


def test_compare(run: Path) -> None:
    found = read("compare", run, "--limit", "50", "--queries", "6", "--out", "why")
    assert found["train_examples"] == 50
    assert [row["kernel"] for row in found["kernels"]] == ["path", "start", "middle", "end", "rbf", "linear"]
    assert found["alphas"]["network_accuracy"] >= 0
    assert json.loads(Path("why/comparison.json").read_text())["agreement"] == found["agreement"]
    assert 0 <= found["agreement"] <= 1
    assert Path("why/comparison.png").stat().st_size > 5000
    said = ok("compare", run, "--limit", "40", "--against", "rbf,end", "--queries", "0")
    assert "same prediction" in said
    assert "tangent, final" in said
    assert "tangent" not in ok("compare", run, "--limit", "40", "--C", "2", "--against", "none", "--queries", "0")
    assert "against" in fails(1, "compare", run, "--against", "poly")
    assert "neither path nor tangent" in fails(2, "compare", run, "--kernel", "poly")
    assert "C=-1" in fails(1, "compare", run, "--C", "-1")


def test_info_needs_neither_model_nor_data(run: Path) -> None:
    (run / "run.json").unlink()
    found = read("info", run)
    assert (found["steps"], found["examples"], found["optimizer"]) == (14, 200, "SGD")
    assert "cross_entropy" in ok("info", run)


def test_verify_passes_a_good_run(run: Path) -> None:
    found = read("verify", run, "--examples", "2")
    assert found["passed"] is True
    names = ["opens", "files and checksums", "model and data", "replay", "bills add up"]
    assert [check["name"] for check in found["checks"]] == names
    assert "pass" in ok("verify", run)


@pytest.mark.parametrize("damage", ["altered", "truncated", "missing", "other data"])
def test_verify_finds_damage(run: Path, damage: str) -> None:
    state = sorted((run / "states").glob("*.safetensors"))[1]
    content = bytearray(state.read_bytes())
    options: tuple[str, ...] = ()
    if damage == "altered":
        content[-5] ^= 1
        state.write_bytes(content)
    elif damage == "truncated":
        state.write_bytes(content[:-10])
    elif damage == "missing":
        state.unlink()
    else:
        options = ("--data", "digits")
    result = call("verify", run, "--json", *options)
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["passed"] is False
    failed = [check for check in found["checks"] if check["passed"] is False]
    assert len(failed) == 1
    words = {"altered": "altered", "truncated": "truncated", "missing": "missing", "other data": "not the"}
    assert words[damage] in failed[0]["seen"]
    assert "FAIL" in call("verify", run, *options).stdout


def test_functions_of_the_users_own(mine: str) -> None:
    names = ("--model", f"{mine}:model", "--data", f"{mine}:data")
    read("train", *names, "--epochs", "2", "--out", "run")
    assert read("verify", "run")["passed"] is True  # sealed by this user: called without being named again
    assert len(read("explain", "run", "--queries", "0-9")["queries"]) == 10  # the test part
    read("train", "--model", f"{mine}:model", "--data", f"{mine}:single", "--epochs", "1", "--out", "one")
    assert len(read("explain", "one", "--queries", "0-19")["queries"]) == 20  # without one: the training examples


def test_a_strangers_run_calls_no_code(mine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("--model", f"{mine}:model", "--data", f"{mine}:data")
    read("train", *names, "--epochs", "1", "--out", "run")
    monkeypatch.setenv("XDG_CONFIG_HOME", "another-user")
    message = fails(1, "explain", "run")
    assert "not written by you" in message
    assert f"--model {mine}:model --data {mine}:data" in message
    read("explain", "run", *names)
    Path("run/run.json").write_text(json.dumps({"model": "os:abort", "data": "toy", "seal": "0" * 64}))
    assert "names code to call" in fails(1, "explain", "run")
    assert read("info", "run")["model_spec"] == "os:abort"  # told, not called


def test_wrong_functions(mine: str) -> None:
    train = ("train", "--out", "x", "--data")
    assert "expected package.module:function" in fails(2, *train, "a b:c")
    assert "No module named 'nowhere'" in fails(2, *train, "nowhere:data")
    assert "no attribute 'absent'" in fails(2, *train, f"{mine}:absent")
    assert "no such disk" in fails(1, *train, f"{mine}:broken")
    assert "gave a int" in fails(1, *train, f"{mine}:odd")
    assert "gave a int" in fails(1, "train", "--out", "x", "--data", "toy", "--model", f"{mine}:odd")
    assert "no data set 'nosuch'" in fails(1, *train, "nosuch")
    assert "no model 'tree'" in fails(1, "train", "--out", "x", "--model", "tree")


def test_wrong_use(run: Path) -> None:
    assert "is no trajectory" in fails(1, "info", "nowhere")
    assert "0 to 199" in fails(2, "explain", run, "--queries", "200")
    assert "0-4" in fails(2, "explain", run, "--queries", "a")
    assert "5-3 goes backward; give 3-5" in fails(2, "explain", run, "--queries", "5-3")
    assert "output 7 was asked for" in fails(1, "explain", run, "--target", "7")
    assert "got target 'reach'" in fails(1, "explain", run, "--target", "reach")
    assert "not the model" in fails(1, "explain", run, "--model", "mlp-7")
    (run / "run.json").write_text("{")
    assert "cannot be read" in fails(1, "explain", run)
    (run / "run.json").unlink()
    assert "give --model and --data" in fails(1, "explain", run)
    Path("file").touch()
    assert fails(1, "train", "--data", "toy", "--out", "file")


def test_numbers() -> None:
    assert numbers("3, 0-2", 4) == [3, 0, 1, 2]


def test_demo_tells_and_writes(tmp_path: Path) -> None:
    text = ok("demo", "--out", "demo", "--epochs", "2")
    assert "mistake" in text
    assert "support vector machine" in text
    summary = json.loads(Path("demo/summary.json").read_text())
    assert {"sure", "narrow", "wrong"} == {one["why"] for one in summary["explained"]}
    wrong = next(one for one in summary["explained"] if one["why"] == "wrong")
    assert wrong["label"] != wrong["output"]
    assert summary["misclassified"] == wrong["query"]
    assert summary["remainder_relative"] < 1e-5
    assert all((tmp_path / "demo" / file).stat().st_size > 500 for file in summary["files"])
    assert len([file for file in summary["files"] if file.endswith(".png")]) == 7
    Path("other").mkdir()
    Path("other/file").touch()
    assert "no demo's" in fails(1, "demo", "--out", "other")


def test_schedules_and_objectives(tmp_path: Path) -> None:
    small = ("--data", "toy", "--model", "mlp-6", "--epochs", "2")
    facts = read("train", *small, "--schedule", "warmup_decay", "--flooding", "0.4", "--out", "run")
    trajectory = Trajectory.open(tmp_path / "run")
    assert trajectory.manifest.settings["schedule"]["name"] == "warmup_decay"
    assert trajectory.manifest.settings["objective"] == {"flooding": 0.4}
    assert len({step.rates for step in trajectory.steps}) == facts["steps"]
    assert {step.sign for step in trajectory.steps} == {1 if step.loss >= 0.4 else -1 for step in trajectory.steps}
    ok("train", *small, "--schedule", "refined", "--earlier", "run", "--out", "later")
    ok("train", *small, "--schedule", "adagrad", "--radius", "0.1", "--parameter-penalty", "0.01", "--out", "each")
    assert Trajectory.open(tmp_path / "each").manifest.optimizer.name == "Adagrad"
    assert "belong to a --schedule" in fails(1, "train", *small, "--radius", "1", "--out", "new")
    assert "unknown schedule" in fails(1, "train", *small, "--schedule", "fast", "--out", "new")
    assert "give one of them" in fails(1, "train", *small, "--flooding", "1", "--ascent", "0.5", "--out", "new")
    assert not (tmp_path / "new").exists()


def test_increment_compares_the_ways_to_take_new_examples_in(run: Path, mine: str, tmp_path: Path) -> None:
    rows = ("--rows", "ridge; logistic, memory")
    found = json.loads(ok("increment", run, "--count", 10, "--memory", 5, *rows, "--out", "new", "--json"))
    assert [row["name"] for row in found["updates"]] == [
        "no update", "ridge", "logistic, memory", "fine-tuning", "retraining",
    ]  # fmt: skip
    assert found["new_examples"] == 10
    assert (tmp_path / "new" / "updates.png").is_file()
    assert "retraining" in ok("increment", run, "--count", 5, "--rows", "gradient")
    for wrong, message in (
        (("--rows", "svm"), "expected some of"),
        (("--rotate", "30"), "are no pictures"),
        (("--damping", "-1", *rows), "damping=-1.0"),
    ):
        result = call("increment", run, *wrong)
        assert result.exit_code == 1
        assert message in " ".join(result.stderr.split())
    ok("train", "--data", f"{mine}:data", "--model", f"{mine}:model", "--epochs", "1", "--out", "own")
    own = ok("increment", "own", "--new", f"{mine}:data", "--rows", "gradient", "--json")
    assert json.loads(own)["new_examples"] == 20
    assert call("increment", "own", "--new", f"{mine}:data", "--rotate", "3").exit_code == 2

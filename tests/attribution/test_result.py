"""The finished bill: rankings, the printed table that adds up, files, data frames."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import kxexplain as kx
from tests.cases import CASES
from tests.laws import LINES, assert_timeline_agrees
from tests.runs import order, run


@pytest.fixture
def problem():
    return CASES["mlp-gelu"].build(queries=5)


@pytest.fixture
def explanation(problem, tmp_path: Path) -> kx.Explanation:
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.3, weight_decay=0.05)
    trajectory = run(problem, tmp_path / "run", optimizer=optimizer)
    return kx.explain(trajectory, problem.model, problem.data, problem.queries, "label")


@pytest.fixture
def everything(problem, tmp_path: Path) -> kx.Explanation:
    trajectory = run(CASES["mlp-gelu"].build(queries=5), tmp_path / "all", 0.3)
    return kx.explain(trajectory, problem.model, problem.data, problem.queries, "all")


def test_top_ranks_by_value(explanation: kx.Explanation) -> None:
    ranking = explanation.top(4)
    for query, row in enumerate(explanation.contributions):
        ordered = sorted(range(14), key=lambda i, row=row: -float(row[i]))
        assert ranking.proponents[query].tolist() == ordered[:4]
        assert ranking.opponents[query].tolist() == ordered[::-1][:4]
        assert torch.equal(ranking.proponent_values[query], row[ordered[:4]])
        assert torch.equal(ranking.opponent_values[query], row[ordered[::-1][:4]])
    assert explanation.top(100).proponents.shape == (5, 14)
    for wrong in (0, -1):
        with pytest.raises(kx.ArgumentError, match="expected a whole number"):
            explanation.top(wrong)
    unchecked = inspect.unwrap(kx.Explanation.top)  # types are checked in tests, but not at a user's
    for wrong in ("a", 2.5, None):
        with pytest.raises(kx.ArgumentError, match="expected a whole number"):
            unchecked(explanation, wrong)


def amounts(text: str) -> tuple[list[float], list[float], float]:
    """The amounts and the running totals of a printed table, and the size of their last digit."""
    changes, totals, places = [], [], 0
    for line in text.splitlines():
        numbers = re.findall(r"[+-]\d+\.\d+(?:e[+-]\d+)?", line)
        if len(numbers) == 2:
            changes.append(float(numbers[0]))
        if numbers:
            totals.append(float(numbers[-1]))
            places = max(places, len(numbers[-1].split(".")[1]))
    return changes, totals, 10.0**-places


@pytest.mark.parametrize("k", [1, 3, 7, 14, 50])
def test_the_printed_table_adds_up(explanation: kx.Explanation, k: int) -> None:
    """A reader with a pencil: each line's amount leads from one running total to the next, up to the prediction.

    The amounts and totals are each rounded to the digits shown, so one step may be off by one and a half of the last.
    """
    for query in range(len(explanation)):
        changes, totals, digit = amounts(explanation.bill(query, k))
        assert totals[0] == pytest.approx(float(explanation.baseline[query]), abs=digit)
        assert totals[-1] == pytest.approx(float(explanation.prediction[query]), abs=digit)
        assert len(totals) == len(changes) + 2
        for before, change, after in zip(totals, changes, totals[1:], strict=False):
            assert after - before == pytest.approx(change, abs=1.51 * digit)
        assert totals[-2] == pytest.approx(totals[-1], abs=digit / 2)


def test_print(explanation: kx.Explanation, everything: kx.Explanation) -> None:
    text = str(explanation)
    for query in range(3):
        assert f"query {query}" in text
    assert "2 more" in text
    for word in ("baseline", "regularizer", "remainder", "prediction", "other examples"):
        assert word in text
    assert "buffers" not in text
    assert amounts(text)[1]
    assert max(len(line) for line in text.splitlines()) <= 78
    assert all(line == line.rstrip() for line in text.splitlines())
    assert "5 queries × 14 examples" in repr(explanation)
    assert "prediction" in str(everything)


def test_a_table_of_one_example(tmp_path: Path) -> None:
    problem = CASES["mlp-relu"].build(examples=1, queries=1)
    trajectory = run(problem, tmp_path, batches=[[0], [0]])
    found = kx.explain(trajectory, problem.model, problem.data, problem.queries)
    assert "prediction" in str(found)
    assert found.top(3).proponents.shape == (1, 1)


def test_timeline(explanation: kx.Explanation, everything: kx.Explanation, problem, tmp_path: Path) -> None:
    assert_timeline_agrees(explanation, 1e-11)
    assert_timeline_agrees(everything, 1e-11)
    long = run(CASES["mlp-gelu"].build(), tmp_path / "long", 0.05, batches=order(14, 2, 10), keep="step")
    found = kx.explain(long, problem.model, problem.data, problem.queries)
    assert_timeline_agrees(found, 1e-11)
    assert found.timeline.steps.tolist() == list(range(71))
    assert found.timeline.bins[0] == 0
    assert found.timeline.bins[-1] == 70
    assert bool((found.timeline.bins.diff() > 0).all())


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return a == b


def test_save_and_load(explanation: kx.Explanation, everything: kx.Explanation, tmp_path: Path) -> None:
    for number, kept in enumerate(
        (explanation, everything, explanation.__class__(**{**vars_of(explanation), "path_kernel": None}))
    ):
        path = kept.save(tmp_path / f"{number}.safetensors")
        read = kx.Explanation.load(path)
        for item in dataclasses.fields(kept):
            if item.name not in ("timeline", "dataset"):
                assert same(getattr(kept, item.name), getattr(read, item.name)), item.name
        for item in dataclasses.fields(kept.timeline):
            a, b = getattr(kept.timeline, item.name), getattr(read.timeline, item.name)
            if isinstance(a, dict):
                assert a.keys() == b.keys()
                assert all(same(a[key], b[key]) for key in a)
            else:
                assert same(a, b), item.name
        assert str(kx.Explanation.load(path, kept.dataset)) == str(kept)
    assert not list(tmp_path.glob(".*"))


def test_a_file_from_before_there_were_penalties(explanation: kx.Explanation, tmp_path: Path) -> None:
    path = explanation.save(tmp_path / "old.safetensors")
    with safe_open(path, "pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys() if "penalty" not in name}  # noqa: SIM118
        about = file.metadata()
    assert len(kept) > 0
    save_file(kept, path, about)
    read = kx.Explanation.load(path, explanation.dataset)
    assert not read.penalty.any()
    assert str(read) == str(explanation)


def vars_of(explanation: kx.Explanation) -> dict[str, object]:
    return {item.name: getattr(explanation, item.name) for item in dataclasses.fields(explanation)}


def test_files_that_are_no_explanation(explanation: kx.Explanation, tmp_path: Path) -> None:
    good = explanation.save(tmp_path / "good").read_bytes()
    bad = {
        "empty": b"",
        "text": b"hello, this is no explanation at all",
        "cut": good[: len(good) // 2],
        "header cut": good[:20],
        "garbled header": good[:9] + b"\xff" * 50 + good[59:],
        "pickle": b"\x80\x04\x95\x00\x00\x00\x00",
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(kx.TrajectoryError):
            kx.Explanation.load(tmp_path / name)
    with pytest.raises(kx.TrajectoryError):
        kx.Explanation.load(tmp_path / "missing")
    with pytest.raises(kx.TrajectoryError):
        kx.Explanation.load(tmp_path)
    with pytest.raises(kx.TrajectoryError):
        explanation.save(tmp_path / "no folder" / "file")


def test_a_folder_is_no_file_to_save_to(explanation: kx.Explanation, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(kx.TrajectoryError, match="is a folder"):
        explanation.save(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir() if "folder" in path.name] == ["folder"]


def test_a_failed_save_leaves_nothing(
    explanation: kx.Explanation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = set(tmp_path.iterdir())
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(kx.TrajectoryError, match="No space left"):
        explanation.save(tmp_path / "file")
    assert set(tmp_path.iterdir()) == before


def test_what_is_rounding_is_printed_with_the_remainder(explanation: kx.Explanation) -> None:
    tiny, large = (
        dataclasses.replace(explanation, unattributed=torch.full((5,), amount), remainder=torch.zeros(5))
        for amount in (1e-8, 0.1)
    )
    assert "unattributed" not in tiny.bill()
    assert re.search(r"remainder \(rounding\) +│ \+1\.0e-08", tiny.bill())
    assert re.search(r"unattributed +│ +\+0\.1000", large.bill())


def test_foreign_but_well_formed_files(explanation: kx.Explanation, tmp_path: Path) -> None:
    """Safetensors files of the right format name whose contents are wrong: an error of ours, not a crash later."""
    good = explanation.save(tmp_path / "good")
    with safe_open(good, "pt") as file:
        about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    wrong: dict[str, tuple[dict, dict]] = {
        "other format": (tensors, {**about, "format": "another"}),
        "no format": (tensors, {}),
        "a line missing": ({k: v for k, v in tensors.items() if k != "buffers"}, about),
        "no facts": (tensors, {"format": about["format"]}),
        "facts no json": (tensors, {**about, "facts": "{"}),
        "facts no dict": (tensors, {**about, "facts": json.dumps([1])}),
        "shapes disagree": ({**tensors, "baseline": tensors["baseline"][:2]}, about),
        "another type": ({**tensors, "contributions": tensors["contributions"].long()}, about),
        "examples outside": ({**tensors, "timeline.examples": tensors["timeline.examples"] + 14}, about),
        "borders missing": ({**tensors, "timeline.steps": tensors["timeline.steps"][1:]}, about),
        "too few labels": ({**tensors, "labels": tensors["labels"][1:]}, about),
        "totals missing": ({k: v for k, v in tensors.items() if not k.startswith("totals.")}, about),
    }
    for name, (content, metadata) in wrong.items():
        path = tmp_path / f"{name}.safetensors"
        save_file({k: v.contiguous() for k, v in content.items()}, path, metadata)
        with pytest.raises(kx.TrajectoryError):
            kx.Explanation.load(path)


def test_data_frame(explanation: kx.Explanation, everything: kx.Explanation) -> None:
    frame = explanation.to_pandas(2)
    assert list(frame.columns) == ["example", "contribution", "kernel", "alpha"]
    assert frame["example"].tolist() == list(range(14))
    assert torch.equal(torch.tensor(frame["contribution"].to_numpy()), explanation.contributions[2])
    whole = everything.to_pandas(1)
    column = int(everything.prediction[1].argmax())
    assert torch.equal(torch.tensor(whole["contribution"].to_numpy()), everything.contributions[1, :, column])
    with pytest.raises(kx.ArgumentError):
        explanation.to_pandas(5)


def test_all_outputs(everything: kx.Explanation) -> None:
    with pytest.raises(kx.ArgumentError, match="of_output"):
        everything.top(2)
    with pytest.raises(kx.ArgumentError):
        everything.of_output(3)
    one = everything.of_output(-1)
    assert one.output.tolist() == [2] * 5
    assert_timeline_agrees(one, 1e-11)
    for name in LINES:
        assert getattr(one, name).shape == (5,)
    with pytest.raises(kx.ArgumentError):
        one.of_output(0)


def test_no_such_query(explanation: kx.Explanation) -> None:
    assert len(explanation) == 5
    for wrong in (5, -6):
        with pytest.raises(kx.ArgumentError):
            explanation.table(wrong)

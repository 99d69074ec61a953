from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kxexplain.errors import TrajectoryError
from kxexplain.trajectory import (
    Fingerprint,
    GroupRecord,
    Manifest,
    ModelSignature,
    OptimizerRecord,
    StepRecord,
    TensorRecord,
)

names = st.text(max_size=8)
counts = st.integers(0, 2**40)
plain = st.one_of(st.none(), st.booleans(), counts, st.floats(allow_nan=False), names, st.lists(counts, max_size=2))
tables = st.dictionaries(names, plain, max_size=3)
tensors = st.lists(st.tuples(names, st.lists(counts, max_size=3).map(tuple), names, st.booleans()), max_size=3)
members = st.lists(names, max_size=2).map(tuple)
# Plain values, put into records by the test: run-time type checks draw random numbers.
parts = st.fixed_dictionaries(
    {
        "model": st.tuples(names, tensors, tensors, members),
        "dataset": st.tuples(counts, names, names, st.booleans()),
        "optimizer": st.tuples(names, st.lists(st.tuples(members, tables), max_size=2)),
        "loss": names,
        "reduction": st.sampled_from(["mean", "sum"]),
        "seed": st.none() | counts,
        "keep": names,
        "versions": st.dictionaries(names, names, max_size=2),
        "device": names,
        "threads": counts,
        "settings": tables,
    }
)


def manifest_of(values):
    name, parameters, buffers, training = values["model"]
    kind, groups = values["optimizer"]
    signature = ModelSignature(
        name,
        tuple(TensorRecord(*row) for row in parameters),
        tuple(TensorRecord(*row) for row in buffers),
        training,
    )
    optimizer = OptimizerRecord(kind, tuple(GroupRecord(*group) for group in groups))
    dataset = Fingerprint(*values["dataset"])
    return Manifest(**{**values, "model": signature, "optimizer": optimizer, "dataset": dataset})


EXAMPLE = Manifest(
    model=ModelSignature("Net", (TensorRecord("w", (2, 3), "float32", True),), (), ("",)),
    dataset=Fingerprint(4, "aa", "bb"),
    optimizer=OptimizerRecord("SGD", (GroupRecord(("w",), {"lr": 0.1}),)),
    loss="mse",
    reduction="mean",
    seed=None,
    keep="epoch",
    versions={"torch": "2"},
    device="cpu",
    threads=2,
)


@given(parts)
def test_manifest_round_trip(values):
    manifest = manifest_of(values)
    assert Manifest.from_json(manifest.to_json()) == manifest


def paths(value, path=()):
    """The place of every value inside nested JSON."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        if key not in ("settings", "options", "versions"):
            yield from paths(inner, (*path, key))


def edited(path, change):
    values = json.loads(EXAMPLE.to_json())
    place = values
    for key in path[:-1]:
        place = place[key]
    change(place, path[-1])
    return json.dumps(values)


def delete(place, key):
    del place[key]


@pytest.mark.parametrize("path", list(paths(json.loads(EXAMPLE.to_json()))), ids=str)
def test_hand_edited_manifests_are_refused(path):
    for wrong in (1.5, {"a": 1}, None, ["x"], True):
        if wrong is None and path == ("seed",):
            continue
        if wrong is True and (path == ("logged",) or (path[-1] == 3 and path[0] == "model")):
            continue
        if wrong == ["x"] and path[-1] in ("training", "names"):
            continue
        if wrong is True and path[-1] == "random":
            continue
        text = edited(path, lambda place, key, wrong=wrong: place.__setitem__(key, wrong))
        with pytest.raises(TrajectoryError, match=r"manifest\.json"):
            Manifest.from_json(text)
    if path == ("logged",):  # a manifest from before checkpoints could be imported
        assert Manifest.from_json(edited(path, delete)).logged is True
    elif isinstance(path[-1], str) and path[-1] != "random":
        with pytest.raises(TrajectoryError, match=str(path[-1])):
            Manifest.from_json(edited(path, delete))


def test_manifests_from_before_random_datasets():
    assert Manifest.from_json(edited(("dataset", "random"), delete)) == EXAMPLE


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", "{", '{"format": "other"}', "[" * 100_000])
def test_other_json_is_refused(text):
    with pytest.raises(TrajectoryError):
        Manifest.from_json(text)


def test_a_later_format_is_refused():
    with pytest.raises(TrajectoryError, match=r"format 2.*update"):
        Manifest.from_json(edited(("format_version",), lambda place, key: place.__setitem__(key, 2)))


def test_steps_compare_by_value():
    one, two = (StepRecord(0, 0, (0.1,), np.array([1, 2]), math.nan, 1.0) for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)
    assert one != StepRecord(0, 0, (0.1,), np.array([2, 1]), math.nan, 1.0)

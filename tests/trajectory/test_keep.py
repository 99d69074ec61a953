from __future__ import annotations

import pytest

from kxexplain.errors import ArgumentError
from kxexplain.trajectory.keep import Keep, parse


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("step", Keep("steps")),
        (7, Keep("steps", stride=7)),
        ("epoch", Keep("epoch")),
        ("200MB", Keep("budget", budget=200_000_000)),
        ("1.5 GiB", Keep("budget", budget=3 << 29)),
        ("64 kb", Keep("budget", budget=64_000)),
    ],
)
def test_parse(given, expected):
    assert parse(given) == expected


@pytest.mark.parametrize("given", ["", "epochs", "MB", "0MB", "-1MB", "10 PB", 0, -3, "5"])
def test_unknown_keep_is_refused(given):
    with pytest.raises(ArgumentError, match="expected 'step', 'epoch'"):
        parse(given)


def test_wants():
    assert [s for s in range(7) if parse(3).wants(s, epoch_ended=False)] == [0, 3, 6]
    assert parse("epoch").wants(5, epoch_ended=True)
    assert not parse("epoch").wants(5, epoch_ended=False)

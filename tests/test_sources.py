"""What the package's sources must not contain: other ways to per-example gradients, and loose ends."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "kxexplain"

FORBIDDEN = {
    # Per-example gradients come from layer structure, hooks and ordinary autograd.
    "functorch": r"functorch",
    "torch.func": r"\btorch\.func\b|from torch import [^\n]*\bfunc\b",
    "vmap": r"\bvmap\b",
    # Opening a file from a stranger runs no code.
    "pickle": r"(?i)pickle(?!=False)",
    "weights_only=False": r"weights_only\s*=\s*False",
    # What is unfinished is an issue, not a comment.
    "TODO": r"\b(TODO|FIXME)\b",
}


def found(pattern: str, text: str) -> list[int]:
    """Numbers of the lines in which the pattern begins."""
    return [text.count("\n", 0, match.start()) + 1 for match in re.finditer(pattern, text)]


@pytest.mark.parametrize("word", FORBIDDEN)
def test_the_package_does_not_mention(word: str) -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert files
    hits = [
        f"{path.relative_to(PACKAGE.parent)}:{line}"
        for path in files
        for line in found(FORBIDDEN[word], path.read_text(encoding="utf-8"))
    ]
    assert not hits, f"{word} is mentioned at {', '.join(hits)}"


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("functorch", "import functorch"),
        ("torch.func", "a\nx = torch.func.jacrev(f)"),
        ("torch.func", "from torch import nn, func"),
        ("vmap", "torch.vmap(f)"),
        ("pickle", "import cPickle"),
        ("weights_only=False", "torch.load(path, weights_only = False)"),
        ("TODO", "# FIXME: later"),
    ],
)
def test_a_mention_would_be_found(word: str, text: str) -> None:
    assert found(FORBIDDEN[word], text) == [text.count("\n") + 1]


def test_ordinary_names_are_left_alone() -> None:
    text = "torch.functional.norm(x); torch.nn.functional.relu(x); def __torch_function__(func): ..."
    assert not any(found(pattern, text) for pattern in FORBIDDEN.values())

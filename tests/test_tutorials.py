"""The tutorials run, say only what they check, and are committed without outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}

ALWAYS = ("01", "04", "06")
"""Tutorials that run with every test run; the others take longer, and run with ``make slow``."""

each_notebook = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)


def read(file: Path) -> Any:
    return nbformat.read(file, as_version=nbformat.NO_CONVERT)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def sections(notebook: Any) -> dict[str, list[Any]]:
    """Cells by numbered section: from a heading such as "## 3. Explain" to the next heading of that level."""
    found: dict[str, list[Any]] = {}
    heading = ""
    for cell in notebook.cells:
        first = cell.source.partition("\n")[0]
        if cell.cell_type == "markdown" and first.startswith("## "):
            heading = first.removeprefix("## ")
        if heading[:1].isdigit():
            found.setdefault(heading, []).append(cell)
    return found


def test_there_are_tutorials() -> None:
    assert NOTEBOOKS


@each_notebook
def test_is_committed_without_outputs(file: Path) -> None:
    notebook = read(file)
    nbformat.validate(notebook)  # cell ids included, from format 4.5 on
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata == METADATA
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    assert [cell.id for cell in notebook.cells if cell.metadata] == []
    assert [cell.id for cell in code_cells(notebook) if cell.outputs or cell.execution_count is not None] == []


@each_notebook
def test_every_section_ends_with_a_checked_claim(file: Path) -> None:
    found = sections(read(file))
    assert found
    for heading, cells in found.items():
        words, check = cells[-2:]
        assert words.cell_type == "markdown", heading
        assert "**Claim.**" in words.source, heading
        assert check.cell_type == "code", heading
        assert "assert " in check.source, heading


@pytest.mark.parametrize(
    "file",
    [pytest.param(f, marks=[] if f.stem[:2] in ALWAYS else pytest.mark.slow, id=f.stem) for f in NOTEBOOKS],
)
def test_runs(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    work = tmp_path / "work"
    work.mkdir()
    notebook = read(file)
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(work)}}).execute()
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert list(work.iterdir()) == []  # what a notebook writes, it writes to a temporary folder of its own

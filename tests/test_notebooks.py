"""The notebooks run from a clean kernel (slow), and the committed ones have been run."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Paths of a machine or a user, and warnings.
UNWANTED = re.compile(r"/home/|/root/|/Users/|/tmp/|/var/|/opt/|site-packages|[A-Z]:\\|Warning|WARNING|Traceback")
MOST_BYTES = 1_000_000


def code_cells(path: Path) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def texts(cells: list) -> str:
    """All text in the outputs."""
    outputs = [output for cell in cells for output in cell.outputs]
    data = [text for output in outputs for kind, text in output.get("data", {}).items() if "image" not in kind]
    return "\n".join([output.get("text", "") for output in outputs] + [str(text) for text in data])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebooks_were_run_in_order_without_errors(path: Path) -> None:
    nbformat.validate(nbformat.read(path, as_version=4))
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs), "no picture"
    assert texts(cells) and not UNWANTED.search(texts(cells))
    assert path.stat().st_size < MOST_BYTES


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_from_a_clean_kernel(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient")
    # The kernel starts in the folder of the notebook; it must import this checkout.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep))
    notebook = nbformat.read(path, as_version=4)
    num_cells = sum(cell.cell_type == "code" for cell in notebook.cells)
    client = nbclient.NotebookClient(notebook, timeout=400, resources={"metadata": {"path": str(path.parent)}})
    client.execute()
    assert client.code_cells_executed == num_cells
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]

"""The notebook runs from top to bottom, shortened, and is committed without what it printed."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"


@pytest.mark.slow
def test_it_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source = f"teaching_steps, training_steps = 10, 3\nfolder = {str(tmp_path)!r}"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    table = next(cell for cell in notebook.cells if "pass_at_k(" in cell.source).outputs[-1]["data"]["text/plain"]
    assert all(name in table for name in ("base", "grpo", "e3", "pass@64"))
    assert any("image/png" in output.get("data", {}) for output in notebook.cells[-2].outputs)


def test_it_has_no_outputs():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)

"""The notebooks run from top to bottom, shortened, and are committed without what they printed."""

import gc
import json
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from conftest import save_tiny_model
from transformers import PreTrainedModel

from e3_trl import math_accuracy_reward


ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def run(name: str, parameters: str) -> Iterator[tuple[str, dict]]:
    """Cell by cell its source, and what there is after it. Run here: a kernel would import everything once more."""
    left = {}
    for cell in nbformat.read(ROOT / "notebooks" / name, as_version=4).cells:
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "code" and "install" not in tags:
            exec(parameters if "parameters" in tags else cell.source, left)
            yield cell.source, left


@pytest.mark.slow
def test_the_quickstart_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    parameters = f"teaching_steps, training_steps = 10, 3\nfolder = {str(tmp_path)!r}"
    *_, (_, left) = run("quickstart.ipynb", parameters)
    assert {name: [*scores] for name, scores in left["table"].items()} == {
        name: ["pass@1", "pass@4", "pass@16", "pass@64"] for name in ("base", "grpo", "e3", "best")
    }
    assert (tmp_path / "figures" / "entropy.png").is_file()


@pytest.mark.slow
def test_the_notebook_for_a_gpu_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"say {number}", "answer": f"So <<1+1=2>>\n#### {number:,}"} for number in range(1000, 1016)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = {id(it) for it in gc.get_objects() if isinstance(it, PreTrainedModel)}
    parameters = {
        "model": save_tiny_model(tmp_path / "model"),
        "data": {"path": "json", "data_files": {"train": "problems.jsonl", "test": "problems.jsonl"}},
        "folder": "outputs",
        "num_train": 16,
        "num_test": 2,
        "num_passes": 2,
        "max_completion_length": 4,
    }
    for step in run("gsm8k.ipynb", "\n".join(f"{name} = {value!r}" for name, value in parameters.items())):
        source, left = step
        if source.startswith("train("):
            models = [it for it in gc.get_objects() if isinstance(it, PreTrainedModel) and id(it) not in before]
            assert models == [], "The trainer of a run is still in memory when the next one begins."
    assert math_accuracy_reward([r"So \boxed{1{,}000}", r"\boxed{1}"], solution=["1000", "1000"]) == [1.0, 0.0]
    assert sorted(left["train_problems"]["solution"]) == [str(number) for number in range(1000, 1016)]
    assert [*left["table"]] == ["base", "grpo", "e3"]
    assert (tmp_path / "outputs" / "figures" / "entropy.png").is_file()
    page = (tmp_path / "outputs" / "report.html").read_text()
    assert "rollout_allocation" in page
    assert "uniform" in page


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_it_has_no_outputs(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)

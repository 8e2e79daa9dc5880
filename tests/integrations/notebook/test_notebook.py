"""The notebook of examples/ from top to bottom, in the interpreter."""

import json
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[3] / "examples" / "flash_attention_on_a_t4.ipynb"


@pytest.mark.sample
def test_it_runs_and_draws(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # Jupyter and matplotlib write there
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    copy = Path(shutil.copy(NOTEBOOK, tmp_path))
    notebook = nbformat.read(copy, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.get("text", "") for output in outputs)
    assert "largest difference from float64" in text
    assert "transformers: " in text and "diffusers: " in text
    assert len([o for o in outputs if "image/png" in o.get("data", {})]) == 5  # speed, loss, and three of the report


def test_it_is_committed_without_outputs():
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        assert not cell.get("outputs"), cell["id"]
        assert cell.get("execution_count") is None, cell["id"]

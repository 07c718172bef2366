"""experiments/quickstart.ipynb, executed as a person would (slow)."""

import os
import pathlib

import nbclient
import nbformat
import pytest

NOTEBOOK = pathlib.Path(__file__).resolve().parent.parent / "experiments" / "quickstart.ipynb"


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_the_notebook_runs_from_install_to_pictures(tmp_path, monkeypatch):
    """With fewer steps, in a kernel of its own; every picture and sample comes out."""
    monkeypatch.setenv("XLA_FLAGS", "")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    parameters.source = f"STEPS = 20\nWORKDIR = {os.fspath(tmp_path / 'run')!r}"
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2
    said = "".join(output.text for output in outputs if output.get("name") == "stdout")
    for wanted in ("2,903,808 parameters", "20 steps", "before", "after", "--- 'KING HENRY'"):
        assert wanted in said
    assert (tmp_path / "run" / "dsjax.json").is_file()


def test_the_notebook_is_committed_without_outputs():
    """What it shows is made by whoever runs it."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None

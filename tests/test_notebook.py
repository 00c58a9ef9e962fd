"""The notebook runs from top to bottom, and what it shows on GitHub is what it printed.

``jupyter execute --inplace examples/quickstart.ipynb`` renews what it shows.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from runs import environment

NOTEBOOK = Path(__file__).parent.parent / "examples" / "quickstart.ipynb"


def printed(notebook: nbformat.NotebookNode) -> list[str]:
    """What each code cell wrote."""
    return [
        "".join(output.get("text", "") for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def assert_complete(notebook: nbformat.NotebookNode) -> None:
    """Digits were converted, trained on and recognized; a command that fails inside a cell stops nothing by itself."""
    text = printed(notebook)
    assert "quickstart/shards is complete: 1,437 train images" in text[1]
    assert "fit to train on: 0 errors, 0 warnings" in text[2]
    assert "torch.Size([16, 3, 48, 48]) torch.float32" in text[3]
    assert float(re.findall(r"top-1 (\d+\.\d) %", text[5])[-1]) > 85  # 91 was seen
    assert int(re.findall(r"for (\d+)% of them", text[7])[0]) > 80
    kinds = [output.output_type for cell in notebook.cells for output in cell.get("outputs", [])]
    assert "error" not in kinds
    assert kinds.count("display_data") == 2  # the batch, the predictions


def test_what_is_shown_was_printed_by_it() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert_complete(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    everything = NOTEBOOK.read_text()
    assert not re.search(r'[\s"(]/(home|tmp|work|root|usr)/', everything)  # whoever ran it
    assert len(everything) < 200_000


@pytest.mark.slow
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "bin" / "vimfast"  # this checkout's, whatever is installed
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m vimfast "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(command.parent), prepend=os.pathsep)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    assert_complete(notebook)

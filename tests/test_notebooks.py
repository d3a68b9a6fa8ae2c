"""The notebooks of docs/ run from the first cell to the last, and are kept with what they give.

``pytest -m slow tests/test_notebooks.py --renew`` runs them as they stand, for some minutes each, and keeps that.
"""

import base64
import io
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from PIL import Image

FOLDER = Path(__file__).parent.parent / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SMALL = {  # what the test puts in the place of the parameters
    "clip_geometry": "NUM_PAIRS = 512\nEPOCHS = 1",
    "mcl_step_by_step": "RENDERS = 1\nSTEPS = 8\nSTAGES = 2\nCLUSTERS = 4",
    "search_by_text": "OVERRIDES = ['smoke=true', 'backbone.name=test_resnet']",
    "swav_on_a_folder": "NUM_PICTURES = 200\nEPOCHS = 2",
}
PICTURES = {"clip_geometry": 1, "mcl_step_by_step": 4, "search_by_text": 2, "swav_on_a_folder": 2}  # that are drawn


def test_notebooks_have_outputs_and_are_short_and_explained() -> None:
    assert {path.stem for path in NOTEBOOKS} == set(SMALL)
    for path in NOTEBOOKS:
        cells = nbformat.read(path, as_version=4).cells
        given = [output for cell in cells for output in cell.get("outputs", [])]
        assert sum("image/png" in output.get("data", {}) for output in given) == PICTURES[path.stem]
        assert all(map(is_told, given))
        assert all(cell.execution_count for cell in cells if cell.cell_type == "code")
        text = path.read_text()
        assert len(text) < 1_000_000
        assert not re.search(r"site-packages|/tmp/|/home/|/root/", text)
        words = sum(len(cell.source.split()) for cell in cells)
        assert words < 1500, f"{path.name} takes longer than five minutes to read: {words} words"
        assert cells[0].cell_type == cells[-1].cell_type == "markdown"
        assert sum("parameters" in cell.metadata.get("tags", []) for cell in cells) == 1
        lines = [line for cell in cells if cell.cell_type == "code" for line in cell.source.splitlines()]
        assert max(map(len, lines)) <= 120
        assert not any(line.startswith("import repr") for line in lines)  # it would hide the builtin


def is_told(output: Any) -> bool:
    """Whether it is what a cell prints, gives or draws; not a progress bar, a warning or an error."""
    printed = output.output_type == "stream" and output.name == "stdout"
    return printed or output.output_type == "execute_result" or "image/png" in output.get("data", {})


def with_small_picture(output: Any) -> Any:
    """The same with 256 colours, if it is a picture."""
    if "image/png" in output.get("data", {}):
        picture = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).convert("RGB").quantize(256)
        file = io.BytesIO()
        picture.save(file, "PNG", optimize=True)
        output.data["image/png"] = base64.b64encode(file.getvalue()).decode()
    return output


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """In a kernel of its own, in an empty folder, without network; with smaller numbers."""
    nbclient = pytest.importorskip("nbclient", reason="pip install -e '.[dev]' brings what executes notebooks")
    notebook = nbformat.read(path, as_version=4)
    place = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    renew = request.config.getoption("--renew")
    if not renew:
        notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(SMALL[path.stem]))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    client = nbclient.NotebookClient(
        notebook, timeout=3600 if renew else 600, record_timing=False, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == PICTURES[path.stem]
    errors = [output.text for output in outputs if output.get("name") == "stderr" and "Error" in output.text]
    assert not errors
    if renew:
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = [with_small_picture(output) for output in cell.outputs if is_told(output)]
        nbformat.write(notebook, path)

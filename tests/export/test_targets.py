"""The target of CONTRIBUTING.md, added as it says: written, verified elsewhere, replaced, refused where it is wrong."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from repr.config import ConfigError
from repr.export import folders
from tests.export.conftest import trained

ROOT = Path(__file__).parents[2]
IMPORTS = "import json\n\nimport torch\n\nfrom repr.export.target import Target, our_answers\n\n\n"


def as_module(source: str, folder: Path) -> ModuleType:
    path = folder / "program.py"
    path.write_text(IMPORTS + source)
    spec = importlib.util.spec_from_file_location("program", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_target_is_one_file_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## Add an export target")[1]
    source = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    monkeypatch.setitem(folders.TARGETS, "torch", as_module(source, tmp_path).TARGET)
    model, out = trained("simclr"), tmp_path / "out"
    folders.export(model, out, to="torch")
    assert {path.name for path in out.iterdir()} == {"backbone.pt2", "transform.json", "written.json"}
    with pytest.raises(ConfigError, match=r"exists; choose another, or set force=true"):
        folders.export(model, out, to="torch")
    folders.export(model, out, to="torch", force=True)
    with pytest.raises(ConfigError, match="set it to open_clip, timm, hf, onnx or torch"):
        folders.export(model, out, to="tensorflow")
    with pytest.raises(ConfigError, match="to=torch is for one model"):
        folders.export({"stage-0": model}, tmp_path / "stages", to="torch")
    wrong = as_module(
        source.replace('v2.CenterCrop(told["size"])', 'v2.CenterCrop(told["size"]), v2.Grayscale(3)'), tmp_path
    )
    monkeypatch.setitem(folders.TARGETS, "torch", wrong.TARGET)
    with pytest.raises(ValueError, match=r"torch loads .* but its pixels differs from ours"):
        folders.export(model, tmp_path / "new", to="torch")
    assert not (tmp_path / "new").exists()

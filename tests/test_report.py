"""The page of a run: complete, from the files of the run folder alone, and without the network."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from repr.config import compose
from repr.fit import fit
from repr.report.__main__ import main
from repr.report.run import POINTS, Run

TINY = [
    "smoke=true", "objective=clip", "embed_dim=16", "text.width=32", "text.layers=1", "backbone.name=test_resnet",
    "trainer.max_epochs=2", "trainer.limit_val_batches=1.0",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a run")
    fit(compose([*TINY, f"run_folder={folder}"]))
    return folder


class Page(HTMLParser):
    """Text of the cells and headings, and whatever a browser would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())


def test_every_run_ends_with_a_page_that_loads_nothing(folder: Path) -> None:
    page = Page((folder / "report.html").read_text())
    assert page.loads
    assert all(link.startswith("data:") for link in page.loads)
    assert {"demo", "Losses", "train/contrast", "Evaluation over time", "views", "i2t_R@5", "test_style"} <= {
        *page.words
    }
    run = Run(folder)
    assert run.curve("train/contrast.chance") == (run.curve("train/contrast")[0], [pytest.approx(math.log(8))] * 4)
    assert run.curve("train/loss.chance")[1] == run.curve("train/contrast.chance")[1]  # its weight is 1
    results = run.results
    assert f"{results['val/i2t_R@5']['value']:.3f}" in page.words
    assert f"{results['val/i2t_R@5']['chance']:.4f}" in page.words


def test_the_views_are_drawn(folder: Path) -> None:
    picture = Image.open(folder / "pictures" / "views.png")
    assert picture.size == (8 * 164 + 4, 168)  # eight samples of the batch, one view each
    assert len(picture.getcolors(1 << 24) or ()) > 1000


def test_several_runs_stand_side_by_side(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "both.html"
    main([str(folder), str(folder), "--out", str(out)])
    assert capsys.readouterr().out.strip() == str(out)
    text = out.read_text()
    single = (folder / "report.html").read_text()
    assert text.count('"mode":') == 2 * single.count('"mode":')
    assert len(re.findall(r"<td>[-\d.]+</td>", text)) == 2 * len(re.findall(r"<td>[-\d.]+</td>", single))


def test_long_curves_are_averaged(tmp_path: Path) -> None:
    num = 5 * POINTS - 1
    values = torch.arange(num).double()
    (tmp_path / "metrics.csv").write_text("step,train/loss\n" + "".join(f"{i},{v}\n" for i, v in enumerate(values)))
    steps, means = Run(tmp_path).curve("train/loss")
    assert len(steps) == POINTS
    assert steps[-1] == num - 1
    assert means[:2] == [2.0, 7.0]


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="is not a run folder"):
        main([str(tmp_path)])
    assert not list(tmp_path.iterdir())

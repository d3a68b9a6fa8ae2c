"""The page of a run: complete, from the files of the run folder alone, and without the network."""

import html
import io
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from repr.config import compose
from repr.data.sources.emoji import Emoji
from repr.data.sources.folder import Folder
from repr.data.sources.numeric_tables import NumericTables
from repr.fit import fit
from repr.metrics.exhibits import exhibits
from repr.metrics.features import Features
from repr.report import charts, gallery, tables
from repr.report.__main__ import main
from repr.report.exhibits import load_exhibits, save_clusters_shown, save_exhibits
from repr.report.gallery import embed_json
from repr.report.projector import add_projector
from repr.report.run import COLOURS, POINTS, Run, Sheets
from repr.runs.folder import load_facts, save_facts

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
    assert all(link.startswith(("data:", "#")) for link in page.loads)
    assert {"clip-emoji", "Losses", "contrast", "Evaluation over time", "views", "i2t_R@5", "test_style"} <= {
        *page.words
    }
    run = Run(folder)
    assert [*run.exhibits][:2] == ["test_style", "val"]  # the results begin with the latter, the headline does not
    assert run.curve("train/contrast.chance") == (run.curve("train/contrast")[0], [pytest.approx(math.log(8))] * 4)
    assert run.curve("train/loss.chance")[1] == run.curve("train/contrast.chance")[1]  # its weight is 1
    assert f"{run.results['val/i2t_R@5']['value']:.3f}" in page.words
    assert f"{run.results['val/i2t_R@5']['chance']:.4f}" in page.words
    assert (folder / "report.html").stat().st_size < 8e6


def test_a_run_says_what_each_of_its_numbers_means(folder: Path) -> None:
    run, meanings = Run(folder), load_facts(folder)["meanings"]
    logged = {name for row in run.rows for name in row if not name.endswith(".chance")} - {"step", "epoch"}
    assert sorted((logged | run.results.keys()) - {name for name, sentence in meanings.items() if sentence}) == []


def test_the_views_are_drawn(folder: Path) -> None:
    picture = Image.open(folder / "pictures" / "views.png")
    assert picture.size == (8 * 164 + 4, 168)  # eight samples of the batch, one view each
    assert len(picture.getcolors(1 << 24) or ()) > 1000


@pytest.fixture(scope="module")
def both(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the run and of a copy whose learning rate was another."""
    other = shutil.copytree(folder, tmp_path_factory.mktemp("other") / "run")
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(re.sub(r"^  lr: .*$", "  lr: 0.123", config, flags=re.MULTILINE))
    out = other.parent / "both.html"
    main([str(folder), str(other), "--out", str(out)])
    return out


def test_several_runs_stand_side_by_side(folder: Path, both: Path) -> None:
    text, single = both.read_text(), (folder / "report.html").read_text()
    num_curves, num_bars = single.count(f'"color":"{COLOURS[0]}"'), single.count('<div class="bar')
    assert num_curves > 7
    assert num_bars > 9
    assert [text.count(f'"color":"{colour}"') for colour in COLOURS[:3]] == [num_curves, num_curves, 0]
    assert text.count('<div class="bar') == 2 * num_bars
    differences = text.partition('<section id="differences">')[2].partition("</section>")[0]
    assert re.findall(r"<code>(.*?)</code>", differences) == ["optim.lr"]
    assert "0.123" in differences
    assert len(text) < 1.2 * len(single)  # equal pictures are there once


def test_two_points_are_a_row_of_a_table_beside_what_they_mean(folder: Path) -> None:
    progress = (folder / "report.html").read_text().partition('<section id="progress">')[2].partition("</section>")[0]
    steps, values = Run(folder).curve("val/t2i_R@5")
    assert steps == [1, 3]
    first, last = (f"<span>{y:.5g}</span> <small>step {x}</small>" for x, y in zip(steps, values, strict=True))
    assert f'<tr><td>t2i_R@5</td><td data-head="first">{first}</td><td data-head="last">{last}</td>' in progress
    assert "js-plotly" not in progress
    words = Page((folder / "report.html").read_text()).words
    assert words.count("Share of captions with a picture of theirs among their 5 nearest; higher is better.") == 2


def test_the_head_says_how_long_where_and_with_what(folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(folder, tmp_path / "run")
    save_facts({"seconds": 4000, "device": "<b>H100", "processes": 8, "versions": {"torch": 2}}, run)
    (row,) = (part for part in tables.header([Run(run)]) if "facts" in part)
    for name, value in (("time", "1 h 6 min"), ("device", "8 x &lt;b&gt;H100"), ("versions", "torch 2")):
        assert f"<li><span>{name}</span>{value}</li>" in row
    save_facts({"meanings": {"val/t2i_R@5": "</div><script>"}}, run)
    assert "".join(tables.evaluation([Run(run)])).count("&lt;/div&gt;&lt;script&gt;") == 1
    (run / "facts.json").unlink()  # as of older versions
    main([str(run)])
    assert "<span>time</span>" not in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.25, "0.2 s"), (61.9, "1 min 1 s"), (7199, "1 h 59 min"), (90000, "1 d 1 h")]
)
def test_a_time_has_two_units(seconds: float, words: str) -> None:
    assert tables.duration(seconds) == words


def test_the_rank_is_of_at_most_what_the_samples_allow(folder: Path) -> None:
    run = Run(folder)
    dim, num = len(run.exhibits["val"]["spectrum/trunk"]), len(Emoji(split="val"))
    text = "".join(charts.spectra([run]))
    assert f"</b> of at most {min(dim, num - 1)}<" in text


def test_clusters_are_rows_of_pictures(tmp_path: Path) -> None:
    """Of nine clusters of 1 to 9 pictures, six from the largest to the smallest, at most eight pictures of each."""
    ids = np.repeat(np.arange(9), np.arange(1, 10))
    for row in range(len(ids) + 2):
        Image.new("RGB", (8, 8), (5 * row, 0, 0)).save(tmp_path / f"{row:02}.png")
        (tmp_path / f"{row:02}.txt").write_text(f"<i>{row}")
    source = Folder(tmp_path, captions=True)
    save_clusters_shown(tmp_path / "run", np.append(ids, [-1, -1]), source)
    arrays = load_exhibits(tmp_path / "run")["bank"]
    assert arrays["clusters/size"].tolist() == [9, 8, 6, 5, 3, 1]
    assert (arrays["clusters/rows"] >= 0).sum(1).tolist() == [8, 8, 6, 5, 3, 1]
    assert [{*ids[rows[rows >= 0]]} for rows in arrays["clusters/rows"]] == [{8}, {7}, {5}, {4}, {2}, {0}]
    sheets = Sheets(10**6)
    page = "".join(gallery.clusters([Run(tmp_path / "run")], sheets))
    assert page.count('class="thumb sheet-0"') == 31
    assert "9 clusters" in page
    assert "<b>9</b> samples" in page
    assert "&lt;i&gt;44" in page
    assert "<i>" not in page


def test_tensorboard_has_config_hyperparameters_histograms_and_embeddings(folder: Path) -> None:
    events = EventAccumulator(str(folder), size_guidance={"histograms": 0})
    events.Reload()
    (text,) = (event.tensor_proto.string_val[0].decode() for event in events.Tensors("config/text_summary"))
    assert "    seed: 0\n" in text
    assert "      lr: 0.005\n" in text
    told = events.PluginTagToContent("hparams")
    start = HParamsPluginData.FromString(told["_hparams_/session_start_info"]).session_start_info.hparams
    assert start["optim.lr"].number_value == 0.005
    assert start["backbone.name"].string_value == "test_resnet"
    assert len(start) < 100
    experiment = HParamsPluginData.FromString(told["_hparams_/experiment"]).experiment
    shown = [info.name.tag for info in experiment.metric_infos]
    assert shown == ["train/loss", "test_style/i2t_R@5", "test_style/t2i_R@5", "val/zero_shot_top1"]
    assert {*shown} <= {*events.Tags()["scalars"]}  # where TensorBoard finds their values
    names = [f"embeddings/{of_set}/{kind}" for of_set in ("val", "test_style") for kind in ("image", "trunk", "text")]
    assert sorted(events.Tags()["histograms"]) == sorted(names)
    for name in names:
        assert [event.step for event in events.Histograms(name)] == [2, 4]
    assert -1 < events.Histograms(names[0])[-1].histogram_value.min < 0
    arrays = load_exhibits(folder)["val"]
    lines = (folder / "00000/val/metadata.tsv").read_text().splitlines()
    assert lines[0].split("\t") == ["caption", "category", "subcategory", "style", "concept"]
    assert [line.split("\t")[0] for line in lines[1:]] == arrays["captions"].tolist()
    points = np.loadtxt(folder / "00000/val/tensors.tsv")
    assert points == pytest.approx(arrays["map/pca"], abs=1e-4)
    with Image.open(folder / "00000/val/sprite.png") as sprite:
        assert sprite.size[0] == sprite.size[1] == 24 * math.ceil(len(points) ** 0.5)
    assert "00000/test_style/tensors.tsv" in (folder / "projector_config.pbtxt").read_text()
    assert sum(path.stat().st_size for path in (folder / "00000/test_style").iterdir()) < 8e5  # of 500 pictures
    assert sum(path.stat().st_size for path in folder.glob("events.out.tfevents.*")) < 2e5


@pytest.mark.parametrize("attributes", [{}, {"a\tb": ["x\ny", "\udcff"]}, {"a": ["x", "y"], "b": ["z", "w"]}])
def test_names_of_any_kind_stay_in_their_cells(tmp_path: Path, attributes: dict[str, list[str]]) -> None:
    arrays = {"rows": np.arange(3), "map/pca": np.eye(3)}
    for name, classes in attributes.items():
        arrays |= {f"labels/{name}": np.array([0, 1, -1]), f"names/{name}": np.array(classes)}
    trainer = pl.Trainer(logger=TensorBoardLogger(tmp_path, name="", version=""), enable_progress_bar=False)
    add_projector(trainer, {"val": arrays})
    lines = (tmp_path / "00000/val/metadata.tsv").read_text().split("\n")[:-1]
    table = [line.split("\t") for line in lines]
    assert len(table) == 3 + (len(attributes) > 1)
    assert {len(line) for line in table} == {max(1, len(attributes))}
    add_projector(trainer, {"test": arrays})
    assert [path.name for path in (tmp_path / "00000").iterdir()] == ["test"]  # the last ones alone


def test_no_caption_ends_the_script_of_the_data_or_opens_one_in_it() -> None:
    """After ``<!--`` and ``<script`` a browser looks for the end of the inner script first."""
    data = {"captions": ["<!-- <script>", "</script>", "a < b"]}
    content = re.fullmatch(r'<script type="application/json" id="data">([^<]*)</script>', embed_json("data", data))
    assert content is not None
    assert json.loads(content[1]) == data


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ASK = """
<script>
const choose = (name, value) => {
  const select = document.getElementById(name);
  select.value = value;
  select.dispatchEvent(new Event("change"));
};
const drawn = (chart, what) => chart.querySelectorAll(what).length;
const charts = (kind) => [...document.querySelectorAll(kind)];
const found = {};
found.curves = charts(".plots .js-plotly-plot").map((chart) => drawn(chart, ".scatterlayer .trace"));
found.layouts = [...document.getElementById("map-layout").options].map((option) => option.value);
choose("map-set", "test_style");
choose("map-attribute", "category");
found.points = charts(".map").map((chart) => drawn(chart, ".point"));
found.classes = [...document.querySelector(".legend").children].map((text) => text.textContent);
choose("map-layout", found.layouts[2]);
found.pairs = charts(".map").map((chart) => drawn(chart, ".point"));
document.querySelector(".map").emit("plotly_hover", { points: [{ customdata: 1 }], event: { clientX: 9, clientY: 9 } });
found.tip = document.getElementById("tip").innerText;
found.matrices = charts(".confusion").map((chart) => drawn(chart, ".hm image"));
found.confused = charts(".confusion").map((chart) => drawn(chart.parentElement, ".pairs li"));
choose("gallery-set", "test_style");
choose("gallery-attribute", "subcategory");
const visible = charts("[data-set]").filter((part) => !part.hidden);
found.sets = visible.map((part) => part.dataset.set);
found.marks = visible.map((part) => [drawn(part, ".right"), drawn(part, ".wrong"), drawn(part, "[data-right]")]);
found.pictures = visible.map((part) => [...part.querySelectorAll(".thumb")].filter(
  (picture) => getComputedStyle(picture).backgroundImage.startsWith("url(") && picture.offsetWidth > 20).length);
found.wide = document.documentElement.scrollWidth;
const cut = (part) => getComputedStyle(part).overflowX === "hidden" && part.scrollWidth > part.clientWidth + 1;
found.cut = charts("body *").filter(cut).map((part) => part.className);
found.scrolled = charts(".numbers").filter((table) => table.offsetWidth > table.parentElement.clientWidth).length;
const style = (kind) => getComputedStyle(document.querySelector(kind));
found.dark = [style("body").backgroundColor, style(".card").backgroundColor, style(".plots text").fill];
found.words = charts(".found.pictures .caption").length;
document.body.innerHTML = `<pre>${JSON.stringify(found).replaceAll("<", "&lt;")}</pre>`;
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")
def test_a_browser_draws_it_without_complaint(both: Path, folder: Path, tmp_path: Path) -> None:
    """Phone-wide; a script at the end of a copy makes choices and tells what is there then."""
    page = tmp_path / "asked.html"
    page.write_text(both.read_text().replace("</body>", ASK + "</body>"))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command += ["--blink-settings=preferredColorScheme=0"]  # dark
    command += [f"--user-data-dir={tmp_path}/profile", "--window-size=500,900", "--virtual-time-budget=10000"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, check=True, timeout=120)
    assert [line for line in done.stderr.splitlines() if ":CONSOLE" in line] == []
    (text,) = re.findall(r"<pre>(.*)</pre>", done.stdout, re.DOTALL)
    found = json.loads(html.unescape(text))
    assert min(found["curves"]) >= 2  # of every curve both runs
    assert 3 in found["curves"]  # and the level at chance
    assert len(found["layouts"]) == 3
    assert found["points"] == [500, 500]
    assert {"flags", "symbols"} <= {*found["classes"]}
    assert found["pairs"] == [1000, 1000]  # pictures and captions
    arrays = load_exhibits(folder)["test_style"]
    assert found["tip"].splitlines()[0] == arrays["captions"][1]
    category = arrays["names/category"][arrays["labels/category"][1]]
    assert f"category: {category}" in found["tip"].splitlines()
    assert found["matrices"] == [1, 1]
    assert min(found["confused"]) > 5
    assert found["sets"] == ["test_style"]
    marked = sum((arrays[f"gallery/{kind}"] == 1).sum() for kind in MARKS)
    total = sum((arrays[f"gallery/{kind}"] >= 0).sum() for kind in MARKS)
    ((right, wrong, by_attribute),) = found["marks"]
    assert (right, wrong) == (2 * marked, 2 * (total - marked))
    assert by_attribute == 2 * 6 * 5
    assert found["pictures"] == [2 * (6 + 6 * 5 + 6 + 6 * 5)]  # captions have none
    assert found["wide"] <= 500
    assert (found["cut"], found["scrolled"]) == ([], 0)
    assert found["dark"] == ["rgb(15, 23, 42)", "rgb(30, 41, 59)", "rgb(148, 163, 184)"]
    assert found["words"] == 2 * 2 * 2 * 6 * 5  # runs, sets, kinds of galleries, queries, pictures that each finds


MARKS = ("image_to_text/right/caption", "text_to_image/right/caption", "image_to_image/right/subcategory")


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


def test_exhibits_of_any_source_are_written(tmp_path: Path) -> None:
    """Numbers without pictures, and pictures of which one is damaged and one has a long caption."""
    (tmp_path / "pictures").mkdir()
    for i in range(12):
        Image.new("RGB", (40 + i, 30), (255, 20 * i, 0)).save(tmp_path / "pictures" / f"{i:02}.png")
        (tmp_path / "pictures" / f"{i:02}.txt").write_text("long " * 50 if i == 1 else f"picture {i}")
    (tmp_path / "pictures" / "02.png").write_bytes(b"damaged")
    pictures = Folder(tmp_path / "pictures", captions=True)
    (tmp_path / "numbers.csv").write_text("key,a\n" + "".join(f"row{i},{i}\n" for i in range(12)))
    numbers = NumericTables({"block": tmp_path / "numbers.csv"}, key="key")
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    table = Features(torch.arange(12), x, x, x)
    found = exhibits(table, table, attributes={})
    sources = {"drawn": pictures, "numbers": numbers, "bank": pictures}
    save_exhibits(tmp_path, {"drawn": found, "numbers": found}, sources)
    shown = load_exhibits(tmp_path)
    assert shown["drawn"]["map/tsne"].shape == shown["numbers"]["map/tsne"].shape == (12, 2)
    assert str(shown["numbers"]["left_out/galleries"]) == "the set has no pictures"
    assert not any(name.startswith(("gallery/", "sheet/")) for name in shown["numbers"])
    captions = shown["drawn"]["captions"].tolist()
    assert captions[0] == "picture 0"
    assert len(captions[1]) == 100
    assert captions[1].endswith("…")
    sheet = Image.open(io.BytesIO(shown["drawn"]["sheet/map"].tobytes()))
    assert sheet.size == (25 * 48, 48)
    colours = [sheet.getpixel((48 * i + 24, 24)) for i in range(12)]
    assert colours[2] == pytest.approx((226, 232, 240), abs=4)  # gray
    assert [colours[i] for i in (0, 11)] == [pytest.approx((255, 20 * i, 0), abs=12) for i in (0, 11)]

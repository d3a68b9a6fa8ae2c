"""What is wrong is told before torch is imported, and what was read to find out is what a run takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from repr.config import ConfigError, compose
from repr.runs.inputs import check_inputs, data_module

NO_TORCH = """
import importlib, json, sys
for number, (program, words) in enumerate(json.loads(sys.argv[1])):
    try:
        importlib.import_module(f"repr.{program}.__main__" if program != "fit" else "repr.fit").main(words)
        print(json.dumps("nothing was refused"))
    except SystemExit as refused:
        print(json.dumps(str(refused)))
    assert not {"torch", "lightning"} & sys.modules.keys(), words
"""


def test_what_is_missing_is_told_before_torch_is_imported(tmp_path: Path) -> None:
    """In one process, which ends with an error where anything has imported torch."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "one").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "one" / "a.png")
    (tmp_path / "t.csv").write_text("image,title\none/a.png,a picture\n")
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "own.yaml").write_text(
        "# @package _global_\nname: own\noptim:\n  learning_rate: 1\n"
    )
    images = ["data=folder", "eval=default", f"data.train.root={tmp_path}/one"]
    table = ["data=table", f"data.train.path={tmp_path}/t.csv", "data.train.captions=[title]"]
    folder = "{_target_: repr.data.sources.folder.Folder, root: %s}"
    mixed = "{_target_: repr.data.sources.mixture.Mixture, sources: [" + folder % f"{tmp_path}/empty" + "]}"
    cases: list[tuple[str, list[str], str]] = [
        ("fit", ["experiment=own", "--config-dir", f"{tmp_path}/mine"], "takes no such argument"),
        ("fit", ["data.batch_size=7", "trainer.devices=2"], "2 processes cannot share it evenly"),
        ("fit", ["data.lanes=3", "trainer.devices=2"], "data.lanes=3 and 2 processes, each of which"),
        ("fit", [*images, "data.train.captions=true"], "have no caption file"),
        ("fit", [*images, "+data.eval.val=" + folder % f"{tmp_path}/nowhere"], "nowhere' does not exist"),
        ("fit", [*table, "data.train.where={split: train}"], "has no column 'split'"),
        ("fit", [*images, f"+data.eval.val={mixed}"], "no image"),
        ("fit", [f"eval.zero_shot.classes.val={tmp_path}/none.yaml"], "none.yaml does not exist"),
        ("fit", [f"init_from={tmp_path}/no.ckpt", "data=folder", f"data.train.root={tmp_path}/empty"], "2 faults"),
        ("check", ["data=folder", f"data.train.root={tmp_path}/nowhere"], "nowhere' does not exist"),
        ("evaluate", ["model=timm:resnet18", *images[:1], f"data.train.root={tmp_path}/empty"], "no image"),
        ("export", [f"run={tmp_path}/nowhere", "to=timm", f"out={tmp_path}/out"], "nowhere does not exist"),
        ("export", [f"run={tmp_path}", "to=tim", f"out={tmp_path}/out"], "to=tim; set it to open_clip, timm"),
    ]
    words = json.dumps([[program, given] for program, given, _ in cases])
    done = subprocess.run([sys.executable, "-c", NO_TORCH, words], capture_output=True, text=True, check=False)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    for (_, given, expected), message in zip(cases, told, strict=False):
        assert message.startswith("error: "), (given, message)
        assert expected in message, (given, message)
    assert done.returncode == 0, done.stderr


def test_a_run_takes_the_sources_that_the_check_has_built(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name in "abcd":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    small = [
        "objective=simclr",
        "data=folder",
        "data.train.root=x",
        "smoke=true",
        "backbone.name=test_resnet",
        "data.batch_size=2",
    ]
    folder = "{_target_: repr.data.sources.folder.Folder, root: " + f"{tmp_path}" + "}"
    cfg = compose([*small, f"data.train.root={tmp_path}", f"+data.eval.val={folder}"])
    check_inputs(cfg)
    Image.new("RGB", (8, 8)).save(tmp_path / "e.png")
    first, second = data_module(cfg), data_module(cfg)
    assert [len(first.train), len(first.eval["val"])] == [4, 4]
    assert [len(second.train), len(second.eval["val"])] == [5, 5]  # what was built is taken once
    assert list(cfg.data) == list(compose(small).data)  # and the config stays as it is
    cfg.data.train.root = str(tmp_path / "mine")
    with pytest.raises(ValueError, match="no image"):
        check_inputs(cfg)
    cfg.init_from = str(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="2 faults"):
        check_inputs(cfg)
    cfg.resume = str(tmp_path)  # its weights were read when it began
    with pytest.raises(ValueError, match=r"^Folder: no image"):
        check_inputs(cfg)

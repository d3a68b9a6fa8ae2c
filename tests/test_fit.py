"""Whole runs on real pictures, in real processes where a process matters."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from PIL import Image
from torch import Tensor

from repr.config import compose
from repr.data.sources.emoji import Emoji
from repr.export.__main__ import parse
from repr.export.options import fitting_target
from repr.fit import fit, main, tell_end
from repr.models.slicing import compiler_fault
from repr.runs.checkpoints import last_checkpoint
from repr.runs.folder import load_run
from repr.training.trainer import make_trainer

TINY = [
    "smoke=true", "embed_dim=16", "text.width=32", "text.layers=1", "optim.lr=1e-3",
    "backbone.name=vit_tiny_patch16_224", "+backbone.depth=2", "+backbone.embed_dim=32", "+backbone.num_heads=2",
]  # fmt: skip
LONGER = [
    "trainer.max_epochs=2", "trainer.limit_train_batches=4", "trainer.check_val_every_n_epoch=2",
    "data.bank_size=500", "data.eval_batch_size=256", "trainer.limit_val_batches=1.0",
]  # fmt: skip


def run(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "repr.fit", f"run_folder={folder}", *TINY, *overrides]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"})


def weights(folder: Path) -> dict[str, Tensor]:
    path = last_checkpoint(folder)
    assert path is not None
    return torch.load(path, weights_only=True)["state_dict"]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A run of two epochs that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [*map(signal.getsignal, numbers)]
    results = fit(compose([*TINY, *LONGER, f"run_folder={folder}"]))
    assert [*map(signal.getsignal, numbers)] == before  # a handler that stays would hold the run and its weights
    return folder, results


def test_the_run_folder_holds_everything(whole: tuple[Path, dict]) -> None:
    folder, results = whole
    assert load_run(folder).trainer.max_epochs == 2
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step=8.ckpt"]
    assert list(folder.glob("events.out.tfevents.*"))
    logged = rows(folder)
    steps = [int(row["step"]) for row in logged if "train/loss" in row]
    assert steps == list(range(8))
    final = {name: float(value) for row in logged for name, value in row.items() if "/" in name}
    assert {"train/contrast", "train/cross_uniformity", "train/temperature"} <= final.keys()
    for name, (value, _) in results.items():
        assert final[name] == pytest.approx(value, nan_ok=True), name


def test_every_promised_number_is_there_with_its_chance(whole: tuple[Path, dict]) -> None:
    _, results = whole
    for name in (
        "i2t_R@1",
        "i2t_R@5",
        "i2t_R@10",
        "t2i_R@1",
        "t2i_R@5",
        "t2i_R@10",
        "knn_category",
        "ridge_category",
        "modality_separability",
    ):
        for data in ("val", "test_style"):
            value, chance = results[f"{data}/{name}"]
            assert 0 <= value <= 1, name
            assert chance is not None, name
            assert 0 < chance < 1, name
    for name in (
        "uniformity_image",
        "uniformity_text",
        "cross_uniformity",
        "alignment",
        "centroid_distance",
        "effective_rank_image",
    ):
        assert results[f"val/{name}"][1] is None
    assert results["val/zero_shot_top1"][1] == pytest.approx(5 / 1008)  # the share of the largest class
    assert "test_style/zero_shot_top1" not in results
    # style is labelled, but the vendor of test_style is not in the bank; its concepts are, those of val are not
    assert "val/knn_style" in results
    assert "test_style/knn_style" not in results
    assert "test_style/knn_concept" in results
    assert "val/knn_concept" not in results


@pytest.mark.slow
def test_a_seed_decides_the_run(whole: tuple[Path, dict], tmp_path: Path) -> None:
    first, _ = whole
    fit(compose([*TINY, *LONGER, f"run_folder={tmp_path / 'same'}"]))
    fit(compose([*TINY, *LONGER, f"run_folder={tmp_path / 'other'}", "seed=1"]))
    assert same(weights(first), weights(tmp_path / "same"))
    assert not same(weights(first), weights(tmp_path / "other"))


def test_the_end_of_a_run_shows_what_comes_first_and_the_commands_that_come_next(
    whole: tuple[Path, dict], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, results = whole
    tell_end(load_run(folder))
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    shown = [line[0] for line in lines if "/" in line[0]]
    assert shown[:3] == ["test_style/i2t_R@5", "val/i2t_R@5", "test_style/t2i_R@5"]  # the headline, and its metrics
    assert len(shown) <= 10
    value, chance = results["val/knn_category"]
    assert ["val/knn_category", f"{value:.3f}", f"{chance:.4f}"] in lines
    assert "Share of samples whose category frozen features tell; higher is better." in out
    assert ["look", f"{folder}/report.html"] in lines
    assert (folder / "report.html").is_file()
    evaluate, export = (line[1:] for line in lines if line[0] in ("evaluate", "export"))
    assert evaluate == ["python", "-m", "repr.evaluate", f"model={folder}"]
    options = parse(export[3:])
    assert export[:3] == ["python", "-m", "repr.export"]
    assert (options["run"], options["to"], options["out"]) == (str(folder), "open_clip", f"{folder}/open_clip")
    tell_end(load_run(folder), every_number=True)
    out = capsys.readouterr().out
    assert all(name.partition("/")[2] in out for name in results)


@pytest.mark.parametrize(
    ("overrides", "target"),
    [
        (["objective=clip", "text=hf"], "timm"), (["objective=simclr"], "timm"),
        (["objective=siglip"], "open_clip"), (["experiment=m3col_tabular"], None),
        (["objective=clip", "+objective.hidden_dim=64"], "timm"), (["experiment=coca_vit_b32"], "open_clip"),
        (["objective=coca", "backbone.name=resnet18"], "timm"),
    ],
)  # fmt: skip
def test_the_export_that_is_named_fits_what_was_trained(overrides: list[str], target: str | None) -> None:
    assert fitting_target(compose(overrides)) == target


def test_a_finished_run_is_evaluated_again(whole: tuple[Path, dict], tmp_path: Path) -> None:
    folder, results = whole
    cfg = load_run(folder)
    cfg.resume = str(folder)
    again = fit(cfg)
    assert {name: value for name, (value, _) in again.items()} == pytest.approx(
        {name: value for name, (value, _) in results.items()}, nan_ok=True
    )


def test_a_dry_run_takes_ten_steps_and_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    record = ["+callbacks.record._target_=tests.signals.Record", f"+callbacks.record.file={tmp_path}/steps"]
    main([*TINY, "trainer.limit_train_batches=30", "trainer.max_epochs=2", *record, "--dry-run"])
    steps = [json.loads(line)[:2] for line in (tmp_path / "steps").read_text().splitlines()]
    assert steps == [[step, 0] for step in range(1, 11)]  # and no evaluation
    told = " ".join(capsys.readouterr().out.split())
    assert re.search(r"a step of this run takes about \d+\.\d GB on cpu, .*, and \d+\.\d GB are free", told)
    assert "steps 60 in all, 30 an epoch, 2 epochs" in told
    assert "of it left: 60 steps of" in told
    assert [path.name for path in tmp_path.iterdir()] == ["steps"]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="is not finite at step"):
        main([f"run_folder={tmp_path}", *TINY, "optim.lr=1e30", "trainer.limit_train_batches=8"])
    record = json.loads((tmp_path / "non_finite_rank0.json").read_text())
    assert set(record["bad_terms"]) <= {"contrast", "alignment", "uniformity", "cross_uniformity"}
    assert record["bad_terms"]
    assert len(record["index"]) == 8


def test_two_processes_train_as_one(whole: tuple[Path, dict], tmp_path: Path) -> None:
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trust=true"]
    listen = ["+callbacks.listen._target_=tests.signals.Listening", f"+callbacks.listen.folder={tmp_path.parent}"]
    done = run(tmp_path, *LONGER, *ddp, *listen)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Evaluation") == 1
    addresses = [json.loads((tmp_path.parent / f"listening_{rank}.json").read_text()) for rank in range(2)]
    assert addresses == [["0100007F"], ["0100007F"]]  # 127.0.0.1: no other machine reaches the store or gloo
    losses = [
        [float(row["train/loss"]) for row in rows(folder) if "train/loss" in row] for folder in (whole[0], tmp_path)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    ours, theirs = (
        {k: float(v) for row in rows(folder) for k, v in row.items() if k.startswith(("val/", "test_style/"))}
        for folder in (whole[0], tmp_path)
    )
    assert ours.keys() == theirs.keys()
    for name in ("val/uniformity_image", "test_style/alignment", "val/centroid_distance"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name


@pytest.mark.slow
def test_what_saves_time_or_memory_changes_no_number(whole: tuple[Path, dict], tmp_path: Path) -> None:
    if fault := compiler_fault():
        pytest.skip(fault)
    options = ["compile=true", "grad_checkpointing=true", "sync_batchnorm=true", "micro_batch=4", "chunk_size=4"]
    main([f"run_folder={tmp_path}", *TINY, *LONGER, *options])
    losses = [[float(row["train/loss"]) for row in rows(f) if "train/loss" in row] for f in (whole[0], tmp_path)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert weights(tmp_path).keys() == weights(whole[0]).keys()  # so that a run may go on without, or with


def test_a_package_that_adds_callbacks_to_every_trainer_changes_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "guest.py").write_text("from lightning.pytorch import Callback\nclass Guest(Callback): pass\n")
    (tmp_path / "guest-1.dist-info").mkdir()
    (tmp_path / "guest-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: guest\nVersion: 1\n")
    points = "[lightning.pytorch.callbacks_factory]\nguest = guest:Guest\n"
    (tmp_path / "guest-1.dist-info" / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(tmp_path)
    run = make_trainer(compose([*TINY, f"run_folder={tmp_path}/run"]), [], [])
    assert not [callback for callback in run.callbacks if type(callback).__module__ == "guest"]
    other = pl.Trainer(accelerator="cpu", default_root_dir=tmp_path)  # one of the user's own has it as before
    assert [callback for callback in other.callbacks if type(callback).__module__ == "guest"]


def test_bad_input_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    for i in range(8):
        Image.new("RGB", (40, 40), (i, 0, 0)).save(tmp_path / "broken" / f"{i}.png")
    (tmp_path / "broken" / "3.png").write_bytes(b"no picture")
    for i in range(8):
        (tmp_path / "broken" / f"{i}.txt").write_text(f"picture {i}")
    (tmp_path / "classes.yaml").write_text("attribute: concept\ntemplates: ['{}']\nnames: {nothing: nothing}\n")
    torch.save({"state_dict": {"backbone.blocks.0.attn.qkv.weight": torch.zeros(3, 1)}}, tmp_path / "other.ckpt")
    torch.save({"state_dict": {}, "code": main}, tmp_path / "code.ckpt")
    folder = ["data=folder", "eval=default", "data.train.captions=true"]
    cases = {
        (*folder, f"data.train.root={tmp_path}/nowhere"): "nowhere",
        (*folder, f"data.train.root={tmp_path}/empty"): "no image",
        (*folder, f"data.train.root={tmp_path}/broken"): "3.png",
        (*folder, f"data.train.root={tmp_path}/broken", "data.num_workers=1"): "3.png",
        ("data.batch_size=6000",): "data.batch_size",
        (f"eval.zero_shot.classes.val={tmp_path}/classes.yaml",): "'nothing'",
        (f"eval.zero_shot.classes.val={tmp_path}/none.yaml",): "does not exist",
        (f"init_from={tmp_path}/nowhere.ckpt",): "init_from",
        (f"init_from={tmp_path}/other.ckpt",): "another architecture",
        (f"init_from={tmp_path}/code.ckpt",): "it needs repr.fit.main",
        ("backbone.name=vit_tny_patch16_224",): "vit_tiny_patch16_224",
        ("optim.name=adamww",): "optim.name",
        ("optim.warmup_steps=100",): "optim.warmup_steps",
        (f"resume={tmp_path}/empty",): "is not a run folder",
    }
    for overrides, words in cases.items():
        with pytest.raises(SystemExit) as refused:
            main([*TINY, f"run_folder={tmp_path}/run", *overrides])
        message = str(refused.value)
        assert message.startswith("error: "), (overrides, message)
        assert words in message, (overrides, message)
        assert "Traceback" not in message, message


def test_a_run_over_damaged_shards_goes_on_and_tells_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    emoji = Emoji("val")
    for name, rows in (("train", range(64)), ("val", range(64, 96))):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as archive:
            for row in rows:
                picture = b"damaged" if row in (5, 70) else emoji.encoded(row)
                for ending, data in (("webp", picture), ("txt", emoji.captions(row)[0].encode())):
                    member = tarfile.TarInfo(f"{row}.{ending}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    val = f"{{_target_: repr.data.sources.shards.Shards, files: {tmp_path}/val.tar, captions: [txt]}}"
    run = [*TINY, f"run_folder={tmp_path}/run", "data=shards", f"data.train.files={tmp_path}/train.tar", "eval=default"]
    run += [f"+data.eval.val={val}", "trainer.limit_train_batches=8", "trainer.limit_val_batches=1.0"]
    main([*run, "data.max_bad_fraction=0.05", "data.num_workers=2"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if line and "num_bad" in line[0]] == [["train/num_bad", "1"], ["val/num_bad", "1"]]
    told = [record.message for record in caplog.records if "sample" in record.message]
    assert sorted(line.partition(" (")[0] for line in told) == ["train: sample 5 replaced", "val: sample 6 left out"]
    assert f"{tmp_path}/train.tar: 5: not readable as an image (Pillow reads it as none of " in caplog.text
    with pytest.raises(SystemExit, match=r"1 of 64 samples of train .* data\.max_bad_fraction .*: 5: not readable"):
        main([*run, f"run_folder={tmp_path}/other"])


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_spawn", "ddp_notebook"])
def test_processes_that_give_nothing_back_are_refused(strategy: str, tmp_path: Path) -> None:
    """Forked from one with a thread of TensorBoard's they would even wait for it for ever."""
    options = ["trainer=ddp", "trainer.accelerator=cpu", f"trainer.strategy={strategy}", f"run_folder={tmp_path}/run"]
    with pytest.raises(SystemExit, match=f"trainer.strategy={strategy} forks or spawns 2 processes.*set trainer=ddp"):
        main([*TINY, *options])

"""Multistage runs: killed at every kind of place and resumed, refused where they must be, on one process and on two."""

import csv
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from repr.config import ConfigError, compose
from repr.config_check import check
from repr.fit import main
from repr.runs.checkpoints import last_checkpoint
from repr.runs.folder import load_run
from repr.runs.joined import load_joined
from repr.runs.stage_record import read_record
from tests.conftest import RunGroup
from tests.test_fit import TINY, same, weights

Run = Callable[..., tuple[int, str]]
STAGES = ["stage-0", "stage-1", "stage-2"]
SETUP = [
    *TINY, "objective=clip", "procedure=multistage", "procedure.num_stages=3", "procedure.clustering.n_clusters=3",
    "trainer.max_epochs=2", "trainer.check_val_every_n_epoch=2", "callbacks.checkpoints.every_n_steps=1",
    "eval.zero_shot=null", "eval.headline=[]", "callbacks.pictures=null", "trainer.limit_val_batches=1",
]  # fmt: skip
DROP = "+backbone.drop_path_rate=0.2"  # so that generators count, too


def kills(clustering: int = -1, stage: str = "none", step: int = 0) -> list[str]:
    """A run that is killed in the clustering with this seed, or at a step of a stage."""
    return [
        "+callbacks.kill._target_=tests.signals.KillInStage", "+callbacks.kill.folder=${run_folder}",
        f"+callbacks.kill.stage={stage}", f"+callbacks.kill.step={step}", f"+procedure.clustering.kill_at={clustering}",
        "procedure.clustering._target_=tests.signals.KilledKMeans",
        "~procedure.clustering.batch_size", "~procedure.clustering.max_iter", "~procedure.clustering.tol",
    ]  # fmt: skip


def features(folder: Path, num_stages: int | None = 3, norm: str = "joined") -> dict[str, Tensor]:
    """What the joined encoder gives for a picture and a text."""
    joined = load_joined(folder, num_stages=num_stages, norm=norm)
    images = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
    with torch.no_grad():
        return {"image": joined.encode_image(images), "text": joined.encode_text(torch.arange(32).reshape(2, 16))}


def arrays(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "clusters.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def whole(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of three stages that nothing interrupts, and what it has printed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    status, out = run(f"run_folder={folder}", *SETUP, *kills(), DROP)
    assert status == 0, out
    return folder, out


def test_a_run_leaves_its_stages_their_records_and_a_table(whole: tuple[Path, str]) -> None:
    folder, out = whole
    lines = out[out.index("Evaluation by stage and attribute") : out.index("look  ")].splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[2].split() == ["0", "1", "2", "joined", "chance"]
    assert {"val/knn_category", "test_style/ridge_concept"} <= {line.split()[0] for line in lines if line.split()}
    with (folder / "stages.csv").open() as file:
        table = {row["name"]: row for row in csv.DictReader(file)}
    assert list(table["val/i2t_R@1"]) == ["name", *STAGES, "joined", "chance"]
    records = [read_record(folder / stage) for stage in STAGES]
    for s, record in enumerate(records):
        assert record is not None
        assert record.stage == s
        assert record.checkpoint == "checkpoints/step=4.ckpt"
        assert (record.clusters_sha256 is None) == (s == 2)
        assert float(table["val/knn_category"][f"stage-{s}"]) == record.results["val/knn_category"][0]
        cfg = OmegaConf.load(folder / STAGES[s] / "config.yaml")  # an ordinary run
        assert cfg.procedure._target_ == "repr.fit.single"
        assert (cfg.data.clusters is None) == (s == 0)
    second = arrays(folder / "stage-1")
    assert second["ids"].shape == (2, 5610)
    assert (second["ids"] >= 0).all(axis=0).sum() == 128  # so many were embedded
    np.testing.assert_array_equal(second["ids"][0], arrays(folder / "stage-0")["ids"][0])
    assert {"centroids_0_image", "centroids_1_image"} <= second.keys()
    known = second["accumulated"] >= 0
    np.testing.assert_array_equal(second["table"][second["accumulated"][known]].T, second["ids"][:, known])
    assert not same(weights(folder / "stage-1"), weights(folder / "stage-2"))


def test_batches_of_later_stages_are_of_one_cluster(whole: tuple[Path, str]) -> None:
    folder, _ = whole
    datamodule = instantiate(load_run(folder / "stage-2", trust=True).data)
    order = datamodule.order
    group = dict(zip(order.members.tolist(), np.repeat(np.arange(len(order.sizes)), order.sizes).tolist(), strict=True))
    batches = [batch["index"] for batch in datamodule.train_dataloader()]
    assert len(batches) > 10
    for index in batches:
        assert len({group[row] for row in index.tolist()}) == 1


@pytest.mark.slow
def test_killed_anywhere_and_resumed_it_ends_with_the_same_features(
    run: Run, whole: tuple[Path, str], tmp_path: Path
) -> None:
    """In the clustering after stage 0, in stage 1, in the clustering after it, and in stage 2: one after the other."""
    folder, resume = tmp_path / "run", [f"resume={tmp_path}/run", "trust=true"]
    status, out = run(f"run_folder={folder}", *SETUP, *kills(clustering=0), DROP)
    assert status == -signal.SIGKILL, out
    assert read_record(folder / "stage-0") is None
    status, out = run(
        *resume, "procedure.clustering.kill_at=-1", "callbacks.kill.stage=stage-1", "callbacks.kill.step=2"
    )
    assert status == -signal.SIGKILL, out
    assert read_record(folder / "stage-0") is not None
    first = (folder / "stage-0" / "checkpoints" / "step=4.ckpt").stat().st_mtime_ns
    assert [path.name for path in (folder / "stage-1" / "checkpoints").iterdir()] == ["step=2.ckpt"]
    status, out = run(*resume, "callbacks.kill.stage=none", "procedure.clustering.kill_at=1000")
    assert status == -signal.SIGKILL, out
    assert last_checkpoint(folder / "stage-1").name == "step=4.ckpt"
    kill = ["callbacks.kill.stage=stage-2", "callbacks.kill.step=3"]
    status, out = run(*resume, "procedure.clustering.kill_at=-1", *kill)
    assert status == -signal.SIGKILL, out
    status, out = run(*resume, "callbacks.kill.stage=none")
    assert status == 0, out
    assert "stage 1 of 3" not in out
    assert (folder / "stage-0" / "checkpoints" / "step=4.ckpt").stat().st_mtime_ns == first
    assert same(features(folder), features(whole[0]))
    for stage in STAGES[:2]:
        ours, theirs = arrays(folder / stage), arrays(whole[0] / stage)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            np.testing.assert_array_equal(value, theirs[name], err_msg=name)
    assert (folder / "stages.csv").read_text() == (whole[0] / "stages.csv").read_text()


def test_a_run_that_does_not_fit_any_more_is_refused(whole: tuple[Path, str], tmp_path: Path) -> None:
    """Another data set, a changed or missing file, a damaged record; each says what to do."""
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    record = folder / "stage-1" / "stage.json"
    clusters, checkpoint = folder / "stage-1" / "clusters.npz", folder / "stage-0" / "checkpoints" / "step=4.ckpt"

    def refused(*overrides: str) -> str:
        with pytest.raises(SystemExit) as error:
            main([f"resume={folder}", "trust=true", *overrides])
        return str(error.value)

    assert "was made with another training set" in refused("data.train.split=val")
    for path, change, words in (
        (clusters, b"", "clusters.npz is not the file that"),
        (checkpoint, b"x", "step=4.ckpt is not the file that"),
        (record, b'{"stage": 1', "stage.json is damaged"),
        (record, b'{"stage": 1}', "stage.json is damaged"),
    ):
        before = path.read_bytes()
        path.write_bytes(change)
        message = refused()
        assert words in message
        assert "resume the run: they are done again" in message
        path.write_bytes(before)
    clusters.rename(tmp_path / "aside")
    assert "clusters.npz is missing" in refused()


def test_a_stage_half_written_is_done_again_and_more_may_follow(
    run: Run, whole: tuple[Path, str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    last = folder / "stage-2"
    (last / "stage.json").unlink()
    (last / "checkpoints" / "step=4.ckpt").rename(last / "checkpoints" / "step=4.ckpt.part")
    status, out = run(f"resume={folder}", "trust=true", "procedure.num_stages=4", "procedure.clustering.n_clusters=2")
    assert status == 0, out
    assert not list(folder.rglob("*.part"))
    assert same(features(folder), features(whole[0]))
    assert "stage-1 is finished and keeps its clusters" in out
    assert arrays(folder / "stage-2")["ids"].max(axis=1).tolist() == [2, 2, 1]
    assert read_record(folder / "stage-3") is not None


def test_both_norms_and_any_number_of_stages_can_be_joined(whole: tuple[Path, str]) -> None:
    joined, each = features(whole[0]), features(whole[0], norm="each")
    for name in ("image", "text"):
        assert joined[name].shape == (2, 48)
        torch.testing.assert_close(each[name].reshape(2, 3, 16).norm(dim=2), torch.full((2, 3), 3**-0.5))
        assert not torch.allclose(joined[name], each[name], atol=1e-3)
    assert features(whole[0], num_stages=2)["image"].shape == (2, 32)
    assert same(features(whole[0], num_stages=None), joined)
    with pytest.raises(ValueError, match="stage-0 has no finished stage"):
        load_joined(whole[0] / "stage-0")


def test_a_pretrained_stage_0_frozen_towers_and_a_warm_start(whole: tuple[Path, str], tmp_path: Path) -> None:
    """Stage 0 is the weights of another run as they are; then the last block and what lies above it are trained."""
    start = whole[0] / "stage-0"
    main(
        [
            *SETUP, f"run_folder={tmp_path}", "procedure.num_stages=2", f"init_from={start}", "trainer.max_epochs=1",
            "+procedure.first.trainer.max_epochs=0", "procedure.cluster_by=[image, text]",
            "procedure.clustering.n_clusters=2", "+procedure.later.freeze.text=0", "+procedure.later.freeze.backbone=1",
            "procedure.warm_start=true", "trainer.limit_val_batches=0", "trainer.check_val_every_n_epoch=1",
        ]
    )  # fmt: skip
    original, first, second = (weights(folder) for folder in (start, tmp_path / "stage-0", tmp_path / "stage-1"))
    assert last_checkpoint(tmp_path / "stage-0").name == "step=0.ckpt"
    assert same(first, original)
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert {"logit_scale", "image_projection.weight"} <= changed
    assert any(name.startswith("backbone.blocks.1.") for name in changed)
    assert not any(name.startswith(("text.", "backbone.blocks.0.", "backbone.patch_embed")) for name in changed)
    content = arrays(tmp_path / "stage-0")
    assert {"centroids_0_image", "centroids_0_text"} <= content.keys()
    assert 2 < len(np.unique(content["ids"][content["ids"] >= 0])) <= 4
    assert OmegaConf.load(tmp_path / "stage-1" / "config.yaml").init_from == str(tmp_path / "stage-0")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective=vicreg"], "of JointEmbedding none of its terms .*invariance.* takes the other samples"),
        (["objective=barlow_twins"], r"\(correlation\) .* give one of contrast, uniformity, hallucination a weight"),
        (["objective=swav"], "of SwAV none of its terms"),
        (["objective=swav", "objective.queue_length=8"], "queue keeps 8 rows of earlier batches"),
        (
            ["objective=simclr", "procedure.cluster_by=[text]"],
            "names text; JointEmbedding gives image, trunk, proj",
        ),
        (["procedure.num_stages=0"], r"procedure\.num_stages=0; set it to 1 or more"),
        (["procedure.mode=random"], "mode is 'random'; set it to round_robin or proportional"),
        (["procedure.norm=raw"], "norm=raw; set it to joined or each"),
        (["procedure.clustering._target_=sklearn.cluster.KMeens"], "KMeens does not import"),
        (["+procedure.clustering.clusters=3"], r"procedure\.clustering\.clusters: .* takes no such argument"),
        (["data.lanes=4"], r"from clusters, not from lanes of shards: set data\.lanes=null"),
        (["+procedure.stages=3"], r"Multistage takes no such argument; did you mean 'num_stages'"),
    ],
)
def test_a_config_that_cannot_work_is_refused_at_once(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(compose(["procedure=multistage", "smoke=true", *overrides]))


@pytest.mark.parametrize("objective", ["clip", "siglip", "cuaxu", "simclr", "align_uniform"])
def test_objectives_with_negatives_from_the_batch_are_taken(objective: str) -> None:
    check(compose(["procedure=multistage", "smoke=true", f"objective={objective}"]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+procedure.later.trainer.epochs=3"], r"procedure\.later: Key 'epochs' is not in struct"),
        (["+procedure.later.freeze.txt=0"], r"freeze\.txt: ImageText"),
        (["procedure.clustering.n_clusters=200"], "128 samples cannot make 200 clusters"),
        (["data.batch_size=64", "procedure.leftovers=drop", "procedure.clustering.n_clusters=40",
          "+procedure.first.data.batch_size=8"],
         r"no cluster fills a batch: data.batch_size=64, .* \d+ clusters have .* procedure\.leftovers=merge"),
    ],
)  # fmt: skip
def test_what_shows_between_stages_is_one_clear_error(overrides: list[str], message: str, tmp_path: Path) -> None:
    small = ["trainer.limit_train_batches=1", "trainer.max_epochs=1", "trainer.check_val_every_n_epoch=1"]
    with pytest.raises(SystemExit, match=message) as refused:
        main([f"run_folder={tmp_path}", *SETUP, *small, "trainer.limit_val_batches=0", *overrides])
    assert str(refused.value).startswith("error: ")
    assert not (tmp_path / "stage-1" / "stage.json").exists()


@pytest.mark.slow
def test_two_processes_do_what_one_does(run_group: RunGroup, tmp_path: Path) -> None:
    """And are killed between two stages and go on."""
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    setup = [*SETUP, "procedure.num_stages=2"]
    ((status, out),) = run_group(1, *setup, *kills(), f"run_folder={tmp_path}/one")
    assert status == 0, out
    for status, out in run_group(2, *setup, *kills(stage="stage-1", step=2), *ddp, f"run_folder={tmp_path}/two"):
        assert status == -signal.SIGKILL, out
    done = run_group(2, f"resume={tmp_path}/two", "trust=true", "callbacks.kill.stage=none")
    for status, out in done:
        assert status == 0, out
    assert [out.count("Evaluation by stage and attribute") for _, out in done] == [1, 0]
    one, two = arrays(tmp_path / "one" / "stage-0"), arrays(tmp_path / "two" / "stage-0")
    np.testing.assert_array_equal(one["accumulated"], two["accumulated"])
    for key in ("ids", "centroids_0_image"):
        np.testing.assert_allclose(one[key], two[key], rtol=1e-3, atol=1e-3)
    for name, value in features(tmp_path / "one", 2).items():
        torch.testing.assert_close(value, features(tmp_path / "two", 2)[name], rtol=1e-2, atol=1e-3)
    coverage = [json.loads((tmp_path / f / "stage-1/stage.json").read_text())["coverage"] for f in ("one", "two")]
    assert coverage[0] == coverage[1]


@pytest.mark.slow
def test_stages_under_fsdp2_with_dense_evaluation(run_group: RunGroup, tmp_path: Path) -> None:
    """Maps are looked at in each stage, and not in all of them joined."""
    recipe = ["experiment=simclr_scenes", "procedure=multistage", "procedure.num_stages=2", "procedure.export=timm"]
    small = ["smoke=true", "backbone.name=test_resnet", "trainer=fsdp", "trainer.devices=2", "trainer.accelerator=cpu"]
    done = run_group(2, *recipe, *small, f"run_folder={tmp_path}/run")
    for status, out in done:
        assert status == 0, out
    results = [json.loads((tmp_path / f"run/{stage}/results.json").read_text()) for stage in STAGES[:2]]
    assert all(any("correspondence" in name for name in found) for found in results)
    assert "Evaluation by stage and attribute" in done[0][1]
    assert (tmp_path / "run" / "stages.csv").is_file()


def test_processes_choose_no_folder_of_their_own(tmp_path: Path) -> None:
    """The folder's name has the time in it, which differs between processes; the stages follow the first one's."""
    cfg = compose(["procedure=multistage", "smoke=true", f"run_folder={tmp_path}"])
    stage = instantiate(cfg.procedure).stage_config(cfg, 1)
    assert stage.run_folder == str(tmp_path / "stage-1")
    assert stage.data.clusters.path == str(tmp_path / "stage-0" / "clusters.npz")
    assert stage.callbacks.checkpoints.folder == str(tmp_path / "stage-1")
    assert cfg.data.clusters is None

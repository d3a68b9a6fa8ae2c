"""Dense evaluation in whole runs: the numbers of a pass by hand, and of two processes."""

from pathlib import Path

import pytest
import timm
import torch

from repr.config import compose
from repr.data.drawn.scenes import Scenes
from repr.data.eval_datasets import DenseDataset
from repr.data.views import expand
from repr.fit import fit, main
from repr.metrics.dense import correspondence, linear_segmentation
from repr.metrics.features import DenseFeatures
from repr.runs.checkpoints import last_checkpoint
from tests.conftest import RunGroup

# Sizes that neither batches nor processes divide; the weights stay as they are, so that every run has the same.
TINY = [
    "experiment=simclr_scenes", "smoke=true", "optim.lr=0", "objective.hidden_dim=16", "data.train.num_images=41",
    "data.eval.val.num_images=23", "data.bank_size=21", "data.eval_batch_size=4", "trainer.limit_val_batches=1.0",
    "eval.dense.num_images=13", "callbacks.progress=null", "logger.tensorboard=null", "trainer.accelerator=cpu",
]  # fmt: skip
CLIP = [
    "smoke=true", "eval=dense", "eval.dense.num_images=13", "objective=clip", "embed_dim=16", "text.width=32",
    "text.layers=1", "backbone.name=test_resnet", "trainer.accelerator=cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("one")
    return folder, fit(compose([*TINY, f"run_folder={folder}"]))


def test_numbers_are_those_of_a_pass_by_hand(one: tuple[Path, dict]) -> None:
    from hydra.utils import instantiate

    from repr.models.backbone import feature_map

    folder, results = one
    cfg = compose([*TINY, f"run_folder={folder}"])
    data, module = instantiate(cfg.data), instantiate(cfg.objective).eval()
    module.load_state_dict(torch.load(last_checkpoint(folder), weights_only=True)["state_dict"])
    tables = {}
    crops = expand(instantiate(cfg.eval.dense.views).values())
    for number, name in enumerate(data.eval_names):
        source, num = data.evaluated(name)[0], 13
        rows = torch.arange(num) * len(source) // num
        loader = data.in_order(DenseDataset(source, rows, data.image_size, crops, data.mask_classes))
        batches = [data.on_after_batch_transfer(batch, number) for batch in loader]
        index, boxes, mask = (torch.cat([batch[key] for batch in batches]) for key in ("index", "boxes", "mask"))
        images = [[b["image"] for b in batches], *([b["crops"][i] for b in batches] for i in (0, 1))]
        with torch.no_grad():
            maps = [torch.cat([feature_map(module.backbone, image) for image in part]) for part in images]
        masks = {kind: mask[:, i] for i, kind in enumerate(data.mask_classes)}
        tables[name] = DenseFeatures(index, maps[0], (maps[1], maps[2]), boxes, masks)
    assert len(tables["bank"].index) == len(tables["val"].index) == 13
    assert tables["val"].maps.shape == (13, 96, 4, 4)
    mask = torch.from_numpy(Scenes("val").masks(1)[1])
    assert torch.equal(tables["val"].masks["shape"][1], mask[1::2, 1::2])
    found = correspondence(tables["bank"], tables["val"]) | linear_segmentation(tables["bank"], tables["val"])
    assert {"correspondence@1", "linear_miou_figure", "linear_miou_shape", "linear_pixels_texture"} < found.keys()
    for name, value in found.items():
        if not name.endswith(".chance"):
            assert results[f"val/{name}"] == pytest.approx((value, found[f"{name}.chance"]), abs=1e-3), name
    assert {f"val/knn_{kind}_{mask}" for kind in ("miou", "pixels") for mask in data.mask_classes} < results.keys()


@pytest.mark.slow
def test_two_processes_find_the_same(one: tuple[Path, dict], run_group: RunGroup, tmp_path: Path) -> None:
    for status, out in run_group(2, *TINY, f"run_folder={tmp_path}", "trainer=ddp", "trainer.devices=2"):
        assert status == 0, out
    from repr.training.metrics_file import read_rows

    logged = {k: float(v) for row in read_rows(tmp_path / "metrics.csv") for k, v in row.items() if v}
    dense = [name for name in one[1] if "_miou_" in name or "_pixels_" in name or "correspondence" in name]
    assert len(dense) == 18
    for name in dense:  # statistics of BatchNorm are summed in another order
        assert logged[name] == pytest.approx(one[1][name][0], abs=5e-3), name


def test_it_works_with_text_and_with_masks_of_drawings(tmp_path: Path) -> None:
    results = fit(compose([*CLIP, f"run_folder={tmp_path}"]))
    for name in ("linear_miou_figure", "knn_pixels_figure", "correspondence@1", "i2t_R@1"):
        assert results[f"test_style/{name}"][1] is not None


def test_a_backbone_without_maps_is_refused_before_training(tmp_path: Path) -> None:
    other = [f"run_folder={tmp_path}", "backbone._target_=tests.evaluate.test_dense_during_training.plain"]
    with pytest.raises(SystemExit, match=r"eval\.dense needs feature maps.*set backbone\.name to a timm ResNet"):
        main([*TINY, *other])


def plain(**_: object) -> torch.nn.Module:
    """A model of timm's that lost its maps."""
    model = timm.create_model("test_resnet", num_classes=0)
    wrapped = torch.nn.Sequential(model)
    wrapped.num_features = model.num_features
    return wrapped


def test_crops_must_be_two(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"eval\.dense\.views gives 3 crops"):
        main([*TINY, f"run_folder={tmp_path}", "eval.dense.views.main.count=3"])

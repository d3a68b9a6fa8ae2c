"""Composing and checking configs: what is refused, and with what words."""

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from repr.config import CONF, ConfigError, compose, num_cores
from repr.config_check import check
from repr.explain import show
from repr.runs.folder import load_run
from repr.signatures import NOT_LITERAL, arguments

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


@pytest.mark.parametrize(
    "experiment",
    [
        pytest.param(name, marks=() if name.endswith(("_emoji", "_scenes")) else pytest.mark.slow)
        for name in EXPERIMENTS
    ],
)
def test_every_experiment_composes_and_checks(experiment: str) -> None:
    cfg = compose([f"experiment={experiment}", "run_folder=x"])
    check(cfg)
    assert cfg.name == experiment
    assert (CONF / "experiment" / f"{experiment}.yaml").read_text().startswith("# @package _global_\n#")


@pytest.mark.parametrize("data", ["emoji", "folder"])
@pytest.mark.parametrize("views", sorted(path.stem for path in (CONF / "views").glob("*.yaml")))
def test_every_group_composes(data: str, views: str) -> None:
    cfg = compose([f"data={data}", f"views={views}", "trainer=ddp", "eval=default", "run_folder=x"])
    if data == "folder":
        with pytest.raises(ConfigError, match=r"data\.train\.root has no value"):
            check(cfg)
        cfg.data.train.root = "."
    check(cfg)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("experiment=dmo", "experiment has no option 'dmo'; did you mean 'demo'"),
        ("objective=cuxau", "did you mean 'cuaxu'"),
        ("optim.lrr=1", "there is no option 'optim.lrr'; did you mean 'optim.lr'"),
        ("optm.lr=1", "did you mean 'optim.lr'"),
        ("lr=1", "did you mean 'optim.lr'"),
        ("data.batchsize=8", "did you mean 'data.batch_size'"),
        ("objective.weights.contrastive=1", "did you mean 'objective.weights.contrast'"),
        ("views.main.sise=3", "did you mean 'views.main.size'"),
        ("optim.lr=1,2", "one run takes one value"),
        ("optim.lr", "key=value"),
        ("optim.lr=", "optim.lr takes a number"),
        ("data.batch_size=many", "data.batch_size takes a number (it is 256), but got 'many'"),
        ("data.batch_size=true", "data.batch_size takes a number"),
        ("+optim.lrr=1", "optim.lrr: repr.optim.Optim takes no such argument; did you mean 'lr'"),
        (
            "+data.worker=1",
            "data.worker: repr.data.datamodule.DataModule takes no such argument; did you mean 'num_workers'",
        ),
        ("smoke=2", "smoke takes true or false"),
        ("+optim.lr=1", "optim.lr is an option already: leave the + out"),
    ],
)
def test_a_wrong_override_is_refused_with_the_nearest_name(override: str, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        compose([override])
    assert words in str(refused.value)


def test_all_wrong_overrides_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        compose(["optim.lrr=1", "data.batchsize=8", "seed=3", "sed=3"])
    assert len(refused.value.faults) == 3


def test_all_faults_of_a_config_are_told_at_once() -> None:
    sizes = ["trainer.devices=3", "data.batch_size=8", "micro_batch=0", "chunk_size=1.5", "trainer.precision=bf16-true"]
    cfg = compose(["data=folder", "data.lanes=1.5", *sizes, "run_folder=x"])
    OmegaConf.set_struct(cfg, False)
    cfg = OmegaConf.merge(
        cfg,
        {
            "optim": {"lrr": 1},
            "eval": {
                "geometry": {"maxx": 1},
                "typo": {"_target_": "repr.metrics.nowhere.f"},
            },
            "objective": {"weights": {"contrastive": 1.0}, "losses": {"uniformty": {"_target_": "math.exp"}}},
            "trainer": {"max_epochs": None},
        },
    )
    with pytest.raises(ConfigError) as refused:
        check(cfg)
    text = str(refused.value)
    for words in (
        "data.train.root has no value",
        "optim.lrr: repr.optim.Optim takes no such argument; did you mean 'lr'",
        "eval.geometry.maxx: repr.evaluate.protocols.Geometry takes no such argument",
        "eval.typo._target_: repr.metrics.nowhere.f does not import",
        "objective.weights.contrastive: repr.objectives.image_text.ImageText has no such term; did you mean 'contrast'",
        "objective.losses.uniformty: repr.objectives.image_text.ImageText has no such term; did you mean 'uniformity'",
        "data.batch_size=8 is the global batch and 3 processes cannot share it evenly",
        "trainer.max_epochs or trainer.max_steps",
        "micro_batch=0; set it to the number of rows of an encoder at a time, or to null",
        "chunk_size=1.5; set it",
        "data.lanes=1.5; set it to a whole number",
        "trainer.precision=bf16-true would cast crop boxes",
    ):
        assert words in text, words


def test_an_option_that_an_experiment_has_for_another_objective_can_be_left_out() -> None:
    given = ["experiment=coca_composition", "objective=clip"]
    with pytest.raises(ConfigError, match=r"objective\.num_queries: .* \(~objective\.num_queries leaves it out\)"):
        check(compose(given))
    check(compose([*given, "~objective.num_queries"]))


def test_an_option_without_effect_is_warned_about() -> None:
    with pytest.warns(UserWarning, match="chunk_size=64 changes nothing"):
        check(compose(["objective=vicreg", "chunk_size=64"]))


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["objective=mae", "exchange=ring"], "no loss whose rows can be passed on; set exchange=gather"),
        (["objective=vicreg", "exchange=ring"], "no loss whose rows can be passed on; set exchange=gather"),
        (["objective=vicreg", "+objective.exchange=ring"], "no weighted term compares pairs"),
        (
            ["objective=mae", "false_negatives=mask"],
            "no contrast whose pairs could be left out; set false_neg",
        ),
        (["objective=align_uniform", "false_negatives=mask"], "contrast, the term with negatives, has no weight"),
        (["objective=swav", "loss_precision=tf32"], "no loss of pairs; set loss_precision=float32"),
        (["objective=clip", "loss_precision=bf16"], "loss_precision=bf16; set it to float32, tf32 or bf16x3"),
        (
            [
                "objective=clip",
                "trainer=fsdp",
                "trainer.devices=2",
                "+callbacks.average.decay=0.9",
                "+callbacks.average._target_=lightning.pytorch.callbacks.EMAWeightAveraging",
            ],
            "callbacks.average: Lightning's averaging copies the weights",
        ),
        (["objective=clip", "exchange=rign"], "^exchange=rign; set it to gather or ring"),
    ],
)
def test_a_ring_needs_pairs(options: list[str], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault) as caught:
        check(compose(options))
    assert len(caught.value.faults) == 1


def test_a_needed_argument_is_missed() -> None:
    cfg = compose(["run_folder=x"])
    OmegaConf.set_struct(cfg, False)
    del cfg.objective.text
    with pytest.raises(ConfigError, match=r"objective\.text has no value"):
        check(cfg)


def test_a_gpu_trains_in_bf16_and_evaluates_in_float32() -> None:
    assert compose(["trainer=gpu"]).trainer.precision == "bf16-mixed"
    assert compose(["trainer=gpu", "trainer.precision=32-true"]).trainer.precision == "32-true"
    assert compose().trainer.precision == compose(["trainer=gpu"], root="evaluate").trainer.precision == "32-true"


def test_smoke_shrinks_and_the_command_line_counts_more() -> None:
    cfg = compose(["smoke=true"])
    assert (cfg.data.batch_size, cfg.image_size, cfg.views.main.size) == (8, 32, 32)
    assert compose(["smoke=true", "data.batch_size=4"]).data.batch_size == 4


def test_a_folder_of_ones_own_comes_first(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /objective: clip\nname: mine\n"
    )
    cfg = compose(["experiment=mine"], config_dir=tmp_path)
    assert (cfg.name, "cross_uniformity" in cfg.objective.weights) == ("mine", False)
    with pytest.raises(ConfigError, match="did you mean 'mine'"):
        compose(["experiment=mien"], config_dir=tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        compose(config_dir=tmp_path / "nowhere")


def test_a_saved_config_is_read_back_and_its_values_can_change(tmp_path: Path) -> None:
    cfg = compose(["seed=5", f"run_folder={tmp_path}"])
    OmegaConf.save(cfg, tmp_path / "config.yaml")
    assert load_run(tmp_path) == cfg
    assert load_run(tmp_path, ["data.num_workers=3"]).data.num_workers == 3
    with pytest.raises(ConfigError, match="only single values"):
        load_run(tmp_path, ["objective=clip"])
    with pytest.raises(ConfigError, match=r"did you mean 'optim\.lr'"):
        load_run(tmp_path, ["optim.lrr=1"])
    with pytest.raises(ConfigError, match="is not a run folder"):
        load_run(tmp_path / "nowhere")


def printed(program: str) -> list[str]:
    """The lines that a program prints in a process of its own."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_a_mistyped_option_is_refused_before_torch_is_imported() -> None:
    lines = printed(
        "import sys\nfrom repr.fit import main\n"
        "try:\n    main(['optim.lrr=1'])\n"
        "except SystemExit as stop:\n    print(stop.code)\nprint('torch' in sys.modules, 'lightning' in sys.modules)"
    )
    assert lines[0].startswith("error: there is no option 'optim.lrr'; did you mean 'optim.lr'?")
    assert lines[-1] == "False False"


@pytest.mark.slow
def test_what_reads_no_captions_does_not_wait_for_open_clip() -> None:
    lines = printed(
        "import sys\nfrom repr.config import compose\nfrom repr.config_check import check\n"
        "from repr.fit import _built\n"
        "cfg = compose(['objective=byol', 'smoke=true', 'run_folder=run'])\ncheck(cfg)\n_built(cfg, None)\n"
        "print('torch' in sys.modules, 'open_clip' in sys.modules)"
    )
    assert lines[-1] == "True False"


def test_a_default_stands_in_its_constructor_alone() -> None:
    """No file of conf/ repeats the value that the class or function of ours has which it names; recipes may."""

    def nodes(node: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for key, value in (node or {}).items() if isinstance(node, dict) else ():
            yield from nodes(value, f"{path}.{key}")
        if isinstance(node, dict) and "_target_" in node:
            yield path, node

    # A protocol is known by the options that its file spells out.
    files = [path for path in CONF.rglob("*.yaml") if not {"experiment", "eval", "evaluate"} & set(path.parts)]
    referred = set(re.findall(r"\$\{([\w.]+)\}", "".join(path.read_text() for path in CONF.rglob("*.yaml"))))
    twice = []
    for file in files:
        for path, node in nodes(yaml.safe_load(file.read_text()), file.parent.name):
            own = arguments(node["_target_"]) or {}
            same = [
                key for key in own.keys() & node.keys() if own[key] is not NOT_LITERAL and listed(own[key]) == node[key]
            ]
            twice += [f"{file.name}: {path}.{key}" for key in same if f"{path}.{key}" not in referred]
    assert twice == []


def listed(value: Any) -> Any:
    """As YAML has it."""
    return list(value) if isinstance(value, tuple) else value


def test_options_that_no_file_spells_out_are_options_and_are_shown_as_defaults() -> None:
    cfg = compose(["objective=swav", "objective.temperature=0.2", "optim.warmup_steps=3"])
    assert (cfg.objective.temperature, cfg.objective.epsilon, cfg.optim.warmup_steps) == (0.2, 0.05, 3)
    text = show(cfg)
    assert yaml.safe_load(text) == yaml.safe_load(OmegaConf.to_yaml(cfg))
    assert "  epsilon: 0.05  # default of SwAV" in text
    assert "  temperature: 0.2\n" in text
    with pytest.raises(ConfigError, match=r"objective.epsilon takes a number \(it is 0.05\), but got 'small'"):
        compose(["objective=swav", "objective.epsilon=small"])
    with pytest.raises(ConfigError, match=r"there is no option 'objective.epsilom'; did you mean 'objective.epsilon'"):
        compose(["objective=swav", "objective.epsilom=0.1"])


def test_check_refuses_what_constructors_refuse() -> None:
    with pytest.raises(ConfigError, match=r"of equal widths, and there are: image 128, text 64\. Set embed_dim"):
        check(compose(["objective=m3col", "text.output_dim=64"]))


IDLE = ["objective=m3col", *(f"objective.weights.{term}=0" for term in ("fusion", "text_head"))]
IMAGES = ["eval=images", "tokenizer=null"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["backbone.name=test_vit", "image_size=50"], "50 x 50 pixels .*: set image_size to 48"),
        (["backbone.name=vgg11", "image_size=20"], "20 x 20 pixels .*: set image_size to 32"),
        (["objective=simclr", "views=simclr", *IMAGES, "data.batch_size=1"], "set data.batch_size to 2 or more"),
        (["objective=vicreg", "views=simclr", *IMAGES, "data.batch_size=1"], "set data.batch_size to 2 or more"),
        (["data.batch_size=1"], "set data.batch_size to 2 or more"),
        (["+backbone.in_chans=1"], "backbone.in_chans=1: views have three channels"),
        (["optim.name=adan"], "another number of betas"),
        (["optim.name=adahessian"], "adahessian makes no step"),
        (["image_size=[32,48]"], "image_size=.*one number of pixels"),
        (
            ["objective=mae", *IMAGES, "image_size=64", "backbone.name=vit_tiny_r_s16_p8_224"],
            "convolutions before its patches",
        ),
        (
            ["backbone.name=resnet50", "image_size=16", "trainer.accelerator=cpu", "trainer.precision=bf16-mixed"],
            "layer4.0.conv2 sees maps of one pixel.*set trainer.precision=32-true",
        ),
        ([*IDLE, "objective.weights.contrast=0"], "no weighted term learns from text"),
    ],
)
def test_what_a_backbone_or_an_optimizer_cannot_do_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check(compose([*overrides, "run_folder=x"]))


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["trainer=cpu", "optim.lr=1e-3"], "demo"),
        (["data=folder", "data.train.root=x", "eval=default"], "cuaxu_scratch-folder"),
        (["objective=simclr"], "simclr-emoji"),
        (["experiment=mae_emoji", "data=folder", "data.train.root=x"], "mae_emoji"),
        (["objective=simclr", "name=mine"], "mine"),
    ],
)
def test_a_run_has_the_name_of_what_is_trained(overrides: list[str], name: str) -> None:
    cfg = compose(overrides)
    assert cfg.name == name
    assert "hydra" not in cfg


def test_a_text_tower_without_a_context_length_is_told_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "own.yaml").write_text(
        "_target_: open_clip.hf_model.HFTextEncoder\nmodel_name_or_path: own\noutput_dim: 8\npretrained: false\n"
    )
    with pytest.raises(ConfigError) as caught:
        check(compose(["text=hf", "run_folder=x", "+callbacks.mine=[a,???]"]))
    assert caught.value.faults == [
        f"{name} has no value: set it" for name in ("callbacks.mine.1", "text.model_name_or_path")
    ]
    with pytest.raises(ConfigError, match=r"tokenizer.context_length has no value .*: set it"):
        check(compose(["text=own", "run_folder=x"], config_dir=tmp_path))
    if find_spec("transformers") is None:
        with pytest.raises(ConfigError, match="pip install transformers"):
            check(compose(["text=own", "tokenizer.context_length=8", "run_folder=x"], config_dir=tmp_path))


def test_a_path_with_a_comma_is_told_how_to_be_quoted() -> None:
    with pytest.raises(ConfigError, match="""'run_folder="/a,b"'"""):
        compose(["run_folder=/a,b"])
    assert compose(['run_folder="/a,b"']).run_folder == "/a,b"


def test_a_backbone_wider_than_it_says_checks() -> None:
    check(compose(["backbone.name=mobilenetv3_small_050", "run_folder=x"]))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["objective=mae", "views=none"], "masks a view, and views is empty: set views=mae"),
        (["objective=swav", "objective.queue_length=[]"], r"objective.queue_length takes one value, such as 0"),
        (["data.batch_size=null"], "data.batch_size=None; set it to a whole number"),
        (["views.main.count=null"], "views.main.count=None; set it to a whole number"),
        (["seed=null"], r"seed is null, and repr.data.datamodule.DataModule needs a value: set it$"),
        (["data.mean=null"], "data.mean is null"),
        (["data.train=null"], "data.train is null"),
        (["optim.options=null"], "optim.options is null"),
        (["optim.lr=null"], "optim.lr is null, and repr.optim.Optim needs a value: set it, such as to 0.001"),
        (["backbone.name=null"], "backbone.name is null"),
        (["callbacks.collapse.every=null"], "callbacks.collapse.every is null"),
        (["callbacks=null"], "callbacks maps names to values, and is None"),
        (["data.eval={}"], r"data.eval=\{\} changes nothing.*; ~data.eval.val leaves one entry out"),
        (["objective.weights={}"], r"objective.weights=\{\} changes nothing"),
        (["callbacks={}"], r"callbacks=\{\} changes nothing"),
    ],
)
def test_values_of_another_kind_are_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check(compose([*overrides, "run_folder=x"]))


def test_no_more_processes_load_data_than_there_are_cores() -> None:
    workers = OmegaConf.create({"few": "${workers:1}", "many": "${workers:10000}"})
    assert workers.few == 1
    assert workers.many == num_cores()
    cfg = compose(["experiment=simclr_rn50", "data=folder", "data.train.root=IMAGES"])
    assert cfg.data.num_workers == min(8, num_cores())

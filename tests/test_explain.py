"""What list, explain and --help tell: of every group, of every option, within 80 columns."""

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from repr.__main__ import VERBS
from repr.__main__ import main as command
from repr.catalog import CONF, group_heads, groups, head
from repr.config import ConfigError, compose, walk
from repr.explain import explained, option, show
from repr.fit import main as fit
from repr.listing import listed
from repr.origins import origins
from repr.signatures import described


@pytest.fixture(autouse=True)
def columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def own(tmp_path: Path) -> str:
    """A folder of the user's own with an objective and an experiment."""
    for name, text in {
        "objective/mine.yaml": "# Mine: a method of my own.\ndefaults:\n  - clip\n  - _self_\n"
        "temperature: 0.2  # hot\n",
        "experiment/mine_emoji.yaml": "# @package _global_\n# My method on the emoji.\ndefaults:\n"
        "  - override /objective: mine\nname: mine_emoji\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir()
        path.write_text(text)
    return str(tmp_path)


def test_every_file_of_a_group_has_a_head() -> None:
    files = [path for group, names in groups([CONF]).items() if group != "eval/classes" for path in names.values()]
    assert len(files) > 200
    assert not [path for path in files if not 10 < len(head(path)) < 300]


def test_help_of_fit_lists_groups_and_experiments(own: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        fit(["--config-dir", own, "--help"])
    assert left.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    told = {line.split()[0]: line for line in lines if line.startswith("  ") and line.split()}
    assert {*group_heads(), *(path.stem for path in (CONF / "experiment").glob("*.yaml"))} <= told.keys()
    assert told["simclr_rn50"].endswith("SimCLR with a ResNet-50.")
    assert told["mine_emoji"].endswith("My method on the emoji.")


def test_list_names_every_option_of_every_group(own: str) -> None:
    for group, names in groups([CONF]).items():
        first, *lines = listed(group)
        assert first.startswith(f"{group}=NAME")
        assert {line.split()[0] for row in lines for line in row.splitlines() if line[2:3] != " "} == names.keys()
        assert all(len(line) <= 80 for row in lines for line in row.splitlines())
    assert [row.split()[0] for row in listed(None)][:2] == ["experiment", "objective"]
    assert any(row.split() == ["mine", "Mine:", "a", "method", "of", "my", "own."] for row in listed("objectives", own))


def test_explain_knows_every_option_of_the_default_config() -> None:
    cfg, given = compose(), origins("fit", [], None)
    keys = [path for path, _ in walk(cfg) if path and ".classes." not in path]
    assert len(keys) > 200
    meant = 0
    for key in keys:
        lines = "\n".join(option(cfg, key, given)).splitlines()
        assert lines[0].startswith(f"{key} = "), key
        assert any(
            re.match(r"  from    (conf/\w+|the default of (repr|lightning)\.|the experiment)", x) for x in lines
        ), key
        assert max(map(len, lines[1:])) <= 80, key
        meant += any(re.match("  (means|there|builds) ", line) for line in lines)
    assert meant > 0.8 * len(keys)


@pytest.mark.parametrize(
    ("key", "overrides", "words"),
    [
        ("optim.lr", [], ["= 0.005", "from conf/experiment/demo.yaml", "type float", "means peak learning rate."]),
        ("optim.lr", ["optim.lr=3"], ["= 3", "from the command line"]),
        ("optim.warmup_steps", ["smoke=true"], ["= 0", "from smoke=true"]),
        ("optim.cooldown_steps", [], ["= 0", "from the default of repr.optim.Optim"]),
        ("objective.image_token", [], ["= null", "default of repr.objectives.image_text.ImageText"]),
        ("data.train.root", ["data=folder"], ["= ???", "from conf/data/folder.yaml", "means the folder."]),
        ("callbacks.guard.action", [], ["= stop", "choose stop, skip"]),
        ("eval.knn.ks", [], ["= [10, 20, 100, 200]", "from conf/evaluate/knn.yaml", "DINO's"]),
        ("objective.chunk_size", [], ["${chunk_size}, which is null", "there rows of the matrix of pairs"]),
        ("objective.dim", ["objective=simclr"], ["means width of what the heads give."]),
        ("views.main.ratio", [], ["means range of the crop's width / height, drawn log-uniformly"]),
        ("trainer.benchmark", [], ["+trainer.benchmark=", "the default of lightning.pytorch.Trainer"]),
        ("objective", ["objective=slip"], ["objective/part/slip.yaml, then conf/objective/slip.yaml", "=NAME"]),
        ("features", [], ["= float32", "from conf/evaluate.yaml"]),
        ("evaluate", [], ["evaluate=NAME: a protocol"]),
    ],
)  # fmt: skip
def test_explain_tells_value_place_and_meaning(key: str, overrides: list[str], words: list[str]) -> None:
    told = " ".join("\n".join(explained(key, overrides)).split())
    for part in words:
        assert part in told, told


def test_explain_reads_files_of_ones_own(own: str) -> None:
    told = "\n".join(explained("objective.temperature", ["experiment=mine_emoji"], own))
    assert re.search(rf"= 0.2\n  from    {own}/objective/mine.yaml\n(.*\n)*  note    hot", told)


@pytest.mark.parametrize(
    ("key", "near"), [("objective.tempratur", "objective.temperature"), ("optm.lr", "optim.lr"), ("datta", "data")]
)
def test_a_wrong_key_gives_the_nearest(key: str, near: str) -> None:
    for ask in (lambda: list(explained(key)), lambda: show(compose(), key)):
        with pytest.raises(ConfigError, match=f"did you mean '{near}'"):
            ask()


def test_show_prints_a_part_of_the_config_as_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    for key in ("optim", "data.eval", "optim.options.betas", "seed"):
        fit(["--show", key, "seed=3"])
        ((name, part),) = OmegaConf.create(capsys.readouterr().out).items()
        cfg = compose(["seed=3"])
        assert name == key.rpartition(".")[2]
        assert part == OmegaConf.select(cfg, key)
    fit(["--show", "seed=4"])
    assert OmegaConf.create(capsys.readouterr().out).seed == 4


def test_nothing_is_imported_to_describe_arguments() -> None:
    assert "accelerator" in described("lightning.pytorch.Trainer")
    assert described("repr.objectives.image_text.ImageText")["weights"].text.startswith("weight of each loss term")
    assert described("nowhere.at.All") == described("repr.nowhere.All") == {}


def test_a_wrong_verb_or_group_gives_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    for words, near in ((["fti"], "fit"), (["list", "expriments"], "experiment"), (["list", "dat"], "data")):
        with pytest.raises(SystemExit, match=f"did you mean '{near}'"):
            command(words)
    command([])
    out = capsys.readouterr().out
    assert all(f"\n  {verb} " in out for verb in VERBS)

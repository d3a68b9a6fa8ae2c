"""A run folder of a stranger: what it names is not built, and nothing is written elsewhere."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from repr.config import ConfigError, compose
from repr.evaluate.__main__ import main as evaluate
from repr.export.__main__ import main as export
from repr.fit import fit, main
from repr.runs.folder import CONFIG, load_run
from repr.runs.trust import resuming
from tests.test_fit import TINY


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    fit(compose([*TINY, f"run_folder={folder}", "eval.zero_shot=null", "eval.headline=[]"]))
    return folder


@pytest.fixture
def edit(trained: Path, tmp_path: Path) -> Any:
    """Gives a copy of the run whose config has another value at a dotted place."""

    def edit(place: str, value: Any) -> Path:
        folder = tmp_path / "run"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(trained, folder)
        cfg = yaml.safe_load((folder / CONFIG).read_text())
        cfg["run_folder"] = str(folder)
        *parents, key = place.split(".")
        node = cfg
        for parent in parents:
            node = node[parent]
        node[key] = value
        (folder / CONFIG).write_text(yaml.safe_dump(cfg))
        return folder

    return edit


def refusal(program: Any, *words: str) -> str:
    with pytest.raises(SystemExit) as refused:
        program(list(words))
    return str(refused.value)


def test_nothing_that_a_stranger_names_is_called(edit: Any, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    harm = {"_target_": "os.mkdir", "_args_": [str(mark)]}
    places = {
        "objective.optim": harm,
        "objective.image_projection": [{"deep": [harm]}],
        "tokenizer": harm,
        "data.train": harm,
        "data.eval.val": {**harm, "_target_": "repr.runs.folder.os.mkdir"},
        "backbone": {**harm, "_target_": "repr.models.backbone.timm.models._hub.os.mkdir"},
        "text": {"_target_": "hydra.utils.get_class", "path": "os.mkdir"},
        "views": "${oc.decode:\"{_target_: os.mkdir, _args_: ['" + str(mark) + "']}\"}",
    }
    for place, value in places.items():
        folder = edit(place, value)
        for program, words in (
            (main, [f"resume={folder}", "trainer.max_epochs=3"]),
            (evaluate, [f"model={folder}", "eval=[geometry]"]),
            (export, [f"run={folder}", "to=open_clip", f"out={tmp_path}/out"]),
        ):
            if program is not main and place == "views":
                continue  # it builds no views of the run
            message = refusal(program, *words)
            assert "names what a run folder of someone else must not build" in message, (place, message)
            assert "os.mkdir" in message
            assert not mark.exists()
            assert not (tmp_path / "out").exists()


def test_callbacks_write_in_the_run_folder_alone(edit: Any, tmp_path: Path) -> None:
    message = refusal(main, f"resume={edit('callbacks.guard.folder', str(tmp_path / 'elsewhere'))}")
    assert "lies outside" in message
    message = refusal(main, f"resume={edit('callbacks.other', {'_target_': 'os.mkdir', '_args_': ['x']})}")
    assert "callbacks.other: os.mkdir" in message
    folder = edit("callbacks.other", {"_target_": "os.mkdir", "_args_": [str(tmp_path / "mark")]})
    evaluate([f"model={folder}", "eval=[geometry]", "trainer.accelerator=cpu"])  # it builds no callbacks of the run
    assert not (tmp_path / "mark").exists()


def test_a_stage_of_a_stranger_is_looked_at_too(edit: Any) -> None:
    folder = edit("seed", 1)
    shutil.copytree(folder, folder / "stage-0")
    (folder / "stage-0" / CONFIG).write_text((folder / CONFIG).read_text().replace("repr.optim.Optim", "os.mkdir"))
    assert "os.mkdir" in refusal(main, f"resume={folder}")
    assert "os.mkdir" in refusal(export, f"run={folder}", "to=open_clip", f"out={folder}/out")


def test_arguments_that_make_a_library_unpickle_are_refused(edit: Any) -> None:
    for key in ("checkpoint_path", "pretrained_cfg_overlay"):
        assert f"backbone.{key}" in refusal(main, f"resume={edit(f'backbone.{key}', 'evil.pt')}")


def test_ones_own_classes_are_built_when_one_says_so(edit: Any) -> None:
    folder = edit("callbacks.tell", {"_target_": "tests.signals.Tell"})
    assert "trust=true" in refusal(main, f"resume={folder}")
    assert resuming(load_run(folder, trust=True)) == f"resume={folder} trust=true"
    main([f"resume={folder}", "trust=true", "trainer.max_epochs=2"])


def test_a_stored_config_does_not_trust_itself(edit: Any) -> None:
    folder = edit("callbacks.tell", {"_target_": "tests.signals.Tell"})
    (folder / CONFIG).write_text((folder / CONFIG).read_text().replace("trust: false", "trust: true"))
    assert "tests.signals.Tell" in refusal(main, f"resume={folder}")


def test_aliases_and_interpolations_do_not_fill_the_memory(trained: Path, tmp_path: Path) -> None:
    text = (trained / CONFIG).read_text()
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    links = ["b0: [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    links += ["b{}: [{}]".format(n, ", ".join([f"'${{b{n - 1}}}'"] * 10)) for n in range(1, 10)]
    for more, words in (
        ("\n".join(lines), "its aliases make more than 100,000 values"),
        ("\n".join(links), "has more than 100,000 values"),
        ("a: &a [*a]", "hold themselves"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("a: \0", "is damaged"),
        ("seed: 1", "duplicate key"),
    ):
        (tmp_path / CONFIG).write_text(f"{text}\n{more}\n")
        with pytest.raises(ConfigError, match=words):
            load_run(tmp_path)
    for content, words in ((b"", "empty"), (b"- 1", "a list"), (b"\xff\xfe\x00", "is damaged"), (b"x", "has no name")):
        (tmp_path / CONFIG).write_bytes(content)
        with pytest.raises(ConfigError, match=words):
            load_run(tmp_path)


@pytest.mark.slow
def test_a_run_of_two_processes_is_refused_as_one_is(edit: Any) -> None:
    folder = edit("callbacks.other", {"_target_": "os.mkdir", "_args_": ["x"]})
    command = [sys.executable, "-m", "repr.fit", f"resume={folder}", "trainer=ddp", "trainer.accelerator=cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "callbacks.other: os.mkdir" in done.stderr

"""What README and docs tell to type is typed here."""

import io
import json
import re
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml

from repr.config import CONF, compose
from repr.config_check import check
from repr.metrics.classes import Classes
from repr.runs.checkpoint_files import read_checkpoint
from tests.conftest import Ended, RunGroup
from tests.objectives.conftest import make_batch
from tests.stores import s3_served

ROOT = Path(__file__).parent.parent
PAGES = (
    "start",
    "data",
    "which_objective",
    "stages",
    "large_batches",
    "evaluation",
    "export",
    "a_run_that_stops",
    "weights",
)
GUIDE = ("README.md", *(f"docs/{page}.md" for page in PAGES))


def blocks(document: str, language: str, section: str = "") -> list[str]:
    """The fenced blocks of a language, in order; of one section, or of the whole document."""
    text = (ROOT / document).read_text(encoding="utf-8")
    if section:
        text = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(document: str, section: str = "") -> list[str]:
    joined = "\n".join(blocks(document, "bash", section)).replace("\\\n", " ")
    return [line.split("  #")[0].strip() for line in joined.splitlines() if line.strip() and not line.startswith("#")]


def told(start: str) -> list[str]:
    """The commands of README and guide that begin so, each once."""
    found = (command for page in GUIDE for command in commands(page))
    return [*dict.fromkeys(command for command in found if command.startswith(start))]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the guide calls IMAGES (two folders of pictures with captions), TABLE.csv, SHARDS and WEIGHTS.pth."""
    from repr.data.sources.emoji import Emoji

    folder, source = tmp_path_factory.mktemp("pictures"), Emoji("val")
    root = folder / "IMAGES"
    (folder / "SHARDS").mkdir()
    table = ["image,title,words,split"]
    with tarfile.open(folder / "SHARDS" / "a.tar", "w") as archive:
        for i in range(40):
            category, title = source.attributes["category"][i * 25], source.captions(i * 25)[0]
            path = root / category.replace(" ", "_") / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            source.image(i * 25).save(path)
            path.with_suffix(".txt").write_text(title)
            table.append(f'IMAGES/{path.parent.name}/{i}.png,"{title}",{category},{"val" if i % 5 == 0 else "train"}')
            members = {"webp": source.encoded(i * 25), "txt": title, "json": json.dumps({"category": category})}
            for ending, data in members.items():
                content = data if isinstance(data, bytes) else data.encode()
                member = tarfile.TarInfo(f"{i}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    (folder / "TABLE.csv").write_text("\n".join(table))
    torch.save(timm.create_model("test_resnet").state_dict(), folder / "WEIGHTS.pth")
    return folder


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = [
        command.split()[1]
        for command in commands("README.md") + commands("CONTRIBUTING.md")
        if command.startswith("make ")
    ]
    assert named[:2] == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in named)
    assert "\nmake test\n" in (ROOT / ".ci" / "run").read_text()
    assert re.search(r"^demo:.*\n\t\$\(RUN\) repr\.fit$", makefile, re.MULTILINE)


# An experiment as it stands is run by test_experiments.py.
AS_IT_STANDS = re.compile(r"python -m repr.fit experiment=\w+( smoke=true)?")
FITS = [
    command
    for command in told("python -m repr.fit")
    if not AS_IT_STANDS.fullmatch(command) and "--config-dir" not in command
]
AT_ONCE = "--show"  # how the one ends that is run by default


@pytest.mark.parametrize(
    "command",
    [pytest.param(c, marks=() if c.endswith(AT_ONCE) else pytest.mark.slow) for c in FITS],
)
def test_every_command_of_the_guide_runs(
    command: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_group: RunGroup
) -> None:
    """As it stands, but made small; DDP's processes are started by Lightning, FSDP2's as by torchrun."""
    from repr.fit import main

    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    model = "backbone.name=" + ("test_vit" if "mae" in command else "test_resnet")
    if any(word.startswith("resume=") for word in words):
        ((status, out),) = run_group(1, "smoke=true", f"run_folder={tmp_path}", "backbone.name=test_resnet")
        assert status == 0, out
        words = [f"resume={tmp_path}" if word.startswith("resume=") else word for word in words]
    else:
        for name in ("IMAGES", "TABLE.csv", "SHARDS", "WEIGHTS.pth"):
            words = [word.replace(name, str(pictures / name)).replace("BUCKET", "bucket") for word in words]
        words += ["smoke=true", f"run_folder={tmp_path}", model, "text.layers=1"]
        words += ["trainer.accelerator=cpu"] if "--show" not in words else []
    monkeypatch.chdir(tmp_path)
    if "trainer=fsdp" in command or "resume=" in command:
        for status, out in run_group(2 if "trainer=fsdp" in command else 1, *words[3:]):
            assert status == 0, out
    elif "trainer" in command or command.endswith(AT_ONCE):
        done = subprocess.run(words, cwd=tmp_path, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        with s3_served(pictures / "SHARDS", "bucket") if "s3://" in command else nullcontext((None, {})) as (_, found):
            for name, value in found.items():
                monkeypatch.setenv(name, value)
            main(words[3:])


def test_the_options_of_other_pages_exist() -> None:
    """Their commands want GPUs, several machines or data of one's own."""
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} - {*GUIDE}
    lines = [command.partition(" # ")[0] for page in sorted(pages) for command in commands(page)]
    told = [shlex.split(line.partition("-m repr.fit ")[2]) for line in lines if "-m repr.fit " in line]
    assert len(told) > 8
    for words in told:
        if not any(word.startswith("resume=") for word in words):
            compose(words)


def test_experiments_of_the_guide_exist() -> None:
    of_conf = (command for command in told("python -m ") if "--config-dir" not in command)
    named = [re.findall(r"experiment=(\w+)", command) for command in of_conf]
    assert {name for names in named for name in names} <= {path.stem for path in (CONF / "experiment").glob("*.yaml")}


@pytest.mark.slow
def test_the_exports_of_the_guide_are_made_and_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, but for the one that verifies."""
    from repr.config import compose
    from repr.export.__main__ import main
    from repr.fit import fit

    small = ["smoke=true", f"run_folder={tmp_path}/run", "backbone.name=test_resnet", "text.layers=1"]
    fit(compose([*small, "eval=images"]))
    monkeypatch.chdir(tmp_path)
    exports = told("python -m repr.export ")
    assert len(exports) == 2
    for command in exports:
        main([f"run={tmp_path}/run" if word.startswith("run=") else word for word in shlex.split(command)[3:]])
    assert {path.name for path in (tmp_path / "DIR").iterdir()} == {"config.json", "model.safetensors", "written.json"}


TOOLS = [command for command in told("python -m ") if not re.search(r"repr\.(fit|export|evaluate)", command)]


@pytest.mark.slow
def test_the_evaluations_of_the_guide_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from repr.config import compose
    from repr.evaluate.__main__ import main
    from repr.export.__main__ import main as export
    from repr.fit import fit

    monkeypatch.chdir(tmp_path)
    fit(compose(["smoke=true", "run_folder=run", "backbone.name=test_resnet", "text.layers=1", "eval=images"]))
    export(["run=run", "to=open_clip", "out=DIR"])
    evaluations = told("python -m repr.evaluate ")
    assert len(evaluations) == 2
    for number, command in enumerate(evaluations):
        words = ["model=run" if word.startswith("model=runs/") else word for word in shlex.split(command)[3:]]
        small = ["data.num_workers=0", "data.bank_size=200", "trainer.accelerator=cpu"]
        main([*words, *small, f"out=out{number}"])
        assert json.loads((tmp_path / f"out{number}" / "metrics.json").read_text())["results"]


@pytest.mark.slow
@pytest.mark.parametrize("command", TOOLS)
def test_every_other_command_of_the_guide_runs(
    command: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: Callable[..., Ended]
) -> None:
    """Tools are run in the repository, everything else anywhere."""
    for name, path in {"IMAGES": pictures / "IMAGES", "PACKED": tmp_path / "packed"}.items():
        command = command.replace(name, str(path))
    _, _, module, *words = shlex.split(command)
    monkeypatch.chdir(ROOT if module.startswith("tools.") else tmp_path)
    program(module, *words)
    (folder,) = tmp_path.iterdir()
    made = {"data-check": {"check.json", "contact_sheet.png"}, "packed": {"train-00000.tar", "SHA256SUMS"}}[folder.name]
    assert made <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("snippet", blocks("docs/in_a_notebook.md", "python"), ids=["collate", "by hand"])
def test_the_snippets_for_a_notebook_run(snippet: str, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pictures)
    exec(compile(snippet.replace('"resnet50"', '"test_resnet"').replace("224", "32"), "in_a_notebook.md", "exec"), {})


def test_the_recipe_of_the_guide_runs(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from repr.fit import main

    (recipe,), (command,) = blocks("docs/start.md", "yaml"), [c for c in told("python -m repr.fit") if "drawings" in c]
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "drawings.yaml").write_text(
        recipe.replace("IMAGES", str(pictures / "IMAGES")).replace("HELD_OUT", str(pictures / "IMAGES"))
    )
    monkeypatch.chdir(tmp_path)
    main([*shlex.split(command)[3:], "smoke=true", "backbone.name=test_resnet", "text.layers=1"])
    assert (tmp_path / "runs" / "smoke" / "drawings").is_dir()
    assert "ridge_label" in capsys.readouterr().out


def test_the_mixture_of_the_guide_runs(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from repr.config import compose
    from repr.fit import fit
    from repr.runs.folder import load_run

    config, classes = blocks("docs/data.md", "yaml")
    (tmp_path / "fish.yaml").write_text(classes)
    assert list(Classes.load(tmp_path / "fish.yaml").names) == ["n01440764", "1"]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "ours.yaml").write_text(config)
    monkeypatch.chdir(pictures)
    small = ["data=ours", "eval=images", "smoke=true", "backbone.name=test_resnet", "text.layers=1"]
    cfg = compose([*small, f"run_folder={tmp_path}/run"], config_dir=tmp_path)
    assert fit(cfg) == {}
    assert load_run(tmp_path / "run").data.train.weights == [1, 3]


@pytest.mark.slow
def test_the_protocol_of_contributing_runs_in_both_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: Callable[..., Ended]
) -> None:
    monkeypatch.chdir(tmp_path)
    (code,), (config,) = (blocks("CONTRIBUTING.md", kind, "Add an evaluation protocol") for kind in ("python", "yaml"))
    (tmp_path / "lengths.py").write_text(code)
    (tmp_path / "conf" / "evaluate").mkdir(parents=True)
    (tmp_path / "conf" / "evaluate" / "lengths.yaml").write_text(config)
    words = commands("CONTRIBUTING.md", "Add an evaluation protocol")
    fit, evaluate = (command for command in words if command.startswith("python -m repr."))
    small = [
        "smoke=true",
        "run_folder=RUN",
        "backbone.name=test_resnet",
        "text.layers=1",
        "trainer.limit_val_batches=1.0",
    ]
    for command, more in ((fit, small), (evaluate, ["out=out"])):
        program(*shlex.split(command)[2:], *more, "trainer.accelerator=cpu")
    during = json.loads((tmp_path / "RUN" / "results.json").read_text())
    after = json.loads((tmp_path / "out" / "metrics.json").read_text())["results"]
    for name in ("val/length", "test_style/length"):
        value, chance = during[name]["value"], during[name]["chance"]
        assert (after[name]["value"], after[name]["chance"]) == pytest.approx((value, chance), rel=1e-5)
        assert after[name]["protocol"].items() >= {"eval": "lengths", "features": "image", "resolution": 32}.items()


@pytest.mark.slow
def test_the_source_of_contributing_works_as_it_stands(tmp_path: Path) -> None:
    section = "Add a source"
    (code,), (command,) = blocks("CONTRIBUTING.md", "python", section), commands("CONTRIBUTING.md", section)
    (tmp_path / "arrays.py").write_text(code)
    pictures = np.random.default_rng(0).integers(0, 256, (300, 40, 32, 3), dtype=np.uint8)
    for name in ("PICTURES", "HELD_OUT"):
        np.savez(tmp_path / f"{name}.npz", pictures=pictures, labels=np.resize(["cat", "dog", "cat"], 300))
    small = ["smoke=true", "run_folder=run", "backbone.name=test_resnet", "text.layers=1", "trainer.accelerator=cpu"]
    words = [sys.executable, *shlex.split(command)[1:], *small]
    done = subprocess.run(words, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {"held_out/i2t_R@5", "held_out/ridge_label"} <= results.keys()


@pytest.mark.slow
def test_the_objective_of_the_docs_works_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: Callable[..., Ended]
) -> None:
    """BYOL as a new user adds it: trained, its test run, stopped and resumed, and its teacher exported."""
    page = "docs/add_an_objective.md"
    (flow, test), (config,) = blocks(page, "python"), blocks(page, "yaml")
    (tmp_path / "byol.py").write_text(flow)
    (tmp_path / "test_byol.py").write_text(test.replace("repr.objectives.byol", "byol"))
    (tmp_path / "conf" / "objective").mkdir(parents=True)
    module = yaml.safe_load(config)["_target_"]
    assert module == "repr.objectives.byol.BYOL"
    (tmp_path / "conf" / "objective" / "byol.yaml").write_text(config.replace(module, "byol.BYOL"))

    monkeypatch.chdir(tmp_path)
    program("pytest", "-q", "test_byol.py")
    (command,) = commands(page)
    small = ["+objective.hidden_dim=32", "+objective.dim=16", "backbone.name=test_resnet", "trainer.max_epochs=2"]
    out = program(*shlex.split(command)[2:], *small, "--config-dir", "conf", "run_folder=run").out
    assert "knn_category" in out
    first = read_checkpoint(tmp_path / "run" / "checkpoints" / "step=4.ckpt")["state_dict"]
    name = next(name for name, tensor in first.items() if name.startswith("backbone.") and tensor.ndim == 4)
    student, teacher = first[name], first[f"teacher.{name}"]
    assert 0 < (student - teacher).abs().max() < 0.1  # it follows slowly
    program("repr.fit", "resume=run", "trust=true", "trainer.max_epochs=3")
    assert (tmp_path / "run" / "checkpoints" / "step=6.ckpt").is_file()
    done = program("repr.export", "run=run", "to=timm", "out=export", "weights=teacher", "trust=true")
    assert "verified" in done.out


def test_the_hybrid_of_the_docs_works_as_it_stands(tmp_path: Path) -> None:
    """In a notebook, and as a file of one's own."""
    page, names = "docs/hybrid.md", dict[str, Any]()
    ((code,), (config,)) = blocks(page, "python"), blocks(page, "yaml")
    exec(code, names)
    objective = names["objective"]
    batch = make_batch(4)
    batch |= {"views": [torch.randn(4, 3, 48, 48) for _ in range(3)], "text": torch.randint(1, 100, (4, 16))}
    terms = objective.step(batch).terms
    assert terms.keys() == {"clip.contrast", "simclr.contrast", "dino.views"}
    objective.total(terms).backward()
    (tmp_path / "objective").mkdir()
    (tmp_path / "objective" / "mine.yaml").write_text(config)
    cfg = compose(["objective=mine", "objective.weights.mae.reconstruction=0.5", "image_size=48"], config_dir=tmp_path)
    check(cfg)
    assert [*cfg.objective.views.simclr] == [1, 2]

"""The card says what the run was, and the hub's library reads it."""

import json
import math
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from repr.export import model_card
from repr.runs.trained import Trained
from tests.export.conftest import trained


def card_of(model: Trained, folder: Path, library: str = "open_clip") -> tuple[ModelCard, str]:
    folder.mkdir(exist_ok=True)
    model_card.write(model, folder, library)
    return ModelCard.load(folder / "README.md"), (folder / "README.md").read_text()


def numbers(card: ModelCard) -> list[tuple[str, str, str, str]]:
    """Name, value, chance and protocol of each number of the table, set by set."""
    rows = [[cell.strip() for cell in line[1:-1].split(" | ")] for line in card.text.splitlines() if line[:2] == "| "]
    found = []
    for column, of_set in enumerate(rows[0][1:-1] if rows else (), start=1):
        for metric, *cells in rows[1:]:
            if cell := cells[column - 1]:
                value, _, chance = cell.partition(" (")
                found.append((f"{of_set}/{metric}", value, chance.removesuffix(")"), cells[-1]))
    return found


def test_the_card_of_a_run(run_and_export: tuple[Path, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(run_and_export[0], tmp_path / "run"))
    results = json.loads((run / "results.json").read_text())
    results["val/not_a_number"] = {"value": math.nan, "chance": None}
    (run / "results.json").write_text(json.dumps(results))
    card, text = card_of(Trained.read(run), tmp_path / "card")
    assert card.data.library_name == "open_clip"
    assert card.data.pipeline_tag == "zero-shot-image-classification"
    assert card.data.license is None  # the user's to choose, and the header says so
    assert "\n# license: yours to choose" in text.split("\n---\n")[0]
    assert sorted(numbers(card)) == sorted(
        (
            name,
            f"{result['value']:.4f}",
            "" if result["chance"] is None else f"{result['chance']:.4f}",
            "end of the run",
        )
        for name, result in results.items()
        if name != "val/not_a_number"
    )
    assert len(text) < 8000
    assert ":func:" not in text
    assert card.data.eval_results is None  # each number is there once
    assert "`ImageText`: Two towers on one sphere. Methods: CLIP (Radford et al., 2021, arXiv 2103.00020)" in card.text
    assert "`Emoji(split=train, captions=['caption'])`" in card.text
    assert "`knn(k=20, temperature=0.07" in card.text
    assert "293 classes of `concept`" in card.text
    top1 = results["val/zero_shot_top1"]
    assert f"| zero_shot_top1 | {top1['value']:.4f} ({top1['chance']:.4f}) |  | end of the run |" in card.text
    recipe = yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])
    assert recipe["optim"]["lr"] == 1e-2
    assert recipe["objective"]["weights"] == {"contrast": 1.0}
    assert str(tmp_path) not in text  # what lies where on the machine is not for the public
    card.data.license = "mit"
    card.save(tmp_path / "filled.md")
    assert ModelCard.load(tmp_path / "filled.md").data.license == "mit"


def test_weights_that_were_not_evaluated_have_no_numbers(run_and_export: tuple[Path, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(run_and_export[0], tmp_path / "run"))
    (last,) = (run / "checkpoints").iterdir()
    earlier = Path(shutil.copy(last, last.with_name("step=1.ckpt")))
    assert numbers(card_of(Trained.read(last), tmp_path / "last")[0])
    card, _ = card_of(Trained.read(earlier), tmp_path / "earlier")
    assert numbers(card) == []
    assert "were not evaluated by the run" in card.text
    card, _ = card_of(trained("pixpro").of_teacher(), tmp_path / "teacher", "timm")
    assert numbers(card) == []
    assert "those of the teacher" in card.text
    assert card.data.pipeline_tag == "image-feature-extraction"


def test_evaluations_of_the_run_are_told_with_their_protocols(
    run_and_export: tuple[Path, Path], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(run_and_export[0], tmp_path / "run"))
    (checkpoint,) = (run / "checkpoints").iterdir()
    results = {
        "val/knn_category": {"value": 0.5, "chance": 0.1, "protocol": {"eval": "knn", "size": 32, "k": 20}},
        "val/knn_a|b/c": {"value": 0.25, "chance": 0.1, "protocol": {"eval": "knn", "size": 32, "k": "1|\n9"}},
    }
    for folder, model in {"a": "runs/run", "b": f"x/{checkpoint.name}", "c": "x/checkpoints/step=7.ckpt"}.items():
        found = {"model": {"name": model}, "data": {"name": "own" if folder == "a" else "emoji"}, "results": results}
        (run / "evaluation" / folder).mkdir(parents=True)
        (run / "evaluation" / folder / "metrics.json").write_text(json.dumps(found))
    card, _ = card_of(Trained.read(run), tmp_path / "card")
    told = [number for number in numbers(card) if number[1] in ("0.5000", "0.2500") and number[3] in "12"]
    assert told == [
        (f"{of_set}/{metric}", value, "0.1000", protocol)
        for of_set in ("val", "emoji/val")
        for metric, value, protocol in (("knn_category", "0.5000", "1"), ("knn_a\\|b/c", "0.2500", "2"))
    ]
    assert "\nProtocols, all with eval=knn, size=32:\n\n1. k=20\n2. k=1| 9\n" in card.text


def test_what_evaluate_has_found_again_is_told_once(run_and_export: tuple[Path, Path], tmp_path: Path) -> None:
    """The run's end is left out; another protocol of ``repr.evaluate`` stands beside the first."""
    run = Path(shutil.copytree(run_and_export[0], tmp_path / "run"))
    end = {name: {"value": 0.5, "chance": None} for name in ("val/a", "val/b")}
    (run / "results.json").write_text(json.dumps(end))
    for folder, value, k in (("a", 0.75, 20), ("b", 0.75, 20), ("c", 0.25, 9)):
        again = {"val/a": {"value": value, "chance": None, "protocol": {"k": k}}}
        found = {"model": {"name": "runs/run"}, "data": {"name": "own"}, "results": again}
        (run / "evaluation" / folder).mkdir(parents=True)
        (run / "evaluation" / folder / "metrics.json").write_text(json.dumps(found))
    card, _ = card_of(Trained.read(run), tmp_path / "card")
    assert numbers(card) == [
        ("val/a", "0.7500", "", "1"), ("val/a", "0.2500", "", "2"), ("val/b", "0.5000", "", "end of the run"),
    ]  # fmt: skip
    assert "\nProtocols:\n\n1. k=20\n2. k=9\n" in card.text


def test_the_card_of_every_stage_together(tmp_path: Path) -> None:
    model_card.write(trained("simclr"), tmp_path, "timm", num_stages=3)
    text = ModelCard.load(tmp_path / "README.md").text
    assert "in 3 stages" in text
    assert "from join import load" in text


@pytest.mark.parametrize("value", ["/home/me/pictures", "~/pictures", ["/home/me/pictures"], {"root": "/me/pictures"}])
def test_paths_are_shortened(value: object) -> None:
    assert "me" not in str(model_card._shortened(value))
    assert "pictures" in str(model_card._shortened(value))

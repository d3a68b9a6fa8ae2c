"""The links of all pages, and what the site is made of; ``make docs`` builds it, where a warning is an error."""

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from docs.generate.heads import faults, head, overrides
from docs.generate.objectives import experiment_files, family, objective_files
from docs.generate.options import loaded
from docs.generate.proofs import golden_tests, losses
from docs.generate.text import CODE, LINK, ROOT, marked, relinked
from repr.config import CONF, compose

PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG", "AGENTS")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks" / "results").glob("*.md")),
]


def anchors(path: Path) -> set[str]:
    """What a link to a heading of a page ends with."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(path: Path) -> list[str]:
    dead = []
    for target, anchor in LINK.findall(CODE.sub("", path.read_text(encoding="utf-8"))):
        to = (path.parent / target).resolve() if target else path
        if target.startswith("generated/"):  # Sphinx tells, where they are
            continue
        if not to.exists() or (anchor and to.suffix == ".md" and anchor[1:] not in anchors(to)):
            dead.append(f"{path.relative_to(ROOT)}: {target}{anchor}")
    return dead


def test_every_link_leads_to_a_file_and_every_anchor_to_a_heading() -> None:
    assert [link for path in PAGES for link in dead_links(path)] == []
    page = ROOT / "docs" / "hybrid.md"
    assert "what-is-evaluated" in anchors(page)


def test_every_objective_and_experiment_has_a_head() -> None:
    assert [fault for path in (*objective_files(), *experiment_files()) for fault in faults(path)] == []


def test_what_pages_and_heads_name_exists() -> None:
    texts = [path.read_text(encoding="utf-8") for path in (*PAGES, *objective_files(), *experiment_files())]
    named = {found for text in texts for found in re.findall(r"\b(experiment|objective)=([a-z]\w*)(?![\w/{])", text)}
    own = {(kind, name) for kind in ("objective", "experiment") for name in ("mine", "ours", "drawings")}
    assert {(kind, name) for kind, name in named - own if not (CONF / kind / f"{name}.yaml").is_file()} == set()


def test_a_head_is_read_and_its_faults_are_told(tmp_path: Path) -> None:
    of = head(CONF / "experiment" / "simclr_rn50.yaml")
    assert (of.text, of.sentence, of.papers) == ("SimCLR with a ResNet-50.", "SimCLR with a ResNet-50", ["2002.05709"])
    assert of.fields["command"].endswith("data.train.labels=true trainer=ddp trainer.devices=8 trainer.num_nodes=4")
    path = tmp_path / "experiment" / "mine.yaml"
    path.parent.mkdir()
    path.write_text(
        "# @package _global_\n# Mine.\n#\n# paper    none\n# command  python -m repr.fit experiment=other\n"
    )
    assert faults(path) == [
        f"mine.yaml: {fault}" for fault in ("no hardware", "no expect", "its command runs another experiment")
    ]


def test_what_an_objective_or_experiment_brings() -> None:
    assert overrides(CONF / "objective" / "clip_byol.yaml")["views"] == "slip"  # of the file that it begins with
    assert overrides(CONF / "experiment" / "slip_emoji.yaml")["objective"] == "slip"


@pytest.mark.parametrize("name", ["m3col_clip", "clip_swav"])
def test_a_file_of_options_is_read_as_hydra_reads_it(name: str) -> None:
    theirs = OmegaConf.to_container(compose([f"objective={name}"]).objective)
    assert OmegaConf.to_container(loaded(CONF / "objective" / f"{name}.yaml")) == theirs


def test_every_flow_is_of_a_family() -> None:
    assert {
        path.stem for path in objective_files() if family(OmegaConf.load(path).get("_target_", "..hybrid")) == "Hybrids"
    } > {"slip"}


def test_an_objective_names_its_losses_and_the_tests_that_hold_them() -> None:
    flow, regression = "repr.objectives.momentum.Momentum", "repr.losses.momentum.regression"
    assert losses(flow, ["regression"], {})[0] == {regression}
    sigmoid = "repr.losses.contrastive.sigmoid"
    assert losses("repr.objectives.image_text.ImageText", ["contrast"], {"contrast": sigmoid})[0] == {sigmoid}
    of_masked = losses("repr.objectives.masked_autoencoders.MaskedViews", ["reconstruction"], {})[0]
    assert of_masked == {"repr.losses.reconstruction.masked_mse"}
    assert "repr.losses.clustering.sinkhorn" in losses("repr.objectives.swav.SwAV", ["swapped_prediction"], {})[1]
    held = {(test.file, test.test): test for test in golden_tests()}
    byol = held["tests/losses/test_golden_teachers.py", "test_byol"]
    assert byol.golden == {"byol"}
    assert regression in byol.uses
    assert "repr.losses.momentum.key_contrast" not in byol.uses
    dino = held["tests/losses/test_golden_teachers.py", "test_dino"]  # of a function that is made of what the flow uses
    assert {"repr.losses.distillation.centred", "repr.losses.clustering.swapped_prediction"} <= dino.uses


def test_links_lead_to_the_page_of_a_file_and_comments_become_markdown() -> None:
    text = "[a](../benchmarks/results/mcl.md#x) [b](../conf/objective/clip.yaml) [c](../LICENSE) `[d](../LICENSE)`"
    pages = "[a](/generated/results/mcl.md#x) [b](/generated/objectives/clip.md) [c](../../LICENSE) `[d](../LICENSE)`"
    assert relinked(text, ROOT / "docs", ROOT / "docs" / "generated") == pages
    recipe = relinked("[a](../conf/experiment/demo.yaml) [b](../conf/optim/sgd.yaml)", ROOT / "docs", ROOT / "docs")
    assert recipe == "[a](/generated/recipes.md#demo) [b](/generated/options/optim.md)"
    told = marked("see docs/gpu.md (arXiv 2002.05709); views=none, --show and LAION/*.tar")
    link = "[arXiv 2002.05709](https://arxiv.org/abs/2002.05709)"
    assert told == rf"see [docs/gpu.md](/gpu.md) ({link}); `views=none`, `--show` and LAION/\*.tar"

"""Of the table docs/backbones.md a sample: what trains and what is refused, never a crash or an untrained part."""

import pytest

from tools.backbones import main, outcome, page

SAMPLE = {
    ("mobilenetv3_small_050", "clip"): "trains",  # its width is not what it says
    ("mobilenetv3_small_050", "pixpro"): "refused",  # a head behind the map
    ("inception_next_atto", "simclr"): "trains",
    ("levit_128s", "clip"): "trains",  # a hybrid of one size
    ("vit_tiny_r_s16_p8_224", "mae"): "refused",  # its patches are no pixels
    ("xcit_nano_12_p16_224", "pixpro"): "refused",
    ("deit_tiny_distilled_patch16_224", "swav"): "trains",  # two class tokens
    ("efficientvit_m0", "m3col"): "trains",
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "objective"), SAMPLE)
def test_a_backbone_trains_or_is_refused(name: str, objective: str) -> None:
    found = outcome(objective, name)
    assert found.kind == SAMPLE[name, objective], found.told
    assert "\n" not in found.told


@pytest.mark.slow
def test_the_table_is_written(tmp_path, capsys) -> None:
    assert main(["--backbones", "test_vit", "--objectives", "mae", "--out", str(tmp_path / "table.md")]) == 0
    assert "test_vit" in capsys.readouterr().out
    told = (tmp_path / "table.md").read_text()
    assert told == page({"test_vit": {"mae": outcome("mae", "test_vit")}})
    assert "| `test_vit` | 64 px |" in told

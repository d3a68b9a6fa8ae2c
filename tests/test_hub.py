"""Weights and tokenizers that no network gives, as on the nodes of most clusters."""

from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants
from hydra.utils import instantiate
from requests.exceptions import ConnectionError as NoServer

from repr.cli import user_message
from repr.config import compose
from repr.evaluate.foreign import read_foreign
from repr.models.backbone import backbone
from repr.runs.initial_weights import load_weights
from tests.objectives.conftest import build


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))


def tokenizer(name: str) -> None:
    cfg = compose(["objective=clip", "tokenizer=hf", f"tokenizer.tokenizer_name={name}"])
    instantiate(cfg.data, train=None, eval=None)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: load_weights(build("clip"), "timm:resnet18"), "init_from=timm:resnet18: neither in the cache"),
        (lambda: load_weights(build("clip"), "open_clip:ViT-B-32/openai"), "init_from=open_clip:ViT-B-32/openai: "),
        (lambda: backbone("resnet18", pretrained=True), "the weights of timm's resnet18: neither in the cache"),
        (lambda: read_foreign("timm:resnet18"), "the weights of timm's resnet18: neither in the cache"),
        (lambda: read_foreign("open_clip:ViT-B-32/openai", 96), "model=open_clip:ViT-B-32/openai: neither in the"),
        (lambda: tokenizer("google-bert/bert-base-uncased"), "tokenizer: neither in the cache of this machine"),
        (lambda: tokenizer("/no/such/folder"), "'/no/such/folder'"),
    ],
)
def test_what_cannot_be_fetched_is_one_line(make: Callable[[], object], words: str) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        make()
    message = user_message(caught.value)
    assert message is not None
    assert words in message
    assert "\n" not in message
    assert "set HF_HUB_CACHE" in message


def test_errors_of_other_services_are_not_taken_for_those_of_a_hub() -> None:
    assert user_message(NoServer("no tracking server")) is None

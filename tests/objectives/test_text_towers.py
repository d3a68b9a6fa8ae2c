"""Text towers other than CLIP's."""

from pathlib import Path

import pytest
from open_clip.transformer import TextTransformer

from repr.batch import Batch
from repr.config import ConfigError, compose
from repr.config_check import check
from repr.fit import main
from repr.objectives.image_text import ImageText
from tests.objectives.test_hybrid import vit

OPTIONS = {
    "SigLIP": {"no_causal_mask": True, "pool_type": "last", "proj_bias": True},
    "first token": {"no_causal_mask": True, "use_pad_mask": True, "pool_type": "first"},
    "class token": {"embed_cls": True, "correct_cls_mask": True},
    "words besides": {"embed_cls": True, "output_tokens": True},
    "no projection": {"proj_type": "none", "output_dim": 32},
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_tower_of_any_config_of_open_clip(kind: str, batch: Batch) -> None:
    options = {"context_length": 12, "width": 32, "heads": 2, "layers": 1, "output_dim": 16, **OPTIONS[kind]}
    flow = ImageText(vit(), TextTransformer(**options))
    output = flow.step(batch)
    flow.total(output.terms).backward()
    assert output.embeddings["text"].shape == (8, options["output_dim"])
    assert all(p.grad is not None for p in flow.text.parameters())


@pytest.mark.slow
def test_a_tower_and_a_tokenizer_of_hugging_face(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, XLMRobertaConfig

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    XLMRobertaConfig(vocab_size=8, max_position_embeddings=40, pad_token_id=1, **sizes).save_pretrained(tmp_path / "hf")
    words = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "face", "cat", "red", "with"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<s>", 0), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(tmp_path / "hf")
    tower = ["text=hf", f"text.model_name_or_path={tmp_path / 'hf'}", "text.pretrained=false"]
    short = ["objective=clip", "smoke=true", "backbone.name=test_resnet", "eval.zero_shot=null", "eval.headline=[]"]
    main([*tower, *short, "tokenizer.context_length=16", f"run_folder={tmp_path / 'run'}"])
    assert "val" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["text.vocab_size=100"], "tokenizer has 49408 words, and text.vocab_size is 100: set it to 49408"),
        (["text=siglip", "text.heads=2"], "text.vocab_size is 32000"),
        (["tokenizer.context_length=8"], "tokenizer.context_length=8 is not text.context_length=16"),
        (["objective=mae_clip", "text.vocab_size=100"], "text.vocab_size is 100"),
        (["objective=slip", "text.vocab_size=100"], "text.vocab_size is 100"),
        (["objective=coca_dino", "text.vocab_size=100"], "text.vocab_size is 100"),
        (["objective=m3col", "tokenizer.context_length=8", "embed_dim=512"], "tokenizer.context_length=8"),
        (["objective=siglip", "tokenizer=drawn", "text.vocab_size=12"], "tokenizer has 37 words"),
    ],
)
def test_a_tower_that_does_not_read_what_the_tokenizer_gives_is_refused(options: list[str], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        check(compose(["objective=clip", *options] if "objective" not in options[0] else options))

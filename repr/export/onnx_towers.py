"""Towers as files for onnxruntime: ``image.onnx``, ``text.onnx``, their settings, and a reader of fifty lines."""

from __future__ import annotations

import shutil
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repr.config import ConfigError
from repr.export.openclip import tokenizer_options
from repr.export.target import Answers, Loaded, Samples, Target, our_answers
from repr.export.timm_trunk import write_json
from repr.models.concat import Encoder
from repr.runs.trained import Trained

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
MAX_BYTES = 1_900_000_000  # of weights within the file, which protobuf limits to 2 GiB; more lie beside it


def missing() -> str | None:
    """What must be installed, or None."""
    lacking = [name for name in PACKAGES if find_spec(name) is None]
    if lacking:
        return f"to=onnx needs {', '.join(lacking)}: pip install 'repr-pretrain[onnx]'"
    return None if torch.__version__ >= "2.10" else f"to=onnx needs torch 2.10 or newer; this is {torch.__version__}"


def write(trained: Trained, folder: Path, samples: Samples) -> tuple[dict[str, Any], Answers]:
    """Write ``image.onnx``, ``text.onnx`` where text was trained, ``settings.json`` and ``load.py``.

    The batch is the first dimension of inputs and outputs, of any size; the others are those of the training. See
    :class:`repr.export.target.Target`.

    Raises:
        ConfigError: the tokenizer is not one that the reader can make, or torch cannot translate a tower.
    """
    ours, data = our_answers(trained, samples), trained.cfg.data
    resize = "the shorter side to size, bicubic; then the central square"
    image = {"size": data.image_size, "mean": [*data.mean], "std": [*data.std], "resize": resize}
    settings: dict[str, dict[str, Any]] = {"image": image}
    if trained.has_text:
        length = ours["tokens"].shape[1]
        options = tokenizer_options(trained, length)
        settings["text"] = {"tokenizer": "open_clip.SimpleTokenizer", "context_length": length, **options}
        _translate(trained, "text", ours["tokens"], folder)
    _translate(trained, "image", ours["pixels"], folder)
    write_json(settings, folder / "settings.json")
    shutil.copyfile(Path(__file__).with_name("read_onnx.py"), folder / "load.py")
    return {}, ours


def load(folder: str) -> Loaded:
    """Run the reader beside the towers; they are called with batches of one row, of two, and of the rest."""
    import runpy

    import torch

    towers, preprocess, tokenizer = runpy.run_path(f"{folder}/load.py")["load"]()

    def in_batches(encode: Any, inputs: torch.Tensor) -> torch.Tensor:
        parts = inputs.split([1, 2, len(inputs) - 3])
        return torch.cat([torch.from_numpy(encode(part.numpy())) for part in parts])

    class Model:
        encode_image = staticmethod(lambda pixels: in_batches(towers.encode_image, pixels))
        encode_text = staticmethod(lambda tokens: in_batches(towers.encode_text, tokens))

    as_tensor = None if tokenizer is None else lambda texts: torch.from_numpy(tokenizer(texts))
    return Model, lambda image: torch.from_numpy(preprocess(image)), as_tensor


TARGET = Target(write, load, missing=missing)


def _translate(trained: Trained, kind: str, inputs: Tensor, folder: Path) -> None:
    tower = Encoder(trained.objective, f"encode_{kind}", 0).eval()  # of any width
    size = sum(tensor.numel() * tensor.element_size() for tensor in trained.objective.state_dict().values())
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the translator, about its own parts
        try:
            torch.onnx.export(
                tower,
                (inputs,),
                folder / f"{kind}.onnx",
                input_names=["pixels" if kind == "image" else "tokens"],
                output_names=[f"{kind}_embedding"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                external_data=size > MAX_BYTES,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise ConfigError([f"torch cannot write the {kind} tower of {trained.name} as ONNX: {reason}"]) from error

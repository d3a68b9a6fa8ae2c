"""Load exports with the libraries they are for, in a process of its own: ``python load_elsewhere.py JOB.json``.

Nothing of the package is imported here, and the network is closed. The job names ``exports`` (arguments of the loaders
below, and ``to``), ``pictures``, ``captions`` and ``answer``, a safetensors file that receives for the i-th export
``i/pixels``, ``i/image`` and, where there is text, ``i/tokens`` and ``i/text``.
"""

import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

Loaded = tuple[Any, Any, Any]  # model, transform of a PIL picture, tokenizer or None

NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg")


def close_network(event: str, arguments: tuple) -> None:
    """An audit hook, which no library can go round."""
    if event in NETWORK:
        raise OSError(f"loading an export asked for the network: {event} {arguments[1:]}")


def load_open_clip(folder: str, image_tower: str | None = None, **where: Any) -> Loaded:
    """A whole model, or one whose image tower is read from a file of its own."""
    import open_clip

    name = folder if where else f"local-dir:{folder}"
    tower = image_tower and f"{folder}/{image_tower}"
    model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained_image_path=tower, **where)
    return model.eval(), preprocess, open_clip.get_tokenizer(name, **where)


def load_timm(folder: str, **where: Any) -> Loaded:
    """A backbone."""
    import timm

    model = timm.create_model(folder if where else f"local-dir:{folder}", pretrained=True, **where).eval()
    return model, timm.data.create_transform(**timm.data.resolve_model_data_config(model)), None


def load_hf(folder: str, library: str) -> Loaded:
    """A model by its name on the hub, of which the folder is the local copy; its card must be valid, too."""
    from huggingface_hub import ModelCard

    card = ModelCard.load(Path(folder, "README.md"))
    if card.data.library_name != library or not card.text.strip():
        raise ValueError(f"the model card in {folder} names {card.data.library_name}, not {library}")
    with tempfile.TemporaryDirectory() as cache:  # laid out as huggingface_hub keeps what it has downloaded
        copy = Path(cache, "models--someone--encoder")
        for name in ("refs", "snapshots"):
            (copy / name).mkdir(parents=True)
        (copy / "refs" / "main").write_text("0" * 40)
        (copy / "snapshots" / ("0" * 40)).symlink_to(Path(folder).absolute())
        return LOADERS[library]("hf-hub:someone/encoder", cache_dir=cache)


class InBatches:
    """Towers of onnxruntime, called with batches of one row, of two, and of the rest."""

    def __init__(self, towers: Any) -> None:
        self.towers = towers

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, D)."""
        return self._run(self.towers.encode_image, pixels)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, L) -> (B, D)."""
        return self._run(self.towers.encode_text, tokens)

    def _run(self, encode: Any, inputs: torch.Tensor) -> torch.Tensor:
        parts = inputs.split([1, 2, len(inputs) - 3])
        return torch.cat([torch.from_numpy(encode(part.numpy())) for part in parts])


def load_onnx(folder: str) -> Loaded:
    """What the reader beside the towers gives, as tensors."""
    towers, preprocess, tokenizer = reader(folder, "load").load()
    tokens = None if tokenizer is None else lambda texts: torch.from_numpy(tokenizer(texts))
    return InBatches(towers), lambda image: torch.from_numpy(preprocess(image)), tokens


def load_joined(folder: str) -> Loaded:
    """What the reader beside the stages gives."""
    return reader(folder, "join").load()


def reader(folder: str, name: str) -> Any:
    """A program that lies in an export."""
    spec = importlib.util.spec_from_file_location(name, f"{folder}/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_stages(folder: str, model: Any) -> list[Loaded]:
    """The stages of a joined model, each with the transform and the tokenizer that its own folder names."""
    entries = json.loads(Path(folder, "stages.json").read_text(encoding="utf-8"))["stages"]
    loaded: list[Loaded] = []
    for stage, entry in zip(model.stages, entries, strict=True):
        if entry["to"] == "timm":
            import timm

            loaded.append((stage, timm.data.create_transform(**timm.data.resolve_model_data_config(stage)), None))
        else:
            from open_clip import get_tokenizer
            from open_clip.transform import PreprocessCfg, image_transform_v2

            transform = image_transform_v2(PreprocessCfg(**stage.visual.preprocess_cfg), is_train=False)
            loaded.append((stage, transform, get_tokenizer(f"local-dir:{folder}/{entry['folder']}")))
    return loaded


LOADERS: dict[str, Any] = {
    "open_clip": load_open_clip,
    "timm": load_timm,
    "hf": load_hf,
    "onnx": load_onnx,
    "joined": load_joined,
}


def embed(loaded: Loaded, pictures: list[str], captions: list[str]) -> dict[str, torch.Tensor]:
    """What a model makes of pictures and captions; texts mean nothing to one that was not trained on them."""
    model, preprocess, tokenizer = loaded
    pixels = torch.stack([preprocess(Image.open(path)) for path in pictures])
    encode_image = model.encode_image if hasattr(model, "encode_image") else model
    answer = {"pixels": pixels, "image": encode_image(pixels)}
    if tokenizer is not None:
        answer["tokens"] = tokenizer(captions)
        answer["text"] = model.encode_text(answer["tokens"])
    return answer


def answers(export: dict[str, Any], *samples: list[str]) -> dict[str, torch.Tensor]:
    """Those of an export, and of stages that it joins, which are read once: ``image_0`` is the first stage's."""
    loaded = LOADERS[export["to"]](**{key: value for key, value in export.items() if key != "to"})
    answer = embed(loaded, *samples)
    for i, stage in enumerate(load_stages(export["folder"], loaded[0]) if export["to"] == "joined" else ()):
        answer |= {f"{name}_{i}": tensor for name, tensor in embed(stage, *samples).items()}
    return answer


def main(path: str) -> None:
    """Do the job of a file."""
    sys.addaudithook(close_network)
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    with torch.inference_mode():
        found = [answers(export, job["pictures"], job["captions"]) for export in job["exports"]]
    tensors = {f"{i}/{name}": tensor.contiguous() for i, answer in enumerate(found) for name, tensor in answer.items()}
    save_file(tensors, job["answer"])


if __name__ == "__main__":
    main(sys.argv[1])

"""Load exports with the libraries they are for, in a process of its own: ``python load_elsewhere.py JOB.json``.

Nothing of the package is imported here, and the network is closed. The job names ``exports`` (arguments of the loaders
below, and ``to``), ``pictures``, ``captions`` and ``answer``, a safetensors file that receives for the i-th export
``i/pixels``, ``i/image`` and, where there is text, ``i/tokens`` and ``i/text``.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg")


def close_network(event: str, arguments: tuple) -> None:
    """An audit hook, which no library can go round."""
    if event in NETWORK:
        raise OSError(f"loading an export asked for the network: {event} {arguments[1:]}")


def load_open_clip(folder: str, image_tower: str | None = None) -> tuple[Any, Any, Any]:
    """Model, transform, tokenizer; with an image tower, the model's text tower is not trained."""
    import open_clip

    name, tower = f"local-dir:{folder}", image_tower and f"{folder}/{image_tower}"
    model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained_image_path=tower)
    return model.eval(), preprocess, open_clip.get_tokenizer(name)


def load_timm(folder: str) -> tuple[Any, Any, Any]:
    """Model, transform, no tokenizer."""
    import timm

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return model, timm.data.create_transform(**timm.data.resolve_model_data_config(model)), None


def load_joined(folder: str) -> tuple[Any, Any, Any]:
    """What the reader beside the stages gives."""
    spec = importlib.util.spec_from_file_location("join", f"{folder}/join.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load()


LOADERS = {"open_clip": load_open_clip, "timm": load_timm, "joined": load_joined}


def embed(export: dict[str, Any], pictures: list[str], captions: list[str]) -> dict[str, torch.Tensor]:
    """What an export makes of pictures and captions."""
    model, preprocess, tokenizer = LOADERS[export["to"]](**{key: value for key, value in export.items() if key != "to"})
    pixels = torch.stack([preprocess(Image.open(path)) for path in pictures])
    answer = {"pixels": pixels, "image": getattr(model, "encode_image", model)(pixels)}
    if tokenizer is not None:
        answer["tokens"] = tokenizer(captions)
        answer["text"] = model.encode_text(answer["tokens"])
    return {name: tensor.contiguous() for name, tensor in answer.items()}


def main(path: str) -> None:
    """Do the job of a file."""
    sys.addaudithook(close_network)
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    with torch.inference_mode():
        answers = [embed(export, job["pictures"], job["captions"]) for export in job["exports"]]
    save_file({f"{i}/{key}": value for i, answer in enumerate(answers) for key, value in answer.items()}, job["answer"])


if __name__ == "__main__":
    main(sys.argv[1])

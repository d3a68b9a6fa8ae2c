"""Load exports with the libraries they are for, in a process of its own: ``python load_elsewhere.py JOB.json``.

Nothing of the package is imported here, and the network is closed. The job names ``exports``, ``pictures``,
``captions``, and ``answer``, a safetensors file that receives for the i-th export ``i/pixels``, ``i/image`` and, where
there is text, ``i/tokens`` and ``i/text``, of a CoCa model ``i/logits`` too. An export has the ``source`` of the
function ``name`` that loads it, its ``folder``, further ``arguments``, and ``hub``: the library that finds it by its
name on Hugging Face's hub, or null.
"""

import gc
import json
import sys
import tempfile
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


def load(export: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Model, transform and tokenizer of an export, whose model card, if it is for the hub, is checked, too."""
    functions: dict[str, Any] = {}
    exec("from __future__ import annotations\n" + export["source"], functions)
    load = functions[export["name"]]
    if export["hub"] is None:
        return load(export["folder"], **export["arguments"])
    from huggingface_hub import ModelCard

    card = ModelCard.load(Path(export["folder"], "README.md"))
    if card.data.library_name != export["hub"] or not card.text.strip():
        raise ValueError(f"the model card names {card.data.library_name}, not {export['hub']}")
    with tempfile.TemporaryDirectory() as cache:  # laid out as huggingface_hub keeps what it has downloaded
        copy = Path(cache, "models--someone--encoder")
        for name in ("refs", "snapshots"):
            (copy / name).mkdir(parents=True)
        (copy / "refs" / "main").write_text("0" * 40)
        (copy / "snapshots" / ("0" * 40)).symlink_to(Path(export["folder"]).absolute())
        return load("hf-hub:someone/encoder", cache_dir=cache)


def embed(loaded: tuple[Any, Any, Any], pictures: list[str], captions: list[str]) -> dict[str, torch.Tensor]:
    """What a model makes of pictures and captions; texts mean nothing to one that was not trained on them."""
    model, preprocess, tokenizer = loaded
    pixels = torch.stack([preprocess(Image.open(path)) for path in pictures])
    encode_image = model.encode_image if hasattr(model, "encode_image") else model
    answer = {"pixels": pixels, "image": encode_image(pixels)}
    if tokenizer is not None:
        answer["tokens"] = tokenizer(captions)
        answer["text"] = model.encode_text(answer["tokens"])
    if hasattr(model, "text_decoder"):  # CoCa: what it expects after each word of a caption
        answer["logits"] = model(pixels, answer["tokens"])["logits"]
    return answer


def main(path: str) -> None:
    """Do the job of a file."""
    gc.disable()  # it would look through all that is imported, again and again
    sys.addaudithook(close_network)
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    tensors: dict[str, torch.Tensor] = {}
    for i, export in enumerate(job["exports"]):
        with torch.inference_mode():
            answer = embed(load(export), job["pictures"], job["captions"])
        tensors |= {f"{i}/{name}": tensor.contiguous() for name, tensor in answer.items()}
    save_file(tensors, job["answer"])


if __name__ == "__main__":
    main(sys.argv[1])

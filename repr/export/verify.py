"""Compare exports, loaded by the libraries they are for in a fresh process, with our own towers."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from repr.export.target import Answers, Export, Samples

LOADER = Path(__file__).with_name("load_elsewhere.py")
TOLERANCE = 1e-5  # of normalised pixels; of an embedding, relative to its length
LOADER_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def verify(exports: Sequence[Export], samples: Samples) -> None:
    """Load every export in one fresh process without network and compare what it gives with ours.

    Raises:
        ValueError: an export does not load, or gives something else; nothing of it may be kept.
    """
    for export, theirs in zip(exports, answers_elsewhere(exports, samples), strict=True):
        if fault := difference(theirs, export.answers):
            raise ValueError(f"{export.to} loads {export.folder}, but {fault}, so it was not kept")


def answers_elsewhere(exports: Sequence[Export], samples: Samples) -> list[dict[str, Tensor]]:
    """What a fresh process without this package and without network makes of the samples, for each export.

    Raises:
        ValueError: it ends with an error.
    """
    with tempfile.TemporaryDirectory() as work:
        job, answer = Path(work) / "job.json", Path(work) / "answer.safetensors"
        task = {
            "exports": [
                {
                    "source": inspect.getsource(export.load),
                    "name": export.load.__name__,
                    "folder": str(export.folder),
                    "hub": export.hub,
                    "arguments": dict(export.arguments),
                }
                for export in exports
            ],
            "pictures": [str(path) for path in samples.pictures],
            "captions": samples.captions,
            "answer": str(answer),
        }
        job.write_text(json.dumps(task), encoding="utf-8")
        # -P: the program's own folder is no place to import from.
        command, environment = [sys.executable, "-P", str(LOADER), str(job)], os.environ | LOADER_ENVIRONMENT
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            raise ValueError(f"the export does not load in a fresh process, so it was not kept: {last[0]}")
        tensors = load_file(answer)
    pairs = [(name.partition("/"), tensor) for name, tensor in tensors.items()]
    return [{key: tensor for (index, _, key), tensor in pairs if index == str(i)} for i in range(len(exports))]


def difference(theirs: Answers, ours: Answers) -> str | None:
    """How two sets of answers differ by more than rounding, or None."""
    for name, own in ours.items():
        other = theirs.get(name)
        if other is None or other.shape != own.shape:
            return f"its {name} has shape {None if other is None else tuple(other.shape)}, not {tuple(own.shape)}"
        if not own.is_floating_point():
            if not torch.equal(own, other):
                return f"its {name} are others than ours"
            continue
        scale = 1.0 if name == "pixels" else own.norm(dim=-1, keepdim=True)
        worst = float(((other - own).abs() / scale).max())
        if not worst <= TOLERANCE:  # NaN too
            return f"its {name} differs from ours by {worst:.1e} (allowed: {TOLERANCE:g})"
    return None

"""A page for each public module, by autodoc."""

from __future__ import annotations

import ast
from pathlib import Path

from docs.generate.text import ROOT, from_rst, table, toctree, write

# Package -> what it holds, and its public modules where these are not all.
PACKAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "losses": ("Pure functions: tensors in, a scalar out.", ()),
    "objectives": ("Flows: how views and pairs move through encoders and heads to the terms of a loss.", ()),
    "models": ("Networks: backbones, heads, decoders, teachers, queues.", ()),
    "metrics": ("Pure functions of feature tables.", ()),
    "optim": ("Optimizers and schedules.", ()),
    "batch": ("What a batch and the outputs of an objective hold.", ()),
    "data": (
        "Batches of pictures, captions, labels and tables.",
        ("datamodule", "views", "colour", "collate", "clusters", "neighbours"),
    ),
    "data.sources": ("What is read: rows with pictures, captions and names of classes.", ()),
    "data.drawn": ("Sets that are drawn, and need no files.", ()),
    "data.questions": ("Questions of composition, and the files of their benchmarks.", ()),
    "evaluate": (
        "Protocols, and encoders of others.",
        ("protocol", "protocols", "probes", "evaluation", "during_training", "foreign", "finetune"),
    ),
    "runs": (
        "Run folders, and the encoders that they hold.",
        ("folder", "trained", "joined", "initial_weights", "weight_files"),
    ),
    "export": ("Encoders in the format of other libraries.", ("target", "folders", "openclip", "timm_trunk")),
    "training": ("Callbacks of a run.", ("checkpoints", "guard", "throughput", "collapse", "pictures", "sharding")),
    "config": ("Composing configs, and changing them.", ()),
    "config_check": ("What is wrong with a config.", ()),
    "fit": ("A run, from Python.", ()),
}


def write_api() -> None:
    """Write the index, a page for each package, and one for each of its modules."""
    for package, (text, chosen) in PACKAGES.items():
        folder = ROOT / "repr" / package.replace(".", "/")
        if not folder.is_dir():
            _module(f"repr.{package}")
            continue
        files = {path.stem: path for path in sorted(folder.glob("*.py")) if not path.stem.startswith("_")}
        names = chosen or files
        cells = ([f"[{name}](repr.{package}.{name}.md)", _sentence(files[name])] for name in names)
        pages = [f"{name} <repr.{package}.{name}>" for name in names]
        write(
            f"api/repr.{package}.md",
            f"# repr.{package}\n",
            f"{text}\n",
            table(["module", "what it has"], cells),
            toctree(pages),
        )
        for name in names:
            _module(f"repr.{package}.{name}")
    cells = ([f"[repr.{name}](repr.{name}.md)", text] for name, (text, _) in PACKAGES.items())
    parts = ["# API\n", "Import with `from repr.x import y` only: `import repr` hides the builtin of that name.\n"]
    write(
        "api/index.md", *parts, table(["package", "what it holds"], cells), toctree(f"repr.{name}" for name in PACKAGES)
    )


def _module(name: str) -> None:
    options = "   :members:\n   :show-inheritance:\n   :member-order: bysource\n"
    write(f"api/{name}.md", f"# {name}\n", f"```{{eval-rst}}\n.. automodule:: {name}\n{options}```\n")


def _sentence(path: Path) -> str:
    """The first sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return from_rst(text.partition("\n\n")[0].replace("::", "."))

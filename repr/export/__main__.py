"""Use a trained encoder elsewhere: ``python -m repr.export run=RUN to=open_clip out=DIR``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from repr.cli import importing, one_line_errors, program
from repr.config import ConfigError, nearest
from repr.export.options import check_options
from repr.runs.folder import run_folder

# None: it must be given.
DEFAULTS: dict[str, Any] = {
    "run": None, "to": None, "out": None, "weights": "model", "force": False, "untrained_text": False, "trust": False
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The arguments of the command line."""
    result = argparse.ArgumentParser(
        prog=program("export"),
        description="Write a trained encoder for another library, checked by that library.",
        epilog="run=RUN: a run folder, or a checkpoint inside one. to=open_clip: both towers, or of an objective on "
        "images the image tower (with untrained_text=true a whole model); to=timm: the backbone; to=hf: one of the two "
        "with a model card, for Hugging Face's hub; to=onnx: a file for each tower. weights=teacher: those of the "
        "moving average that a flow keeps; weights=unaveraged: those that are trained, where an average of "
        "Lightning's WeightAveraging is exported otherwise. out=DIR: a new folder; force=true replaces an export. "
        "trust=true: build whatever the config of the run names; else only what repr/runs/trust.py lists.",
    )
    result.add_argument("options", nargs="*", metavar="KEY=VALUE", help=", ".join(f"{key}=" for key in DEFAULTS))
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    words = parser().parse_args(arguments).options
    with one_line_errors():
        options = parse(words)
        run, trust = options.pop("run"), options.pop("trust")
        check_options(**options)
        run_folder(run, "run")
        with importing():
            from repr.export.folders import export  # here, so that what is wrong so far is refused before its seconds

        out = export(run, **options, trust=trust)
        print(f"verified and written: {out}")


def parse(words: Sequence[str]) -> dict[str, Any]:
    """Options of the command line.

    Raises:
        ConfigError: an unknown one, one of another kind, or one that is missing.
    """
    options: dict[str, Any] = dict(DEFAULTS)
    faults = []
    for word in words:
        key, _, value = word.partition("=")
        if not value:
            faults.append(f"{word} is not of the form key=value")
        elif key not in options:
            faults.append(f"there is no option '{key}'; {nearest(key, options)}")
        elif not isinstance(DEFAULTS[key], bool):
            options[key] = value
        elif value in ("true", "false"):
            options[key] = value == "true"
        else:
            faults.append(f"{key} takes true or false, but got '{value}'")
    faults = faults or [f"{key} has no value: set it" for key, value in options.items() if value is None]
    if faults:
        raise ConfigError(faults)
    return options


if __name__ == "__main__":
    main()

"""The files of ``conf/`` by group and name, and what their heads say; read without Hydra, so that it is quick."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

_HERE = Path(__file__).resolve().parent
# In a wheel conf/ lies inside the package, in a checkout beside it.
CONF = _HERE / "conf" if (_HERE / "conf").is_dir() else _HERE.parent / "conf"


def roots(config_dir: str | Path | None) -> list[Path]:
    """``conf/`` and the user's own folder, whose files come first.

    Raises:
        ValueError: there is no such folder.
    """
    if config_dir is not None and not Path(config_dir).is_dir():
        raise ValueError(f"--config-dir {config_dir} is not a folder")
    return [CONF] if config_dir is None else [CONF, Path(config_dir)]


def files(folders: Sequence[Path]) -> list[Path]:
    """All configs below some roots."""
    return [path for folder in folders for path in folder.rglob("*.yaml")]


def groups(folders: Sequence[Path]) -> dict[str, dict[str, Path]]:
    """Config group -> name of an option -> its file; of two of one name that of the last root."""
    found: dict[str, dict[str, Path]] = {}
    for folder in folders:
        for path in files([folder]):
            if path.parent != folder:
                found.setdefault(path.parent.relative_to(folder).as_posix(), {})[path.stem] = path
    return found


def head(path: Path) -> str:
    """The first sentence of the comment that a config begins with; '' where it begins with none."""
    words = list[str]()
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") or (words and line == "#"):
            break
        if not line.startswith("# @package"):
            words.append(line.lstrip("# "))
    return re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(words))[0]


def group_heads() -> dict[str, str]:
    """Group -> what it is, in the order of ``conf/fit.yaml``, whose list of defaults says it."""
    lines = "\n".join((CONF / name).read_text(encoding="utf-8") for name in ("fit.yaml", "evaluate.yaml"))
    found = re.findall(r"^  - (\w+): [^#\n]+?(?:  # (.*))?$", lines, re.MULTILINE)
    heads = dict[str, str]()
    for group, words in found:
        heads[group] = heads.get(group) or words
    return heads


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint at the most similar of ``names``, or at all of them where none is similar."""
    names = list(names)
    tails = {full.rsplit(".", 1)[-1]: full for full in names}
    leaf = name.rsplit(".", 1)[-1]
    if leaf in tails:  # the right name in the wrong place
        there = [full for full in names if full.rsplit(".", 1)[-1] == leaf]
        near = difflib.get_close_matches(name, there, n=1, cutoff=0)
    else:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        near = near or [tails[tail] for tail in difflib.get_close_matches(leaf, tails, n=1)]
    if near:
        return f"did you mean '{near[0]}'?"
    return f"choose one of {', '.join(sorted(names))}" if len(names) <= 20 else "python -m repr.fit --show lists them"

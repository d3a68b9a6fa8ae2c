"""What the comment at the head of a file of ``conf`` says."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

FIELDS = ("paper", "command", "hardware", "hours", "expect")


class Head(NamedTuple):
    """The text of a head, and its fields where it has such, as an experiment has."""

    text: str
    fields: dict[str, str]

    @property
    def sentence(self) -> str:
        """The first sentence, without papers in brackets."""
        text = re.sub(r" \([^()]*arXiv[^()]*\)", "", self.text)
        return re.split(r"(?<!et al)\.(?=\s|$)", text)[0]

    @property
    def papers(self) -> list[str]:
        """The arXiv numbers that the head names."""
        return re.findall(r"\b\d{4}\.\d{5}\b", self.text + self.fields.get("paper", ""))


@cache
def head(path: Path) -> Head:
    """The comment lines that a file begins with: sentences, and below an empty line a field a line, which may go on."""
    lines = path.read_text(encoding="utf-8").splitlines()
    told = [line[1:] for line in lines[: next((i for i, line in enumerate(lines) if line[:1] != "#"), len(lines))]]
    told = [line for line in told if not line.startswith(" @package")]
    text, fields, name = [], dict[str, str](), ""
    for line in told:
        if match := re.match(r" (\w+) {2,}(\S.*)", line):
            name = match[1]
            fields[name] = match[2]
        elif name:
            fields[name] += f" {line.strip()}"
        elif line.strip():
            text.append(line.strip())
    return Head(" ".join(text), fields)


def faults(path: Path) -> list[str]:
    """What is missing in the head of an objective or an experiment."""
    of = head(path)
    found = [] if of.text.endswith((".", ")")) else ["it begins with no sentence in a comment"]
    if path.parent.name == "experiment":
        found += [f"no {name}" for name in ("paper", "command", "hardware", "expect") if not of.fields.get(name)]
        found += [f"{name} is none of {', '.join(FIELDS)}" for name in of.fields.keys() - set(FIELDS)]
        if f"experiment={path.stem}" not in of.fields.get("command", "") and path.stem != "demo":
            found.append("its command runs another experiment")
    return [f"{path.name}: {fault}" for fault in found]


def overrides(path: Path) -> dict[str, str]:
    """Group -> choice, of what a file brings by its defaults and by those of its own group that it begins with."""
    brought, text = dict[str, str](), path.read_text(encoding="utf-8")
    for base in re.findall(r"^ +- /?(?:experiment/)?([\w/]+)(?:@\S+)?(?: +#.*)?$", text, re.MULTILINE):
        for folder in (path.parent, path.parents[1]):
            if (file := folder / f"{base}.yaml").is_file() and file != path:
                brought |= overrides(file)
                break
    found = re.findall(r"^ +- override /(\w+)(?:@[\w.]+)?: *(\S+)", text, re.MULTILINE)
    return brought | dict(found)

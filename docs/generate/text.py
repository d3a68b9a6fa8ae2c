"""Pieces of Markdown, and where a file of the repository is on the site."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
GENERATED = DOCS / "generated"

# What is code in a comment, though nothing says so: commands, options with values, flags, files, names with a _.
PLAIN_CODE = (
    r"python -m [\w.]+(?: [\w.=-]+)*",
    r"[+~]?[a-z_][\w.@]*=(?:[^\s,;:).]|[:.](?=\w))*",
    r"--[a-z][\w-]*",
    r"(?:repr|conf|tools|tests|benchmarks/claims)/[\w./]*\w",
    r"[a-z]\w*(?:\.\w+)*_[\w.:/@]*\w",
)
LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)#\s]*)(#[^)\s]*)?(?=\))")  # the target of a relative link
CODE = re.compile(r"^(```|~~~).*?^\1|(`+)(?!`).*?(?<!`)\2(?!`)", re.MULTILINE | re.DOTALL)


SHOWN = {  # what is shown elsewhere than a file of its folder
    "README.md": "index.md",
    "CONTRIBUTING.md": "generated/contributing.md",
    "CHANGELOG.md": "generated/changelog.md",
    "benchmarks/results": "generated/results/index.md",
    "conf": "generated/options/index.md",
    "conf/experiment": "generated/recipes.md",
    "conf/objective": "generated/objectives/index.md",
    "docs/notebooks": "in_a_notebook.md",
}
WRITTEN = set[Path]()  # pages of this build


def page_of(path: Path) -> str | None:
    """The page that shows a file of the repository, from the site's root; None where there is none."""
    if not path.is_relative_to(ROOT):
        return None
    name, folder = path.relative_to(ROOT).as_posix(), path.relative_to(ROOT).parent.as_posix()
    if name in SHOWN:
        return SHOWN[name]
    if path.suffix in (".md", ".ipynb") and folder.startswith("docs"):
        return path.relative_to(DOCS).as_posix()
    if folder == "benchmarks/results":
        return f"generated/results/{path.name}"
    if path.suffix == ".yaml" and folder.startswith("conf/") and folder.count("/") == 1:
        pages = {"conf/objective": f"objectives/{path.stem}.md", "conf/experiment": f"recipes.md#{path.stem}"}
        return f"generated/{pages.get(folder, f'options/{folder[5:]}.md')}"
    return None


def relinked(text: str, old: Path, new: Path) -> str:
    """A page of ``old`` whose relative links hold in ``new``, both folders; links to a shown file lead to its page."""

    def moved(match: re.Match[str]) -> str:
        path, anchor = (old / match[1]).resolve(), match[2] or ""
        if not path.exists():
            return match[0]  # Sphinx tells
        page = page_of(path)
        return (f"/{page}" if page else os.path.relpath(path, new)) + anchor

    return outside_code(text, lambda piece: LINK.sub(moved, piece))


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """A page of Markdown, changed but where it is code."""
    end, pieces = 0, []
    for match in CODE.finditer(text):
        pieces += [change(text[end : match.start()]), match[0]]
        end = match.end()
    return "".join([*pieces, change(text[end:])])


def marked(text: str) -> str:
    """A comment as Markdown: options and commands as code, papers and pages as links."""
    text = text.replace("<", r"\<").replace("*", r"\*").replace("[", r"\[")
    text = re.sub(rf"`([^`]*)`|(?<![\w./-])({'|'.join(PLAIN_CODE)})", _code, text)
    text = re.sub(r"(?:arXiv[ :])?\b(\d{4}\.\d{5})\b", r"[arXiv \1](https://arxiv.org/abs/\1)", text)
    return re.sub(r"\b(?:docs|benchmarks/results)/\w+\.md|(?<=see )README\b", _page, text)


def _code(match: re.Match[str]) -> str:
    return "`" + re.sub(r"\\([<*\[])", r"\1", match[1] or match[2]) + "`"


def _page(match: re.Match[str]) -> str:
    path = ROOT / (match[0] if "/" in match[0] else "README.md")
    return f"[{match[0]}](/{page_of(path)})" if path.exists() else f"`{match[0]}`"


def from_rst(text: str) -> str:
    """A piece of a docstring as a line of Markdown."""
    text = re.sub(r":math:(`[^`]+`)", r"\1", text)
    return " ".join(re.sub(r":(func|class|meth|mod|attr|data):`([^`]+)`", r"{py:\1}`\2`", text).split())


def options(cells: Iterable[Sequence[str]]) -> str:
    """The table of options, values and meanings, which a narrow page shows one below the other."""
    return f":::{{container}} options\n{table(('option', 'value', 'meaning'), cells)}:::\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], align: str | None = None) -> str:
    """A table; ``align`` has a letter for each column, l or r."""
    lines = [header, ["---:" if letter == "r" else "---" for letter in align or "l" * len(header)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines) + "\n"


def toctree(pages: Iterable[str], caption: str | None = None) -> str:
    """A list of pages for the sidebar."""
    told = [f":caption: {caption}"] if caption else []
    return "\n".join(["```{toctree}", *told, ":hidden:", "", *pages, "```", ""])


def write(page: str, *parts: str) -> None:
    """Write a page below ``generated``, unless it is there as it is, so that a second build reads only what is new."""
    path, text = GENERATED / page, "\n".join(parts)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    WRITTEN.add(path)

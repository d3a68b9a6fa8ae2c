"""All pages that are made of other files: ``write_all`` is called at the start of a build."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from importlib import import_module
from pathlib import Path

from benchmarks.summary import summary
from docs.generate.api import write_api
from docs.generate.heads import head
from docs.generate.objectives import CLAIMS, RESULTS, experiment_files, objective_files, write_objectives, write_recipes
from docs.generate.options import write_options
from docs.generate.text import DOCS, GENERATED, ROOT, WRITTEN, page_of, relinked, table, toctree, write

# The command lines in the order in which a run needs them, and the module of each, which has a function `main`.
PROGRAMS = {
    "python -m repr.check": "repr.check.__main__",
    "python -m repr.plan": "repr.plan.__main__",
    "python -m repr.fit": "repr.fit",
    "python -m repr.evaluate": "repr.evaluate.__main__",
    "python -m repr.report": "repr.report.__main__",
    "python -m repr.export": "repr.export.__main__",
}
# What stands above the summary of results.
GLANCE = (
    "Ours beside the best peer of the same run; below 1 is less time or memory than theirs, and of quality, which is "
    "accuracy, a difference above 0 is better. What is worse stands here like the rest; its page tells why, where that "
    "is known. `python -m benchmarks` measures all of it anew, `python -m benchmarks NAME` one page."
)


def write_all() -> None:
    """Write every page below ``docs/generated``, and remove those that no file is behind any more."""
    write_objectives()
    write_recipes()
    write_options()
    write_api()
    write_programs()
    write_results()
    for name, title in (("CONTRIBUTING", "contributing"), ("CHANGELOG", "changelog")):
        copy(ROOT / f"{name}.md", f"{title}.md")
    write("llms.txt", *llms())
    for path in GENERATED.rglob("*"):
        if path.is_file() and path not in WRITTEN:
            path.unlink()


def copy(path: Path, page: str) -> None:
    """Write a page of the repository as a page of the site."""
    write(page, relinked(path.read_text(encoding="utf-8"), path.parent, (GENERATED / page).parent))


def write_results() -> None:
    """Write the index of what was measured, each page of it, and the claims."""
    for path in RESULTS:
        copy(path, f"results/{path.name}")
    parts = ["# Results\n", "What was measured, with the command that measured it and the hardware.\n"]
    parts += ["## At a glance\n", f"{GLANCE}\n", *summary(lambda path: f"/{page_of(path)}")]
    parts += [
        "## Pages\n",
        table(["page", "command"], ([f"[{_title(path)}]({path.name})", _command(path)] for path in RESULTS)),
    ]
    parts += ["## Claims of papers\n", "Each compares methods under the same steps, data and seeds, with controls.\n"]
    cells = (
        [f"`{path.stem}`", _question(path), _shown(path)] for path in sorted(CLAIMS) if _question(path).endswith("?")
    )
    parts += [table(["`python -m benchmarks.claims`", "the question", "what came of it"], cells)]
    write("results/index.md", *parts, toctree(path.stem for path in RESULTS))


def _title(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def _command(path: Path) -> str:
    found = re.search(r"`(python -m [^`]*)`", path.read_text(encoding="utf-8"))
    return f"`{' '.join(found[1].split())}`" if found else ""


def _question(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition('"""')[2].partition("\n")[0]


def _shown(path: Path) -> str:
    return (
        f"[{path.stem}]({path.stem}.md)"
        if path.with_suffix(".md").name in {result.name for result in RESULTS}
        else "not written yet"
    )


def write_programs() -> None:
    """Write the page of what ``--help`` prints of each program."""
    parts = ["# Help of each program\n"]
    os.environ["COLUMNS"] = "100"  # what argparse writes is as wide
    for command, module in PROGRAMS.items():
        out = io.StringIO()
        with redirect_stdout(out), suppress(SystemExit):
            import_module(module).main(["--help"])
        parts += [f"## {command}\n", f"```text\n{out.getvalue().strip()}\n```\n"]
    write("command_line.md", *parts)


def llms() -> Iterator[str]:
    """The lines of llms.txt: what the project is, and the pages with a line each."""
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    yield "# repr\n"
    yield f"> {_first(index)}\n"
    yield "## Pages\n"
    for path in sorted(DOCS.glob("*.md")):
        if path.stem != "index":
            yield f"- [{_title(path)}]({path.stem}.html): {_first(path.read_text(encoding='utf-8'))}"
    for page, text in (
        ("contributing", "how to add an objective, an export, a protocol, a source"),
        ("command_line", "what the programs can be told"),
        ("options/index", "every option, its value and meaning"),
        ("api/index", "the public modules"),
        ("results/index", "what was measured"),
        ("recipes", "every experiment: paper, command, hardware, number to expect"),
    ):
        yield f"- [{page}](generated/{page}.html): {text}"
    yield "\n## Objectives\n"
    yield from (f"- [{p.stem}](generated/objectives/{p.stem}.html): {head(p).sentence}" for p in objective_files())
    yield "\n## Recipes\n"
    yield from (f"- [{p.stem}](generated/recipes.html#{p.stem}): {head(p).sentence}" for p in experiment_files())
    yield ""


def _first(text: str) -> str:
    """The first sentence of a page, without links."""
    paragraphs = [part for part in text.split("\n\n")[1:] if re.match(r"\w|`\w|\*\*|\[", part)]
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(paragraphs[0].split())) if paragraphs else ""
    return re.split(r"(?<=[.?])\s", plain)[0].rstrip(":")

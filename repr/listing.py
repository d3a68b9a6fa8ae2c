"""What there is to choose: ``python -m repr list [GROUP]``, and the end of ``repr.fit --help``."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from repr.catalog import group_heads, groups, head, nearest, roots
from repr.cli import one_line_errors, program

FIRST = ("experiment", "objective", "data")  # of the groups: what most runs choose


def parser() -> argparse.ArgumentParser:
    """The arguments of the command line."""
    result = argparse.ArgumentParser(prog=program("list"), description="List what a group of the config has to choose.")
    result.add_argument("group", nargs="?", metavar="GROUP", help="objective, experiment, ...; without: the groups")
    result.add_argument("--config-dir", help="a folder of your own, laid out like conf/, whose files are listed too")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = parser().parse_args(arguments)
    with one_line_errors():
        print("\n".join(listed(options.group, options.config_dir)))


def listed(group: str | None, config_dir: str | None = None) -> Iterator[str]:
    """The lines that list the options of a group, or all groups.

    Args:
        group: its name, or the plural of it; None: the groups.
        config_dir: a folder of the user's own.

    Raises:
        ValueError: there is no such group.
    """
    found, heads = groups(roots(config_dir)), group_heads()
    if group is None:
        yield from rows(overview(found), wrap=True)
        return
    name = group if group in found else group.removesuffix("s")
    if name not in found:
        raise ValueError(f"there is no group '{group}'; {nearest(group, found)}")
    yield f"{name}=NAME" + (f": {heads[name]}" if heads.get(name) else "")
    yield from rows({option: head(path) for option, path in sorted(found[name].items())}, wrap=True)


def overview(found: Mapping[str, Any]) -> dict[str, str]:
    """Group -> what it is; those below another one, such as parts of objectives, are left out."""
    heads = group_heads()
    own = sorted(name for name in found if name not in heads and "/" not in name)
    known = {name: heads[name] for name in (*FIRST, *heads) if name in found and name in heads}
    return known | dict.fromkeys(own, "of your own")


def rows(words: Mapping[str, str], *, wrap: bool) -> Iterator[str]:
    """Lines of a name and what it is, as wide as the terminal; what is too long goes on below, or is cut short."""
    width, indent = min(shutil.get_terminal_size().columns, 120), 4 + max(map(len, words), default=0)
    for name, text in words.items():
        first = f"  {name:<{indent - 4}}  "
        if wrap:
            yield textwrap.fill(text, width, initial_indent=first, subsequent_indent=" " * indent) if text else first
        else:
            yield first + textwrap.shorten(text, width - indent, placeholder=" ...")


class Help(argparse.Action):
    """``--help`` that also lists groups and experiments, those of ``--config-dir`` too where it stands before it."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help="show this help message and exit")

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *args: Any) -> None:
        """Print it and leave."""
        with one_line_errors():
            found = groups(roots(getattr(namespace, "config_dir", None)))
            experiments = {name: head(path) for name, path in sorted(found["experiment"].items())}
            print(parser.format_help())
            print("groups (GROUP=NAME chooses; repr-pretrain list GROUP tells the names):")
            print("\n".join(rows(overview(found), wrap=False)))
            print("\nexperiments (experiment=NAME):")
            print("\n".join(rows(experiments, wrap=False)))
        parser.exit()

"""Completion in the shell, by argcomplete: verbs, groups, what there is to choose, and keys of the config."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

from repr.catalog import groups, roots
from repr.cli import COMMAND, one_line_errors, program

SHELLS = ("bash", "zsh", "fish")
PLAN = ("gpus", "memory", "bandwidth", "tflops")


def parser() -> argparse.ArgumentParser:
    """The arguments of the command line."""
    description = "Print what makes a shell complete the command."
    epilog = f'bash and zsh: put eval "$({COMMAND} completion bash)" into ~/.bashrc, or zsh into ~/.zshrc. '
    epilog += f"fish: {COMMAND} completion fish > ~/.config/fish/completions/{COMMAND}.fish"
    result = argparse.ArgumentParser(prog=program("completion"), description=description, epilog=epilog)
    result.add_argument("shell", choices=SHELLS)
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    import argcomplete

    shell = parser().parse_args(arguments).shell
    with one_line_errors():
        print(argcomplete.shellcode([COMMAND], shell=shell))


def complete(modules: Mapping[str, str]) -> None:
    """Answer the shell, which has started the program with the line so far in ``COMP_LINE``, and leave.

    Args:
        modules: verb -> module.
    """
    import argcomplete
    from argcomplete.lexers import split_line

    words = split_line(os.environ["COMP_LINE"], int(os.environ["COMP_POINT"]))[3]
    verb = words[1] if len(words) > 1 else ""
    if verb in modules:
        of_verb: argparse.ArgumentParser = import_module(modules[verb]).parser()
        os.environ["_ARGCOMPLETE"] = "2"  # the line begins with the verb
        for action in of_verb._actions:
            action.completer = _completer(verb, action)  # type: ignore[attr-defined]
    else:
        of_verb = argparse.ArgumentParser()
        of_verb.add_argument("verb", choices=list(modules))
    argcomplete.autocomplete(of_verb, always_complete_options=False)


def _completer(verb: str, action: argparse.Action) -> Callable[..., Iterable[str]] | None:
    """What completes an argument of a verb; None: what argcomplete does by itself, choices and files."""
    if action.metavar == "GROUP":
        return lambda parsed_args, **_: groups(roots(parsed_args.config_dir))
    if action.metavar == "KEY":
        return lambda prefix, parsed_args, **_: [key for key, _ in _keys(prefix, verb, parsed_args)]
    if action.metavar == "KEY=VALUE" and verb != "export":
        return lambda prefix, parsed_args, **_: _overrides(prefix, verb, parsed_args)
    if action.metavar == "KEY=VALUE":
        return _of_export
    return None


def _of_export(prefix: str, **_: Any) -> Iterator[str]:
    from repr.export.__main__ import DEFAULTS
    from repr.export.options import TARGETS

    known = {"to": list(TARGETS)} | {key: ["true", "false"] for key, value in DEFAULTS.items() if value is False}
    key, equals, value = prefix.partition("=")
    if not equals:
        yield from (f"{key}=" for key in DEFAULTS)
    else:
        yield from (f"{key}={choice}" for choice in known.get(key) or _paths(value))


def _overrides(prefix: str, verb: str, options: argparse.Namespace) -> Iterator[str]:
    """Overrides that begin with ``prefix``."""
    found = groups(roots(options.config_dir))
    key, equals, value = prefix.partition("=")
    plus, name = key[: len(key) - len(key.lstrip("+"))], key.lstrip("+")
    if equals and name in found:
        yield from (f"{key}={option}" for option in found[name])
    elif equals:
        old = dict(_keys(name, verb, options)).get(name)
        yield from (f"{key}={option}" for option in (["true", "false"] if isinstance(old, bool) else _paths(value)))
    else:
        keys = [path for path, _ in _keys(name, verb, options, added=bool(plus))]
        keys += [*PLAN] * (verb == "plan") + ["evaluate"] * bool(plus) + ["experiment"] * (not plus)
        yield from (f"{plus}{path}=" for path in keys)


def _keys(prefix: str, verb: str, options: argparse.Namespace, *, added: bool = False) -> Iterator[tuple[str, Any]]:
    """Options and their values of what is composed so far; below a section only where ``prefix`` begins to name one.

    With ``added`` they are those that constructors take and the config does not have.
    """
    from repr.config import ConfigError, compose, targets, walk
    from repr.signatures import described

    root = "evaluate" if verb == "evaluate" else "fit"
    words = [word for word in options.overrides or () if word.partition("=")[0] not in PLAN]
    try:
        cfg = compose(words, config_dir=options.config_dir, root=root)
    except ConfigError:  # of what else stands on the line
        cfg = compose(root=root)
    if added:
        for path, node in targets(cfg):
            yield from ((f"{path}.{name}", None) for name in described(node["_target_"]) if name not in node)
        return
    for path, node in walk(cfg):
        is_near = path and (prefix or "." not in path) and path.startswith(prefix)
        if is_near and "._" not in path and not path.rpartition(".")[2].isdigit():
            yield path, node


def _paths(prefix: str) -> Iterable[str]:
    from argcomplete.completers import FilesCompleter

    return FilesCompleter()(prefix)

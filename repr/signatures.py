"""The arguments of our own classes and functions and their defaults, read from their source.

An import would take the seconds of torch, and a mistyped option is to be refused before them.
"""

from __future__ import annotations

import ast
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

NOT_LITERAL = object()  # a default that is the name of something, or a call


@lru_cache(maxsize=256)
def arguments(target: str, *, by_keyword: bool = False) -> dict[str, Any] | None:
    """Argument -> its default, :data:`NOT_LITERAL` where there is none that stands there as a value.

    ``target`` is the dotted name of a class or function; ``by_keyword`` leaves only those arguments that must be given
    by their name. The result is None where it is not ours, or where its arguments cannot be told, since it takes any
    keyword or those of a base class.
    """
    module, _, name = target.rpartition(".")
    try:
        spec = find_spec(module) if module.startswith("repr.") else None
    except ModuleNotFoundError:  # a method of a class
        return None
    if spec is None or spec.origin is None:
        return None
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return _of_function(node, by_keyword)
        if isinstance(node, ast.ClassDef) and node.name == name:
            inits = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
            return _of_function(inits[0], by_keyword) if inits else None if node.bases else _of_dataclass(node)
    return None


def _of_function(node: ast.FunctionDef, by_keyword: bool) -> dict[str, Any] | None:
    if node.args.kwarg:
        return None
    positional, defaults = node.args.args, node.args.defaults
    without_default = [None] * (len(positional) - len(defaults))
    pairs = [] if by_keyword else [*zip(positional, [*without_default, *defaults], strict=True)]
    pairs += zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    return {argument.arg: _value(default) for argument, default in pairs if argument.arg not in ("self", "cls")}


def _of_dataclass(node: ast.ClassDef) -> dict[str, Any]:
    fields = [part for part in node.body if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)]
    return {f.target.id: _value(f.value) for f in fields if "ClassVar" not in ast.unparse(f.annotation)}  # type: ignore[union-attr]


def _value(default: ast.expr | None) -> Any:
    try:
        return NOT_LITERAL if default is None else ast.literal_eval(default)
    except ValueError:
        return NOT_LITERAL

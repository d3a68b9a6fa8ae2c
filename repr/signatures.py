"""The arguments of classes and functions, their defaults and what is said about them, read from their source.

An import would take the seconds of torch, and a mistyped option is to be refused before them.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

NOT_LITERAL = object()  # a default that is the name of something, or a call


class Argument(NamedTuple):
    """An argument of a class or function; texts are '' where the source says nothing."""

    default: Any
    kind: str
    text: str


class _Definition(NamedTuple):
    """A class or function where it is defined, what its module takes from others (name -> dotted name), its lines."""

    node: ast.ClassDef | ast.FunctionDef
    module: str
    imported: dict[str, str]
    lines: list[str]

    def full(self, name: str) -> str:
        """The dotted name of what the module calls ``name``."""
        first, dot, rest = name.partition(".")
        return self.imported.get(first, f"{self.module}.{first}") + dot + rest

    def bases(self) -> list[str]:
        """The dotted names of the bases of a class."""
        return [self.full(ast.unparse(base)) for base in getattr(self.node, "bases", ())]

    def beside(self, field: ast.AnnAssign) -> str:
        """The comment at the end of a line."""
        return self.lines[(field.end_lineno or 1) - 1][field.end_col_offset :].strip().removeprefix("#").strip()


@lru_cache(maxsize=256)
def arguments(target: str, *, by_keyword: bool = False) -> dict[str, Any] | None:
    """Argument -> its default, :data:`NOT_LITERAL` where there is none that stands there as a value.

    ``target`` is the dotted name of a class or function; ``by_keyword`` leaves only those arguments that must be given
    by their name. The result is None where it is not ours, or where its arguments cannot be told, since it takes any
    keyword or those of a base class.
    """
    found = _definition(target) if target.startswith("repr.") else None
    if found is None:
        return None
    function = _constructor(node := found.node)
    if function is None:
        is_dataclass = isinstance(node, ast.ClassDef) and not node.bases
        return {name: _value(field.value) for name, field in _fields(node).items()} if is_dataclass else None
    return None if function.args.kwarg else {name: _value(value) for name, (_, value) in _of(function, by_keyword)}


@lru_cache(maxsize=256)
def described(target: str) -> dict[str, Argument]:
    """What is known of the arguments of a class or function of any package, those of its bases last; {} of none.

    Nothing is imported: names are followed from module to module through their ``from ... import``.
    """
    found = _definition(target)
    if found is None:
        return {}
    own, texts = _constructor(found.node), _texts(target)
    known = dict[str, Argument]()
    if own is None or own.args.kwarg:
        for base in reversed(found.bases()):
            known |= described(base)
    arguments = _of(own, False) if own else [(name, (f.annotation, f.value)) for name, f in _fields(found.node).items()]
    for name, (kind, value) in arguments:
        known[name] = Argument(_value(value), ast.unparse(kind) if kind else "", texts.get(name, ""))
    return known


def _texts(target: str) -> dict[str, str]:
    """Argument -> what docstrings say, and comments beside the fields of a dataclass; of a class also its bases'."""
    found, texts = _definition(target), dict[str, str]()
    if found is None:
        return texts
    for base in reversed(found.bases()):
        texts |= _texts(base)
    if (own := _constructor(found.node)) is None:
        texts |= {name: found.beside(field) for name, field in _fields(found.node).items()}
    elif own is not found.node:
        texts |= _entries(ast.get_docstring(own))
    return texts | _entries(ast.get_docstring(found.node))


def summary(target: str) -> str:
    """The first paragraph of the docstring of a class or function; '' where there is none."""
    found = _definition(target)
    text = (found and ast.get_docstring(found.node)) or ""
    return _plain(text.partition("\n\n")[0])


def _source(module: str) -> Path | None:
    """The file of a module, found without importing the packages around it."""
    top, *rest = module.split(".")
    try:
        spec = find_spec(top)
    except (ValueError, ModuleNotFoundError):
        return None
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder, *rest)
        for file in (path / "__init__.py", path.with_name(f"{path.name}.py")):
            if file.is_file():
                return file
    return None


@lru_cache(maxsize=256)
def _definition(target: str) -> _Definition | None:
    """What a dotted name of a class or function leads to."""
    module, _, name = target.rpartition(".")
    if not module or (path := _source(module)) is None:  # a method of a class has no file either
        return None
    tree = ast.parse(text := path.read_text(encoding="utf-8"))
    imported = _imported(tree, module, path.stem == "__init__")
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return _Definition(node, module, imported, text.splitlines())
    return _definition(imported[name]) if imported.get(name, target) != target else None


def _imported(tree: ast.Module, module: str, is_package: bool) -> dict[str, str]:
    """Name in a module -> the dotted name that ``from ... import`` takes it from."""
    names = dict[str, str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            up = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            source = ".".join([*up, *([node.module] if node.module else [])])
            names |= {alias.asname or alias.name: f"{source}.{alias.name}" for alias in node.names}
    return names


def _constructor(node: ast.ClassDef | ast.FunctionDef) -> ast.FunctionDef | None:
    if isinstance(node, ast.FunctionDef):
        return node
    return next((part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"), None)


def _of(node: ast.FunctionDef, by_keyword: bool) -> list[tuple[str, tuple[ast.expr | None, ast.expr | None]]]:
    """Argument -> its annotation and default."""
    positional, defaults = node.args.args, node.args.defaults
    without_default = [None] * (len(positional) - len(defaults))
    pairs = [] if by_keyword else [*zip(positional, [*without_default, *defaults], strict=True)]
    pairs += zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    return [(a.arg, (a.annotation, default)) for a, default in pairs if a.arg not in ("self", "cls")]


def _fields(node: ast.ClassDef | ast.FunctionDef) -> dict[str, ast.AnnAssign]:
    """Those of a dataclass by name."""
    fields = [part for part in node.body if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)]
    return {ast.unparse(f.target): f for f in fields if "ClassVar" not in ast.unparse(f.annotation)}


def _value(default: ast.expr | None) -> Any:
    try:
        return NOT_LITERAL if default is None else ast.literal_eval(default)
    except ValueError:
        return NOT_LITERAL


def _entries(doc: str | None) -> dict[str, str]:
    """Argument -> what the sections of a docstring say that begin with ``Args`` or ``Attributes``."""
    entries = dict[str, str]()
    for section in re.finditer(r"^(?:Args|Attributes)\b[^\n]*:\n((?: +.*(?:\n|\Z)|\n)+)", doc or "", re.MULTILINE):
        for entry in re.split(r"^(?=\S)", textwrap.dedent(section[1]), flags=re.MULTILINE):
            names, colon, text = entry.partition(":")
            if colon:
                entries |= dict.fromkeys(re.sub(r"\(.*\)", "", names).strip().split(", "), _plain(text))
    return entries


def _plain(text: str) -> str:
    """A docstring without what is meant for Sphinx, on one line."""
    return " ".join(re.sub(r":\w+:`~?([^`]+)`", r"\1", inspect.cleandoc(text)).replace("``", "").split())

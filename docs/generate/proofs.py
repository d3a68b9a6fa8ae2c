"""What holds an objective: its loss functions, and the tests of them with numbers of the authors' code."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from docs.generate.text import ROOT

GOLDEN = {path.stem for path in (ROOT / "tests" / "golden").glob("*.npz") if not path.stem.endswith("_ours")}
SHARED = ("blockwise", "features")  # modules of repr.losses that are neither losses nor steps to one


class Held(NamedTuple):
    """A test that reads files of ``tests/golden``, and what of the package it uses."""

    file: str
    test: str
    golden: frozenset[str]
    uses: frozenset[str]


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _imports(tree: ast.Module) -> dict[str, str]:
    """Name in a module -> what is imported by that name."""
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
    return {alias.asname or alias.name: f"{node.module}.{alias.name}" for node in nodes for alias in node.names}


def _used(node: ast.AST, imported: Mapping[str, str]) -> set[str]:
    """Every imported thing that a piece of code names, also as an attribute of an imported module."""
    found = {imported[part.id] for part in ast.walk(node) if isinstance(part, ast.Name) and part.id in imported}
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id in imported:
            found.add(f"{imported[part.value.id]}.{part.attr}")
    return found


def _path(dotted: str) -> Path:
    return ROOT / (dotted.rpartition(".")[0].replace(".", "/") + ".py")


@cache
def _is_term(dotted: str) -> bool | None:
    """Whether a function of repr.losses is a loss, whose docstring tells its range, or a step to one; None: neither."""
    path, name = _path(dotted), dotted.rpartition(".")[2]
    if not dotted.startswith("repr.losses.") or path.stem in SHARED or not path.is_file():
        return None
    for node in _parsed(path).body:
        if isinstance(node, ast.FunctionDef) and node.name == name and ast.unparse(node.returns or node) == "Tensor":
            return "Range: " in (ast.get_docstring(node) or "")
    return None


@cache
def _calls(dotted: str) -> set[str]:
    """What a function of repr.losses is made of."""
    if not dotted.startswith("repr.losses.") or not _path(dotted).is_file():
        return set()
    tree, module = _parsed(_path(dotted)), dotted.rpartition(".")[0]
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    known = _imports(tree) | {name: f"{module}.{name}" for name in functions}
    node = functions.get(dotted.rpartition(".")[2])
    return _used(node, known) if node else set()


def losses(flow: str, terms: Iterable[str], chosen: Mapping[str, str]) -> tuple[set[str], set[str]]:
    """The loss functions of a flow's terms, and what else its file takes from repr.losses on the way to them.

    Losses are those that a config chooses, or that the code names by the term: the flow's class, the functions beside
    it, and what its file imports of repr.objectives. Of a term that the code does not name so, it may be any that the
    code uses and names by no other term.
    """
    file, name = _parsed(_path(flow)), flow.rpartition(".")[2]
    own = ast.Module([node for node in file.body if not isinstance(node, ast.ClassDef) or node.name == name], [])
    shared = {_path(name) for name in _imports(file).values() if name.startswith("repr.objectives.")}
    used, by_term = set[str](), dict[str, set[str]]()
    for tree in (own, *map(_parsed, shared - {_path("repr.objectives.base.Objective")})):
        imported = _imports(tree)
        used |= _used(tree, imported)
        for key, value in _by_name(tree):
            by_term.setdefault(key, set()).update(filter(_is_term, _used(value, imported)))
    others = set(filter(_is_term, used)).difference(*by_term.values())
    found = set().union(*({chosen[term]} if term in chosen else by_term.get(term) or others for term in terms))
    steps = {name for name in _used(own, _imports(own)) if _is_term(name) is not None}
    return found, steps.difference(found, *by_term.values())


def _by_name(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """What stands in a dict under a name, or is put there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            yield from ((key.value, value) for key, value in pairs if isinstance(key, ast.Constant))
        put = node.targets[0] if isinstance(node, ast.Assign) else None
        if isinstance(put, ast.Subscript) and isinstance(put.slice, ast.Constant):
            yield put.slice.value, node.value


@cache
def golden_tests() -> list[Held]:
    """Every test that reads a file of ``tests/golden``, itself or through what its module defines."""
    return [held for path in sorted((ROOT / "tests").rglob("test_*.py")) for held in _held(path)]


def _held(path: Path) -> Iterator[Held]:
    if "golden" not in path.read_text(encoding="utf-8"):
        return
    tree = _parsed(path)
    imported, defined, read = _imports(tree), dict[str, set[ast.stmt]](), dict[str, set[str]]()
    for node in tree.body:
        targets = _defines(node)
        reads = "golden(" in ast.unparse(node) or ".npz" in ast.unparse(node)
        files = [n.value.removesuffix(".npz") for n in ast.walk(node) if reads and _names_a_file(n)]
        in_order = len(targets) == len(files) > 1  # A, B = (golden(name) for name in ("a", "b"))
        for index, name in enumerate(targets):
            defined.setdefault(name, set()).add(node)
            read.setdefault(name, set()).update(files[index : index + 1] if in_order else files)
    for test in (name for name in defined if name.startswith("test_")):
        direct, text = _reached(test, defined), " ".join(ast.unparse(node) for node in defined[test])
        if golden := set().union(*(read[name] for name in direct)):
            uses, behind = (
                set().union(*(_used(node, imported) for name in names for node in defined[name]))
                for names in (direct, _reached(test, defined, fixtures=True))
            )
            uses |= {name for name in behind if name.rpartition(".")[2] in text}  # a fixture serves many tests
            uses = uses.union(*map(_calls, uses))
            yield Held(path.relative_to(ROOT).as_posix(), test, frozenset(golden), frozenset(uses))


def _names_a_file(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.removesuffix(".npz") in GOLDEN


def _defines(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def _reached(name: str, defined: Mapping[str, set[ast.stmt]], *, fixtures: bool = False) -> set[str]:
    """What a definition uses of its module, and what that uses, and so on; also of fixtures, which are arguments."""
    reached, waiting = set[str](), {name}
    while waiting:
        reached.add(one := waiting.pop())
        parts = [part for node in defined[one] for part in ast.walk(node)]
        used = {part.id for part in parts if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)}
        given = {part.arg for part in parts if isinstance(part, ast.arg)}
        waiting |= (used | given if fixtures else used - given) & defined.keys() - reached
    return reached

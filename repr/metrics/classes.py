"""Class names and sentence templates of zero-shot classification, read from YAML."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard
from unicodedata import normalize

import yaml

from repr.files import yaml_text

ClassFile = str | Mapping[str, Any]  # its path, or what it holds and its path as `file`


@dataclass(frozen=True)
class Classes:
    """The content of a class file.

    Attributes:
        attribute: the labelled attribute that is predicted.
        names: label -> name, as it stands in the sentences.
        templates: sentences with ``{}`` where the name goes.
    """

    attribute: str
    names: dict[str, str]
    templates: list[str]

    @classmethod
    def load(cls, path: str | Path) -> Classes:
        """Read a YAML file with the keys ``attribute``, ``names`` and ``templates``.

        ``names: open_clip.IMAGENET_CLASSNAMES`` and ``templates: open_clip.OPENAI_IMAGENET_TEMPLATES``, or other lists
        of open_clip, are taken from there. Names that are a list belong to the labels 0, 1, ..., or with the key
        ``labels: imagenet-synsets`` to n01440764, n01443537, ..., as timm has them. Labels and names are the text that
        stands there, also where YAML has another meaning for it (``on``, ``1e3``, ``2020-01-01``).

        Raises:
            ValueError: there is no such file, a key is missing or unknown, or a template has no place for the name.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(
                f"class file {path} does not exist: set eval.zero_shot.classes.<set> to a YAML file, or to the name of "
                "one in eval/classes of --config-dir or of conf/"
            )
        try:
            content = yaml.load(yaml_text(path), yaml.BaseLoader)  # whose values are all text
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"class file {path} cannot be read: {error}") from error
        return cls.of_content(content, path)

    @classmethod
    def of_content(cls, content: Any, path: Path) -> Classes:
        """Take what a class file holds; ``path`` is for errors, which are those of :meth:`load`."""
        wanted = {"attribute", "names", "templates"}
        if not isinstance(content, dict) or content.keys() - {"labels"} != wanted:
            raise ValueError(f"class file {path} must have exactly the keys {', '.join(sorted(wanted))}")
        names, templates = (_resolved(content[key], path) for key in ("names", "templates"))
        if not names or not templates:
            raise ValueError(f"class file {path}: names and templates must not be empty")
        values = [*(names.values() if isinstance(names, dict) else names), *templates, content["attribute"]]
        if bad := [value for value in values if not isinstance(value, str) or not value.strip()]:
            raise ValueError(f"class file {path}: {bad[0]!r} is no text; names, templates and attribute are texts")
        if bad := [template for template in templates if "{}" not in template]:
            raise ValueError(f"class file {path}: template {bad[0]!r} must hold {{}} where the name goes")
        if isinstance(names, list):
            names = dict(zip(_labels(content.get("labels"), len(names), path), names, strict=True))
        composed = partial(normalize, "NFC")  # as labels of the data are
        named = {composed(label): composed(name) for label, name in names.items()}
        return cls(content["attribute"], named, list(map(composed, templates)))

    def sentences(self) -> list[str]:
        """All templates of the first class, then all of the second, and so on."""
        return [template.replace("{}", name) for name in self.names.values() for template in self.templates]

    def ids(self, vocabulary: Sequence[str]) -> list[int]:
        """Give the label id of each name, for the labels of an attribute in the data.

        An id is a position in ``vocabulary``, the labels of the data. Names of labels that the data do not have are
        candidates all the same, with ids beyond.
        """
        position = {label: i for i, label in enumerate(vocabulary)}
        return [position.get(label, len(vocabulary) + i) for i, label in enumerate(self.names)]

    def fault(self, labels: Mapping[str, Sequence[str]], name: str) -> str | None:
        """Tell why these are not the classes of the set ``name``, whose rows have ``labels`` by attribute, or None.

        They may be more than there are in the set.
        """
        if self.attribute not in labels:
            return f"{name} has no labels of '{self.attribute}'; it has {', '.join(labels) or 'none'}"
        present = labels[self.attribute]
        if not (lacking := [label for label in present if label not in self.names]):
            return None
        (near,) = difflib.get_close_matches(lacking[0], list(self.names), n=1, cutoff=0)
        return (
            f"the class file lacks {len(lacking)} of the {len(present)} labels of {name}, such as '{lacking[0]}' "
            f"(the nearest that it has: '{near}')"
        )


def load_classes(files: ClassFile | Sequence[ClassFile] | Mapping[str, ClassFile]) -> dict[str, Classes]:
    """Read the class files of a set: one file; several, each named by its stem; or name -> file.

    A file is its path, or the mapping that it holds, with its path as ``file``.

    Returns:
        The name of the number that they give -> classes: ``zero_shot`` of one file, ``zero_shot_<name>`` of several.
    """
    if _is_file(files):
        return {"zero_shot": _loaded(files)}
    named = files if isinstance(files, Mapping) else {_path(file).stem: file for file in files}
    if len(named) < len(files):
        paths = ", ".join(str(_path(file)) for file in files)
        raise ValueError(f"class files {paths} share a name: give a mapping of names to files")
    return {f"zero_shot_{name}": _loaded(file) for name, file in named.items()}


def _is_file(value: Any) -> TypeGuard[ClassFile]:
    return isinstance(value, str) or (
        isinstance(value, Mapping) and isinstance(value.get("file"), str) and "attribute" in value
    )


def _path(file: ClassFile) -> Path:
    return Path(file if isinstance(file, str) else file["file"])


def _loaded(file: ClassFile) -> Classes:
    if isinstance(file, str):
        return Classes.load(file)
    return Classes.of_content({key: value for key, value in file.items() if key != "file"}, _path(file))


def _resolved(value: Any, path: Path) -> Any:
    """A list or mapping as it stands, or the list of open_clip that is named."""
    if not isinstance(value, str):
        return value
    import open_clip

    package, _, name = value.partition(".")
    entries = getattr(open_clip, name, None)
    if package != "open_clip" or not isinstance(entries, list | tuple):
        raise ValueError(f"class file {path}: {value} is no list of open_clip, such as open_clip.IMAGENET_CLASSNAMES")
    return [entry("{}") if callable(entry) else entry for entry in entries]


def _labels(kind: str | None, num: int, path: Path) -> list[str]:
    if kind is None:
        return [str(number) for number in range(num)]
    if kind != "imagenet-synsets":
        raise ValueError(f"class file {path}: labels={kind}; set imagenet-synsets, or leave it out for 0, 1, ...")
    from timm.data import ImageNetInfo

    return ImageNetInfo("imagenet-1k").label_names()

"""Class names and sentence templates of zero-shot classification, read from YAML."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Classes:
    """What a class file says.

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

        Raises:
            ValueError: there is no such file, a key is missing or unknown, or a template has no place for the name.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"class file {path} does not exist: set eval.zero_shot.<set> to a YAML file")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        wanted = {"attribute", "names", "templates"}
        if not isinstance(content, dict) or content.keys() != wanted:
            raise ValueError(f"class file {path} must have exactly the keys {', '.join(sorted(wanted))}")
        if not content["names"] or not content["templates"]:
            raise ValueError(f"class file {path}: names and templates must not be empty")
        if bad := [template for template in content["templates"] if "{}" not in template]:
            raise ValueError(f"class file {path}: template {bad[0]!r} must hold {{}} where the name goes")
        names = {str(label): str(name) for label, name in content["names"].items()}
        return cls(content["attribute"], names, list(content["templates"]))

    def sentences(self) -> list[str]:
        """All templates of the first class, then all of the second, and so on."""
        return [template.replace("{}", name) for name in self.names.values() for template in self.templates]

    def ids(self, vocabulary: Mapping[str, Sequence[str]], where: str) -> list[int]:
        """Label ids of the names.

        Args:
            vocabulary: attribute -> labels of the data; an id is a position in it.
            where: what to name in an error.

        Raises:
            ValueError: the data has no such attribute, or not these labels.
        """
        if self.attribute not in vocabulary:
            known = ", ".join(vocabulary) or "none"
            raise ValueError(f"{where}: the data has no attribute '{self.attribute}'; it has {known}")
        position = {label: i for i, label in enumerate(vocabulary[self.attribute])}
        if unknown := [label for label in self.names if label not in position]:
            near = difflib.get_close_matches(unknown[0], list(position), n=1)
            raise ValueError(
                f"{where}: {len(unknown)} labels of the class file are not in the data's attribute "
                f"'{self.attribute}', such as '{unknown[0]}'" + (f" (nearest: '{near[0]}')" if near else "")
            )
        return [position[label] for label in self.names]

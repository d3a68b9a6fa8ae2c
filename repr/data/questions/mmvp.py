"""Pairs of pictures that differ in one visual pattern, each with a statement that is true of it alone.

Rows 2i and 2i + 1 are an item. :func:`repr.metrics.compositional.compositional` scores them.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path

from repr.data.questions.compositional import Case, Cases

# The nine patterns of Tong et al., 2024, as the benchmark's folders call them, and as metrics do.
PATTERNS = {
    "Orientation and Direction": "orientation",
    "Presence of Specific Features": "presence",
    "State and Condition": "state",
    "Quantity and Count": "quantity",
    "Positional and Relational Context": "position",
    "Color and Appearance": "colour",
    "Structural Characteristics": "structure",
    "Texts": "text",
    "Viewpoint and Perspective": "viewpoint",
}
PREFIX = "a photo of "  # what the authors put before each statement
QUESTIONS, IMAGES = "Questions.csv", "MLLM_VLM Images"
_COLUMNS = ("Question ID", "Type", "Statement")


class MMVP(Cases):
    """MMVP-VLM: 135 pairs of photographs that CLIP takes for alike (Tong et al., 2024, arXiv 2401.06209, section 3).

    The layout is the published one: ``root/Questions.csv`` with the columns ``Question ID``, ``Type`` and
    ``Statement``, where two lines that follow each other are a pair, the first with an odd number; and the pictures
    ``root/MLLM_VLM Images/<Type>/<Question ID>.jpg``. The attribute ``pattern`` is the pair's pattern.

    Args:
        root: the folder.
        prefix: what is put before each statement.

    Raises:
        ValueError: a file, a column or a picture is missing, or lines do not form pairs.
    """

    def __init__(self, root: str | Path, *, prefix: str = PREFIX) -> None:
        self.root = os.path.expanduser(root)
        questions = self._questions()
        # Both pictures lie in the folder of the pair's first line, which also names its pattern.
        types = [questions[row // 2 * 2][1] for row in range(len(questions))]
        cases = [
            Case(str(number), os.path.join(folder, f"{number}.jpg"), prefix + statement, split=PATTERNS[folder])
            for folder, (number, _, statement) in zip(types, questions, strict=True)
        ]
        super().__init__(os.path.join(self.root, IMAGES), cases, split="pattern", rows=2)

    def _questions(self) -> list[tuple[int, str, str]]:
        """Number, type and statement of each line."""
        path = os.path.join(self.root, QUESTIONS)
        if not os.path.isfile(path):
            raise ValueError(
                f"MMVP: there is no {path!r}; set root to the folder of MMVP_VLM, which holds it beside {IMAGES!r}"
            )
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if lacking := [name for name in _COLUMNS if name not in (reader.fieldnames or ())]:
                raise ValueError(f"{path}: no column {lacking[0]!r}; the columns are {list(reader.fieldnames or ())}")
            questions = [_question(row, f"{path}, line {reader.line_num}") for row in reader]
        if not questions or len(questions) % 2:
            raise ValueError(f"{path}: {len(questions)} statements do not form pairs; two lines each are one")
        for (first, _, _), (second, _, _) in zip(questions[::2], questions[1::2], strict=True):
            if first % 2 == 0 or second != first + 1:
                raise ValueError(
                    f"{path}: {first} and {second} are no pair; an odd number and the next must follow each other"
                )
        return questions


def _question(row: dict[str, str], where: str) -> tuple[int, str, str]:
    """One line of the questions.

    Raises:
        ValueError: a column is empty or not what it should be.
    """
    number, pattern, statement = (row[name] or "" for name in _COLUMNS)
    if not number.strip().isdecimal():
        raise ValueError(f"{where}: 'Question ID' is {number!r}, not a number")
    if pattern not in PATTERNS:
        raise ValueError(f"{where}: 'Type' is {pattern!r}; it must be one of {', '.join(PATTERNS)}")
    if not statement.strip():
        raise ValueError(f"{where}: 'Statement' is empty")
    return int(number), pattern, statement.strip()

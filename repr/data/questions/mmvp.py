"""Pairs of pictures that differ in one visual pattern, each with a statement that is true of it alone."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path

from repr.data.questions.compositional import Case, Cases
from repr.data.sources.plain_files import MAX_BYTES, read_plain
from repr.data.sources.table import MAX_LINE

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
    ``root/MLLM_VLM Images/<Type>/<Question ID>.jpg``. Rows 2i and 2i + 1 are an item. The attribute ``pattern`` is the
    pair's pattern.

    Args:
        root: the folder.
        prefix: what is put before each statement.

    Raises:
        ValueError: a file, a column or a picture is missing, or lines do not form pairs.
    """

    def __init__(self, root: str | Path, *, prefix: str = PREFIX) -> None:
        path = os.path.join(os.path.expanduser(root), QUESTIONS)
        lines = _lines(path)
        if not lines or len(lines) % 2:
            raise ValueError(f"{path}: {len(lines)} statements do not form pairs; two lines each are one")
        cases = []
        for pair in zip(lines[::2], lines[1::2], strict=True):
            # Both pictures lie in the folder of the first line, which also names the pattern.
            (first, folder, _), (second, _, _) = pair
            if first % 2 == 0 or second != first + 1:
                raise ValueError(
                    f"{path}: {first} and {second} are no pair; an odd number and the next must follow each other"
                )
            for number, _, statement in pair:
                file = os.path.join(folder, f"{number}.jpg")
                cases.append(Case(str(number), file, prefix + statement, split=PATTERNS[folder]))
        super().__init__(os.path.join(root, IMAGES), cases, split="pattern", rows=2)


def _lines(path: str) -> list[tuple[int, str, str]]:
    """Number, type and statement of each line."""
    if not os.path.isfile(path):
        raise ValueError(
            f"MMVP: there is no {path!r}; set root to the folder of MMVP_VLM, which holds it beside {IMAGES!r}"
        )
    text = read_plain(path, MAX_BYTES, "a text")
    try:
        csv.field_size_limit(MAX_LINE)  # of the whole process; a table may have set it before
        reader = csv.DictReader(io.StringIO(text.decode("utf-8-sig"), newline=""))
        columns = list(reader.fieldnames or ())
        if lacking := [name for name in _COLUMNS if name not in columns]:
            raise ValueError(f"{path}: no column {lacking[0]!r}; the columns are {columns}")
        return [_line(row, f"{path}, line {reader.line_num}") for row in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _line(row: dict[str, str], where: str) -> tuple[int, str, str]:
    number, pattern, statement = (row[name] or "" for name in _COLUMNS)
    if not number.strip().isdecimal():
        raise ValueError(f"{where}: 'Question ID' is {number!r}, not a number")
    if pattern not in PATTERNS:
        raise ValueError(f"{where}: 'Type' is {pattern!r}; it must be one of {', '.join(PATTERNS)}")
    if not statement.strip():
        raise ValueError(f"{where}: 'Statement' is empty")
    return int(number), pattern, statement.strip()

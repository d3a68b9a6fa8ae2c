"""What do the small recipes give, as they stand?

Each small experiment whose head tells no number runs by its own command, some ten minutes of a core each, and is asked
what it is asked there. Their heads may then send the reader to the page.
"""

from __future__ import annotations

import re
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator

from benchmarks.claims.runs import ROOT, Values, composed, table, trained
from repr.fit import fit

TITLE = "The small recipes"
LIBRARIES = ("torch", "timm", "open-clip-torch")
SEEDS, LENGTH = (1, 1), (0, 1)  # 0: as long as the recipe says
FOLDER = ROOT / "conf" / "experiment"
SMALL = re.compile(r"_(emoji|scenes)$")
TOLD = re.compile(r"^# expect +(no number yet|see benchmarks/results/recipes.md)", re.MULTILINE)
METHODS = sorted(
    path.stem
    for path in FOLDER.glob("*.yaml")
    if SMALL.search(path.stem) and TOLD.search(path.read_text(encoding="utf-8"))
)
COLUMNS = {  # those that an experiment has; `shape` is asked of drawn scenes, `category` of emoji
    "kNN": r"val/knn_(category|shape)",
    "probe": r"val/ridge_(category|shape)",
    "kNN, other style": r"test_style/knn_category",
    "probe, other style": r"test_style/ridge_category",
    "R@5 of texts": r"test_style/i2t_R@5",
    "R@5 of pictures": r"test_style/t2i_R@5",
    "zero-shot": r"val/zero_shot_top1",
    "correspondence": r"val/correspondence@0\.5",
}
MINUTES = "minutes"


def train(method: str, seed: int, epochs: int) -> dict[str, Values]:
    """One run; its numbers and what one thread took, and the levels of the numbers at chance."""
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        results = fit(composed([f"experiment={method}"], seed, epochs, folder))
    found = {
        column: results[name] for column, pattern in COLUMNS.items() for name in results if re.fullmatch(pattern, name)
    }
    values = {column: value for column, (value, _) in found.items()}
    chance = {column: level for column, (_, level) in found.items() if level is not None}
    return {"values": values | {MINUTES: (time.process_time() - start) / 60}, "chance": chance}


def settings(options: Namespace) -> str:
    length = f"{options.length} epoch(s)" if options.length else "as long as the recipe says"
    return (
        f"`python -m repr.fit experiment=NAME` on one thread, {options.seeds} seed(s), {length}; minutes of CPU with "
        "data and evaluation, beside another run. kNN and ridge probe tell the category of an emoji, or the shape in a "
        "drawn scene, from the trunk. `val` has what is never trained on: concepts, or scenes; the other style is that "
        "of a vendor never trained on. R@5 is of concepts of the training set in that style, zero-shot of `val`."
    )


def report(options: Namespace) -> Iterator[list[str]]:
    runs = trained(METHODS, options)
    for data in ("emoji", "scenes"):
        some = {method: found for method, found in runs.items() if method.endswith(data)}
        first = [of_method[0] for of_method in some.values()]
        columns = [column for column in COLUMNS if any(column in found["values"] for found in first)]
        chance = {name: level for found in first for name, level in found["chance"].items()}
        values = {method: [found["values"] for found in of_method] for method, of_method in some.items()}
        yield table(values, [*columns, MINUTES], corner="experiment", chance=chance)

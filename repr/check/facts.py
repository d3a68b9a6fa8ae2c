"""What is in a data set: sizes, formats, damage, duplicates, captions and labels, as one report.

Rows are read once, in worker processes; what stays of a row is some tens of bytes (a hash, a size, the hashes and
lengths of its captions), so a set of any size can be looked through.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import blake2b
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from repr.batch import evenly_spread
from repr.data.bad_rows import one_line
from repr.data.datamodule import DataModule
from repr.data.datasets import MAX_CAPTION_CHARS, Tokenizer
from repr.data.sources.source import Source
from repr.data.workers import Loader

BLOCK = 32  # rows that a worker reads at a time
NUM_FREQUENT = 10  # captions that are told with their counts
NUM_GROUPS = 1000  # groups of equal pictures that are listed; all are counted

Report = dict[str, Any]


class CaptionFacts(NamedTuple):
    """Of one caption; ``tokens`` counts those before any is cut, start and end included, 0 where that is unknown."""

    digest: int
    characters: int
    words: int
    tokens: int


class RowFacts(NamedTuple):
    """Of one row; where ``fault`` says why it cannot be read, nothing else is known.

    Width and height are those of the upright picture, mode and format Pillow's names of what is stored.
    """

    fault: str = ""
    digest: bytes = b""
    width: int = 0
    height: int = 0
    format: str = ""
    mode: str = ""
    captions: Sequence[CaptionFacts] = ()


def row_facts(source: Source, row: int, count_tokens: Callable[[str], int] | None) -> RowFacts:
    """Read one row as training would."""
    try:
        data = source.encoded(row)
        image = source.image(row)
        texts = source.captions(row)
    except OSError as error:
        return RowFacts(fault=one_line(error))
    try:
        with Image.open(BytesIO(data)) as header:
            kind, mode = header.format or "unknown", header.mode
    except UnidentifiedImageError:  # a source with a decoder of its own
        kind, mode = "unknown", image.mode
    captions = [
        CaptionFacts(caption_digest(text), len(text), len(text.split()), count_tokens(text) if count_tokens else 0)
        for text in texts
    ]
    return RowFacts("", blake2b(data, digest_size=16).digest(), image.width, image.height, kind, mode, captions)


def caption_digest(text: str) -> int:
    """64 bits that stand for a caption."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def token_counter(tokenizer: Tokenizer | None) -> Callable[[str], int] | None:
    """How many tokens a text has; None where the tokenizer cannot tell before it cuts them (it has no ``encode``)."""
    encode = getattr(tokenizer, "encode", None)
    return None if encode is None else lambda text: len(encode(text[:MAX_CAPTION_CHARS])) + 2  # start and end


class _Blocks(Dataset[list[RowFacts]]):
    """Facts of the rows of a batch, in a worker."""

    def __init__(self, source: Source, tokenizer: Tokenizer | None) -> None:
        self.source, self.tokenizer = source, tokenizer

    def __getitems__(self, rows: np.ndarray) -> list[RowFacts]:
        count_tokens = token_counter(self.tokenizer)
        return [row_facts(self.source, row, count_tokens) for row in rows.tolist()]


class Scan:
    """Everything that is kept of the rows of one source.

    Args:
        source: the rows.
        rows: (M,) int64, those that are read.
        tokenizer: None for images only.
        num_workers: processes that read.
        advance: called with the number of rows after each block.
    """

    def __init__(
        self,
        source: Source,
        rows: np.ndarray,
        tokenizer: Tokenizer | None,
        *,
        num_workers: int = 0,
        advance: Callable[[int], object] = int,
    ) -> None:
        self.source, self.num_read = source, len(rows)
        self.faults: dict[int, str] = {}
        self.formats: Counter[str] = Counter()
        self.modes: Counter[str] = Counter()
        self.without_caption = array("q")
        self._rows, self._digests = array("q"), bytearray()  # of readable rows
        self._sizes, self._caption_rows, self._captions = array("i"), array("q"), array("Q")
        blocks: list[Any] = [rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)]
        loader = Loader(_Blocks(source, tokenizer), batch_sampler=blocks, num_workers=num_workers, collate_fn=_as_it_is)
        for block, facts in zip(blocks, loader, strict=True):
            for row, fact in zip(block.tolist(), facts, strict=True):
                self._keep(row, fact)
            advance(len(block))
        self.rows = np.array(self._rows, np.int64)
        self.digests = np.frombuffer(bytes(self._digests), np.uint64).reshape(-1, 2)
        self.sizes = np.array(self._sizes, np.int64).reshape(-1, 2)  # width, height
        self.captions = np.array(self._captions, np.uint64).reshape(-1, len(CaptionFacts._fields))
        self.caption_rows = np.array(self._caption_rows, np.int64)

    def _keep(self, row: int, fact: RowFacts) -> None:
        if fact.fault:
            self.faults[row] = fact.fault
            return
        self._rows.append(row)
        self._digests += fact.digest
        self._sizes.extend((fact.width, fact.height))
        self.formats[fact.format] += 1
        self.modes[fact.mode] += 1
        if not fact.captions:
            self.without_caption.append(row)
        for caption in fact.captions:
            self._caption_rows.append(row)
            self._captions.extend(caption)


def _as_it_is(facts: list[RowFacts]) -> list[RowFacts]:
    return facts


def check_data(
    datamodule: DataModule,
    *,
    num_rows: int | None = None,
    progress: Callable[[str, int], Callable[[int], object]] | None = None,
) -> Report:
    """Read the training set and every evaluation set.

    Args:
        datamodule: names the sets, the tokenizer and the number of workers.
        num_rows: at most so many rows of a set are read, evenly spread; None: all.
        progress: called with name and number of rows of a set before it is read; what it returns is called with the
            number of rows after each block.

    Returns:
        The report, of plain values: ``sets`` (by name) and ``leakage`` (evaluation set -> pictures that the
        training set has too).
    """
    scans = {}
    for name, source in {"train": datamodule.train, **datamodule.eval}.items():
        rows = evenly_spread(len(source), num_rows or len(source)).numpy()
        options = {} if progress is None else {"advance": progress(name, len(rows))}
        scans[name] = Scan(source, rows, datamodule.tokenizer, num_workers=datamodule.num_workers, **options)
    duplicates, leakage = equal_pictures(scans)
    context = None if datamodule.tokenizer is None else datamodule.tokenizer([""]).shape[1]
    counted = token_counter(datamodule.tokenizer) is not None
    classes = {name: set(labels) for name, labels in datamodule.train.attributes.items()}
    return {
        "sets": {
            name: {
                "rows": len(scan.source),
                "read": scan.num_read,
                "unreadable": [{"key": scan.source.key(row), "reason": why} for row, why in scan.faults.items()],
                "width": spread(scan.sizes[:, 0]),
                "height": spread(scan.sizes[:, 1]),
                "formats": dict(scan.formats.most_common()),
                "modes": dict(scan.modes.most_common()),
                "duplicates": duplicates[name],
                "captions": caption_report(scan, context if counted else None),
                "labels": label_report(scan.source, None if name == "train" else classes),
            }
            for name, scan in scans.items()
        },
        "leakage": leakage,
    }


def spread(values: np.ndarray) -> dict[str, float] | None:
    """Least, median and greatest value; None of nothing."""
    if not len(values):
        return None
    return {"min": int(values.min()), "median": float(np.median(values)), "max": int(values.max())}


def equal_pictures(scans: Mapping[str, Scan]) -> tuple[dict[str, Report], dict[str, Report]]:
    """Pictures whose files are equal to the byte: within each set, and of each evaluation set in the training set."""
    names = list(scans)
    owner = np.repeat(np.arange(len(names)), [len(scan.rows) for scan in scans.values()])
    rows = np.concatenate([scan.rows for scan in scans.values()])
    duplicates: dict[str, Report] = {name: {"groups": 0, "surplus": 0, "keys": []} for name in names}
    leakage: dict[str, Report] = {name: {"rows": 0, "keys": []} for name in names[1:]}
    for group in equal_groups(np.concatenate([scan.digests for scan in scans.values()])):
        keys = {
            name: [scans[name].source.key(row) for row in rows[group[owner[group] == number]].tolist()]
            for number, name in enumerate(names)
        }
        for name, members in keys.items():
            if len(members) > 1:
                entry = duplicates[name]
                entry["groups"] += 1
                entry["surplus"] += len(members) - 1
                entry["keys"] += [members] if len(entry["keys"]) < NUM_GROUPS else []
            if name in leakage and members and keys["train"]:
                leakage[name]["rows"] += len(members)
                pair = {"train": keys["train"], "set": members}
                leakage[name]["keys"] += [pair] if len(leakage[name]["keys"]) < NUM_GROUPS else []
    return duplicates, leakage


def equal_groups(digests: np.ndarray) -> Iterator[np.ndarray]:
    """Positions of equal rows of (N, 2), one ascending array for each value that occurs more than once."""
    order = np.lexsort(digests.T)  # stable, so positions stay ascending within a value
    in_order = digests[order]
    same = (in_order[1:] == in_order[:-1]).all(axis=1)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], same.astype(np.int8), [0]])))
    groups = [order[start : end + 1] for start, end in edges.reshape(-1, 2).tolist()]
    return iter(sorted(groups, key=lambda group: int(group[0])))


def caption_report(scan: Scan, context_length: int | None) -> Report:
    """Lengths, repetitions and lack of captions; ``context_length`` None where tokens were not counted."""
    report: Report = {
        "captions": len(scan.captions),
        "rows_without": len(scan.without_caption),
        "keys_without": [scan.source.key(row) for row in scan.without_caption],
    }
    if not len(scan.captions):
        return report
    facts = dict(zip(CaptionFacts._fields, scan.captions.T, strict=True))
    report |= {"characters": spread(facts["characters"]), "words": spread(facts["words"])}
    if context_length is not None:
        cut = facts["tokens"] > context_length
        report["tokens"] = spread(facts["tokens"])
        report |= {"context_length": context_length, "cut": int(cut.sum()), "cut_share": float(cut.mean())}
    digests, first, counts = np.unique(facts["digest"], return_index=True, return_counts=True)
    report["distinct"] = len(digests)
    report["frequent"] = [
        {"caption": _caption(scan.source, int(scan.caption_rows[first[n]]), int(digests[n])), "count": int(counts[n])}
        for n in np.lexsort((first, -counts))[:NUM_FREQUENT]
    ]
    return report


def _caption(source: Source, row: int, digest: int) -> str:
    """The caption of a row that has this digest; only digests are kept, so the row is read again."""
    return next((text for text in source.captions(row) if caption_digest(text) == digest), "(has changed meanwhile)")


def label_report(source: Source, train_classes: Mapping[str, set[str]] | None) -> Report:
    """Sizes of the classes of every attribute, the largest first; ``train_classes`` None for the training set."""
    report: Report = {}
    for attribute, labels in source.attributes.items():
        counts = Counter(labels)
        unlabelled = counts.pop("", 0)
        report[attribute] = {"classes": len(counts), "unlabelled": unlabelled, "counts": dict(counts.most_common())}
        if train_classes is not None:
            report[attribute]["not_in_train"] = sorted(counts.keys() - train_classes.get(attribute, set()))
    return report

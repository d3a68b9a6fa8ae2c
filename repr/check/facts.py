"""What is in a data set: sizes, formats, damage, duplicates, captions and labels, as one report.

Rows are read once, in worker processes; what stays of a row is some tens of bytes (a hash, a size, the hashes and
lengths of its captions), so a set of any size can be looked through.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from rich.progress import Progress
from torch.utils.data import Dataset

from repr.batch import evenly_spread
from repr.data.bad_rows import one_line
from repr.data.datamodule import DataModule
from repr.data.datasets import MAX_CAPTION_CHARS, Tokenizer
from repr.data.sources.columns import Labels
from repr.data.sources.pictures import picture_format
from repr.data.sources.source import Source, is_remote, prefetch
from repr.data.workers import Loader

BLOCK = 32  # rows that a worker reads at a time
REMOTE_ROWS = 1000  # of a set in a store that are read where nothing else is asked for
NUM_FREQUENT = 10  # captions that are told with their counts
NUM_GROUPS = 1000  # groups of equal pictures that are listed; all are counted

Report = dict[str, Any]


class CaptionFacts(NamedTuple):
    """What is kept of one caption."""

    row: int
    digest: int
    characters: int
    words: int
    tokens: int  # see num_tokens


class RowFacts(NamedTuple):
    """What is known of one row; where ``fault`` says why it cannot be read, nothing else is known.

    Width and height are those of the upright picture, mode and format Pillow's names of what is stored.
    """

    row: int
    fault: str = ""
    digest: bytes = b""
    width: int = 0
    height: int = 0
    format: str = ""
    mode: str = ""
    captions: Sequence[CaptionFacts] = ()


def row_facts(source: Source, row: int, tokenizer: Tokenizer | None = None) -> RowFacts:
    """Read one row as training would."""
    try:
        data = source.encoded(row)
        image = source.image(row)
        texts = source.captions(row)
    except OSError as error:
        return RowFacts(row, one_line(error))
    kind, mode = picture_format(data) or ("unknown", image.mode)  # a source may have a decoder of its own
    captions = [
        CaptionFacts(row, caption_digest(text), len(text), len(text.split()), num_tokens(tokenizer, text))
        for text in texts
    ]
    return RowFacts(row, "", blake2b(data, digest_size=16).digest(), *image.size, kind, mode, captions)


def caption_digest(text: str) -> int:
    """64 bits that stand for a caption."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def num_tokens(tokenizer: Tokenizer | None, text: str) -> int:
    """Tokens of a text before any is cut, start and end included; 0 of a tokenizer that cannot tell (has no encode)."""
    encode = getattr(tokenizer, "encode", None)
    return 0 if encode is None else len(encode(text[:MAX_CAPTION_CHARS])) + 2


@dataclass(eq=False)
class _Reader(Dataset[list[RowFacts]]):
    """Reads a block of rows, in a worker."""

    source: Source
    tokenizer: Tokenizer | None

    def __getitems__(self, rows: Sequence[int]) -> list[RowFacts]:
        prefetch(self.source, [int(row) for row in rows])
        return [row_facts(self.source, int(row), self.tokenizer) for row in rows]


class Scan:
    """Everything that is kept of the rows of one source.

    Args:
        source: the rows.
        facts: of those rows that are read.
    """

    def __init__(self, source: Source, facts: Iterable[RowFacts]) -> None:
        self.source = source
        self.faults: dict[int, str] = {}
        self.formats: Counter[str] = Counter()
        self.modes: Counter[str] = Counter()
        rows, digests, sizes, captions = array("q"), bytearray(), array("q"), array("Q")
        for fact in facts:
            if fact.fault:
                self.faults[fact.row] = fact.fault
                continue
            rows.append(fact.row)
            digests += fact.digest
            sizes.extend((fact.width, fact.height))
            self.formats[fact.format] += 1
            self.modes[fact.mode] += 1
            captions.extend(chain.from_iterable(fact.captions))
        self.rows = np.array(rows, np.int64)  # (M,), those that can be read
        self.digests = np.frombuffer(bytes(digests), np.uint64).reshape(-1, 2)  # (M, 2)
        self.sizes = np.array(sizes, np.int64).reshape(-1, 2)  # (M, 2), width and height
        self.captions = np.array(captions, np.uint64).reshape(-1, len(CaptionFacts._fields))  # (C, 5)


def check_data(datamodule: DataModule, *, num_rows: int | None = None, progress: Progress | None = None) -> Report:
    """Read the training set and every evaluation set.

    Args:
        datamodule: names the sets, the tokenizer and the number of workers.
        num_rows: at most so many rows of a set are read, evenly spread; None: all, but 1,000 of a set in a store.
        progress: gets a bar for each set.

    Returns:
        The report, of plain values: ``sets`` by name, and ``leakage``, the pictures that evaluation and training share.
    """
    tokenizer, progress = datamodule.tokenizer, progress or Progress(disable=True)
    scans = {}
    for name, source in datamodule.sources.items():
        rows = evenly_spread(len(source), num_rows or (REMOTE_ROWS if is_remote(source) else len(source))).numpy()
        loader = Loader(_Reader(source, tokenizer), sampler=rows, batch_size=BLOCK, num_workers=datamodule.num_workers)
        facts = progress.track(chain.from_iterable(loader), total=len(rows), description=name)
        scans[name] = Scan(source, facts)
    duplicates, leakage = equal_pictures(scans)
    context = None if tokenizer is None or not hasattr(tokenizer, "encode") else tokenizer([""]).shape[1]
    classes = {name: set(labels) for name, labels in datamodule.train.attributes.items()}
    return {
        "sets": {
            name: {
                "rows": len(scan.source),
                "read": len(scan.rows) + len(scan.faults),
                "unreadable": [{"key": scan.source.key(row), "reason": why} for row, why in scan.faults.items()],
                "width": spread(scan.sizes[:, 0]),
                "height": spread(scan.sizes[:, 1]),
                "formats": dict(scan.formats.most_common()),
                "modes": dict(scan.modes.most_common()),
                "duplicates": duplicates[name],
                "captions": caption_report(scan, context),
                "labels": label_report(scan.source, None if name == "train" else classes),
            }
            for name, scan in scans.items()
        },
        "leakage": leakage,
    }


def spread(values: np.ndarray) -> dict[str, float] | None:
    """Least, median and greatest value; None where there are no values."""
    if not len(values):
        return None
    return {"min": int(values.min()), "median": float(np.median(values)), "max": int(values.max())}


def equal_pictures(scans: Mapping[str, Scan]) -> tuple[dict[str, Report], dict[str, Report]]:
    """Pictures whose files are equal to the byte: within each set, and of each evaluation set in the training set."""
    names = list(scans)
    owners = np.repeat(np.arange(len(names)), [len(scan.rows) for scan in scans.values()])
    rows = np.concatenate([scan.rows for scan in scans.values()])
    duplicates: dict[str, Report] = {name: {"groups": 0, "surplus": 0, "keys": []} for name in names}
    leakage: dict[str, Report] = {name: {"rows": 0, "keys": []} for name in names[1:]}
    for group in equal_groups(np.concatenate([scan.digests for scan in scans.values()])):
        keys: dict[str, list[str]] = {name: [] for name in names}
        for position in group:
            name = names[owners[position]]
            keys[name].append(scans[name].source.key(int(rows[position])))
        for name, members in keys.items():
            if len(members) > 1:
                duplicates[name]["groups"] += 1
                duplicates[name]["surplus"] += len(members) - 1
                duplicates[name]["keys"] += [members] if len(duplicates[name]["keys"]) < NUM_GROUPS else []
            if name in leakage and members and keys["train"]:
                pair = {"train": keys["train"], "set": members}
                leakage[name]["rows"] += len(members)
                leakage[name]["keys"] += [pair] if len(leakage[name]["keys"]) < NUM_GROUPS else []
    return duplicates, leakage


def equal_groups(digests: np.ndarray) -> list[list[int]]:
    """Positions of equal rows of (N, 2): a rising list for each value that occurs more than once."""
    _, inverse, counts = np.unique(digests[:, 0], return_inverse=True, return_counts=True)
    groups: dict[bytes, list[int]] = {}
    for position in np.flatnonzero(counts[inverse] > 1).tolist():
        groups.setdefault(digests[position].tobytes(), []).append(position)
    return [group for group in groups.values() if len(group) > 1]


def caption_report(scan: Scan, context_length: int | None) -> Report:
    """Lengths, repetitions and lack of captions; ``context_length`` None where tokens were not counted."""
    row, digest, characters, words, tokens = scan.captions.T
    without = np.setdiff1d(scan.rows, row.astype(np.int64)).tolist()
    report: Report = {"captions": len(scan.captions), "rows_without": len(without)}
    report["keys_without"] = [scan.source.key(row) for row in without]
    if not len(scan.captions):
        return report
    report |= {"characters": spread(characters), "words": spread(words)}
    if context_length is not None:
        cut = tokens > context_length
        report |= {"tokens": spread(tokens), "context_length": context_length}
        report |= {"cut": int(cut.sum()), "cut_share": float(cut.mean())}
    digests, first, counts = np.unique(digest, return_index=True, return_counts=True)
    report["distinct"] = len(digests)
    report["frequent"] = [
        {"caption": _caption(scan.source, int(row[first[n]]), int(digests[n])), "count": int(counts[n])}
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


def unread_rows(report: Report) -> Iterator[str]:
    """A remark for each set of which some rows were not read."""
    for name, facts in report["sets"].items():
        if facts["read"] < facts["rows"]:
            told = f"{name}: {facts['read']:,} of {facts['rows']:,} rows were read, evenly spread"
            yield f"{told}; what is told of pictures and captions is of those. --rows {facts['rows']} reads all"


def joined_labels(name: str, source: Source) -> Iterator[str]:
    """A remark for each attribute of the set ``name`` with classes that look like several in one cell (``cat,dog``)."""
    for attribute, labels in source.attributes.items():
        classes = Labels.of(labels).present()
        parts = {label: {part.strip() for part in re.split("[,;|]", label)} - {label} for label in classes}
        if joined := sorted(label for label in classes if parts[label] & classes):
            yield (
                f"{name}: {len(joined)} of {len(classes)} classes of {attribute!r} look like several in one cell, such "
                f"as {joined[0]!r}; each is a class of its own, since a label is a single value"
            )

"""Write a data set as tar shards in WebDataset layout.

The source is named as for ``repr.fit``; run in the root of the repository::

    python -m tools.make_shards data=folder data.train.root=IMAGES data.train.captions=true --out SHARDS
    python -m repr.fit data=shards 'data.train.files=SHARDS/train-*.tar'

A sample is ``key.<format>`` with the picture's bytes as they are, and ``key.txt`` with its caption or, where it has
several, ``captions`` in ``key.json``, which also holds its labels by attribute. Rows that cannot be read are left out
and listed in ``unreadable.tsv``. Shard k holds the rows from k times ``--rows-per-shard`` on. Weights of captions are
not kept. Beside each shard lies its index, which ``data=shards`` uses, also where both are copied to a store.

A stopped run goes on when the same command is given again, and ends with the same bytes: a shard is written aside,
flushed and renamed, and ``make_shards.json`` knows those that are done. ``sha256sum -c SHA256SUMS`` verifies them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from repr.cli import one_line_errors, user_message
from repr.config import ConfigError, compose
from repr.config_check import check
from repr.data.sources.pictures import IMAGE_SUFFIXES
from repr.data.sources.shard_index import ShardIndex
from repr.data.sources.source import Source
from repr.data.workers import Loader
from repr.files import PART, replacing

MANIFEST, SUMS, UNREADABLE = "make_shards.json", "SHA256SUMS", "unreadable.tsv"
NUM_PROBES = 100  # rows whose bytes and captions the fingerprint of a source holds
# Pillow's name of a format -> ending of the member, where it is not the name itself.
ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}
# What a resized picture is stored as; all others are lossless, and become PNG.
RESIZED = {"JPEG": "JPEG", "MPO": "JPEG", "JPEG2000": "JPEG", "WEBP": "WEBP", "AVIF": "WEBP"}

Record = dict[str, Any]


def member_name(key: str) -> str:
    """A key as the name of tar members: relative, without dots in its last part, and without ``~``.

    What follows the first dot of the last part would be read as the member's kind, and webdataset leaves out names
    that start with two underscores.
    """
    if key.lower().endswith(IMAGE_SUFFIXES):
        key = key.rpartition(".")[0]
    key = "".join("_" if letter in "\\~" or not letter.isprintable() else letter for letter in key)
    parts = [part for part in key.split("/") if part not in ("", ".", "..")] or ["_"]
    parts[-1] = parts[-1].replace(".", "_")
    name = "/".join(parts)
    return "_" + name.lstrip("_") if name.startswith("__") else name


def survey(source: Source) -> tuple[np.ndarray, str]:
    """Which rows share their member name with another, (N,) bool, and a fingerprint of the source.

    The fingerprint holds keys and labels of all rows, and bytes and captions of some that are evenly spread.
    """
    names, total = np.empty(len(source), np.uint64), hashlib.sha256()
    for row in range(len(source)):
        key = source.key(row)
        names[row] = int.from_bytes(hashlib.blake2b(_encode(member_name(key)), digest_size=8).digest(), "little")
        total.update(_encode(key) + b"\0")
    for attribute, labels in source.attributes.items():
        total.update(_encode("\0".join([attribute, *labels])))
    for row in sorted({probe * len(source) // NUM_PROBES for probe in range(NUM_PROBES)}):
        try:
            total.update(source.encoded(row) + _encode("\0".join(source.captions(row))))
        except OSError:
            total.update(b"unreadable")
    _, inverse, counts = np.unique(names, return_inverse=True, return_counts=True)
    return counts[inverse] > 1, total.hexdigest()


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


class Shards(Dataset[Record]):
    """Item k writes shard k and gives its record; so torch's loader runs it in several processes.

    Args:
        source: the rows.
        out: the folder.
        name: what the shards' names start with.
        shared: (N,) bool, rows whose member name needs a number to be the only one.
        rows_per_shard: rows of each shard.
        max_side: pictures with a longer side are made smaller; None: bytes stay as they are.
        quality: of JPEG and WebP that are made smaller.
    """

    def __init__(
        self,
        source: Source,
        out: Path,
        name: str,
        shared: np.ndarray,
        rows_per_shard: int,
        max_side: int | None,
        quality: int | None,
    ) -> None:
        self.source, self.out, self.name, self.shared = source, out, name, shared
        self.rows_per_shard, self.max_side, self.quality = rows_per_shard, max_side, quality

    def __len__(self) -> int:
        return -(-len(self.source) // self.rows_per_shard)

    def file(self, number: int) -> str:
        """The name of a shard."""
        return f"{self.name}-{number:05d}.tar"

    def __getitem__(self, number: int) -> Record:
        """Write a shard; one of which no row can be read is left out."""
        from webdataset.writer import TarWriter

        first = number * self.rows_per_shard
        unreadable: list[list[str]] = []
        rows = range(first, min(first + self.rows_per_shard, len(self.source)))
        path = self.out / self.file(number)
        with replacing(path, shared=True) as file:  # a killed run's workers may be at it still
            # PAX, since USTAR ends a run at a key of more than 255 bytes
            owner = {"user": "", "group": "", "mode": 0o644, "mtime": 0}
            with TarWriter(file, encoder=False, format="PAX_FORMAT", **owner) as tar:
                for row in rows:
                    try:
                        sample = self.sample(row)
                    except OSError as error:
                        unreadable.append([self.source.key(row), " ".join(str(error).split())])
                    else:
                        tar.write(sample)
        record: Record = {"samples": len(rows) - len(unreadable), "unreadable": unreadable}
        if not record["samples"]:
            path.unlink()
            return record | {"bytes": 0}
        labels = [f"json:{attribute}" for attribute in self.source.attributes]
        ShardIndex.build(str(path), labels=labels).save(str(path), cache_dir=None)
        with path.open("rb") as file:
            return record | {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}

    def sample(self, row: int) -> dict[str, Any]:
        """The members of a row.

        Raises:
            OSError: it cannot be read.
        """
        data, image, captions = self.source.encoded(row), self.source.image(row), self.source.captions(row)
        with Image.open(BytesIO(data)) as header:
            kind = header.format or "PNG"
        if self.max_side is not None and max(image.size) > self.max_side:
            kind = RESIZED.get(kind, "PNG")
            data = resized(image, self.max_side, kind, self.quality)
        name = member_name(self.source.key(row)) + (f"~{row}" if self.shared[row] else "")
        sample: dict[str, Any] = {"__key__": name, ENDINGS.get(kind, kind.lower()): data}
        facts: dict[str, Any] = {name: labels[row] for name, labels in self.source.attributes.items() if labels[row]}
        if len(captions) == 1:
            sample["txt"] = captions[0].encode()
        elif captions:
            facts["captions"] = captions
        if facts:
            sample["json"] = json.dumps(facts, ensure_ascii=False, sort_keys=True).encode()
        return sample


def resized(image: Image.Image, max_side: int, kind: str, quality: int | None) -> bytes:
    """The file of an RGB picture whose longer side becomes ``max_side``."""
    scale = max_side / max(image.size)
    size = [max(1, round(side * scale)) for side in image.size]
    buffer = BytesIO()
    options = {} if kind == "PNG" else {"quality": quality}
    image.resize((size[0], size[1]), Image.Resampling.LANCZOS).save(buffer, kind, **options)
    return buffer.getvalue()


def make_shards(
    source: Source,
    out: Path,
    *,
    name: str = "train",
    rows_per_shard: int = 10_000,
    max_side: int | None = None,
    quality: int | None = None,
    workers: int = 0,
    tell: Callable[[str], object] = print,
) -> dict[str, Record]:
    """Write what is not written yet.

    Args:
        source: the rows.
        out: the folder; made where it is missing.
        name: what the shards' names start with.
        rows_per_shard: rows of each shard.
        max_side: pictures with a longer side are made smaller; None: bytes stay as they are.
        quality: of JPEG and WebP that are made smaller.
        workers: processes that write; 0: this one.
        tell: receives a line for each shard.

    Returns:
        Shard -> its record.

    Raises:
        ConfigError: the folder holds shards of another source or of other options, or nothing can be read.
    """
    if "captions" in source.attributes:
        raise ConfigError(["an attribute is named 'captions', which is the captions' own place in key.json; rename it"])
    out.mkdir(parents=True, exist_ok=True)
    shared, fingerprint = survey(source)
    plan = {
        "set": name,
        "source": fingerprint,
        "rows_per_shard": rows_per_shard,
        "max_side": max_side,
        "quality": quality,
    }
    done = _finished(out, plan)
    shards = Shards(source, out, name, shared, rows_per_shard, max_side, quality)
    names = [shards.file(number) for number in range(len(shards))]
    for file in (*names, MANIFEST):  # what a kill has left of ours; others may be writing here, too
        Path(out, f"{file}{PART}").unlink(missing_ok=True)
    todo = [number for number, file in enumerate(names) if file not in done]
    if len(todo) < len(names):
        tell(f"{len(names) - len(todo)} of {len(names)} shards are there already")
    _save(out, plan, done)
    warnings.filterwarnings("ignore", message="This DataLoader will create .* worker processes")
    records = Loader(shards, batch_size=None, sampler=todo, num_workers=workers)
    for number, record in zip(todo, records, strict=True):
        done[names[number]] = record
        _save(out, plan, done)
        tell(f"{names[number]}: {record['samples']:,} samples, {record['bytes'] / 1e6:,.1f} MB")
    if not any(record["samples"] for record in done.values()):
        raise ConfigError([f"none of {len(source)} rows can be read; python -m repr.check tells why"])
    return done


def _finished(out: Path, plan: Record) -> dict[str, Record]:
    """Shards that are there and whole.

    Raises:
        ConfigError: they are not those of the plan.
    """
    path = out / MANIFEST
    if not path.is_file():
        if strange := sorted(out.glob("*.tar")):
            raise ConfigError([f"{strange[0]} is not of this program's making; set --out to an empty folder"])
        return {}
    manifest = json.loads(path.read_text(encoding="utf-8"))
    for option, old in manifest["plan"].items():
        if plan[option] != old:
            was = "the source has changed" if option == "source" else f"--{option.replace('_', '-')} was {old}"
            raise ConfigError(
                [f"{out} was begun otherwise: {was}; go on as it was begun, or set --out to another folder"]
            )
    return {
        name: record
        for name, record in manifest["shards"].items()
        if not record["samples"] or ((out / name).is_file() and (out / name).stat().st_size == record["bytes"])
    }


def _save(out: Path, plan: Record, done: dict[str, Record]) -> None:
    """Write down what is done, in the order of shards."""
    done = dict(sorted(done.items()))
    sums = "".join(f"{record['sha256']}  {name}\n" for name, record in done.items() if record["samples"])
    rows = [row for record in done.values() for row in record["unreadable"]]
    texts = {
        SUMS: sums,
        UNREADABLE: "".join(f"{key}\t{reason}\n" for key, reason in rows),
        MANIFEST: json.dumps({"plan": plan, "shards": done}, indent=1, ensure_ascii=False) + "\n",
    }
    for name, text in texts.items():
        with replacing(out / name) as file:
            file.write(text.encode("utf-8", "backslashreplace"))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.make_shards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="name the source, as for repr.fit")
    parser.add_argument("--config-dir", help="a folder of your own, laid out like conf/, whose files come first")
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--set", default="train", help="train, or the name of an evaluation set")
    parser.add_argument("--rows-per-shard", type=int, default=10_000)
    parser.add_argument("--max-side", type=int, help="make pictures smaller whose longer side has more pixels")
    parser.add_argument("--quality", type=int, help="of JPEG and WebP that are made smaller (90)")
    parser.add_argument("--workers", type=int, default=0, help="processes that write; 0: this one")
    options = parser.parse_intermixed_args(arguments)
    with one_line_errors():
        try:
            done = make_shards(_source(options), options.out, **_shard_options(options))
        except KeyboardInterrupt:
            sys.exit("stopped; the same command goes on")
        except OSError as error:
            if user_message(error) is not None:
                raise
            # What can be read was read: the disk is at fault.
            raise OSError(f"{options.out}: {str(error).splitlines()[-1]}") from error
    unreadable = [row for record in done.values() for row in record["unreadable"]]
    print(f"{sum(record['samples'] for record in done.values()):,} samples in {options.out}")
    if unreadable:
        print(f"{len(unreadable):,} rows could not be read and were left out; {options.out / UNREADABLE} lists them:")
        for _, reason in unreadable[:10]:
            print(f"  {reason}")


def _source(options: argparse.Namespace) -> Source:
    """What the config names."""
    from hydra.utils import instantiate

    cfg = compose(options.overrides, config_dir=options.config_dir)
    check(cfg)
    sets = {**cfg.data.eval, "train": cfg.data.train}
    if options.set not in sets:
        raise ConfigError([f"--set {options.set}: there is no such set; choose one of {', '.join(sorted(sets))}"])
    return instantiate(sets[options.set], _convert_="all")


def _shard_options(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of :func:`make_shards`."""
    for name, least in {"rows_per_shard": 1, "max_side": 1, "quality": 1, "workers": 0}.items():
        if (value := getattr(options, name)) is not None and value < least:
            raise ConfigError([f"--{name.replace('_', '-')} {value}; set it to {least} or more"])
    if options.max_side is None and options.quality is not None:
        raise ConfigError(["--quality is for pictures that are made smaller: set --max-side too, or leave it out"])
    quality = None if options.max_side is None else options.quality or 90
    names = ("rows_per_shard", "max_side", "workers")
    return {"name": options.set, "quality": quality, **{name: getattr(options, name) for name in names}}


if __name__ == "__main__":
    main()

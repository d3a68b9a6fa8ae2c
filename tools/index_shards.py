"""Make the indexes of tar shards, on a disk or in a store.

They are what ``data=shards`` reads shards at random with; ``FILES`` are named as for ``data.train.files``::

    python -m tools.index_shards 's3://BUCKET/train-{00000..00999}.tar' --label json:category --workers 8

Each shard is read once. Its index goes beside it, or into the cache folder where that is not possible, as over https.
Shards whose index is there already, with these labels, are not read again.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path

from torch.utils.data import Dataset

from repr.cli import one_line_errors
from repr.data.sources import remote
from repr.data.sources.remote_index import kept_index, make_index
from repr.data.sources.shard_index import ENDING, cache_folder, load_indexes
from repr.data.sources.shards import expand_files
from repr.data.workers import Loader


class Indexes(Dataset[str]):
    """Item k makes the index of shard k, and says where it is; so torch's loader runs it in several processes.

    Args:
        files: paths and URLs.
        labels: fields of class names that the indexes have.
        folder: where those go that cannot lie beside their shard.
    """

    def __init__(self, files: Sequence[str], labels: Sequence[str], folder: Path) -> None:
        self.files, self.labels, self.folder = files, labels, folder

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> str:
        """Make one; raises ValueError where the shard is damaged, no tar file, or cannot be read."""
        path = self.files[number]
        if not remote.is_remote(path):
            (index,) = load_indexes([path], labels=self.labels, cache_dir=str(self.folder))
            return f"{path}: {len(index):,} samples, {index.kept}"
        facts = remote.facts(path)
        try:
            index = kept_index(path, facts, self.labels, self.folder)
        except ValueError:  # that of another shard, or damaged
            index = None
        if index is None or set(self.labels) - index.labels.keys():
            known = index.labels if index else []
            index = make_index(path, facts, list(dict.fromkeys([*known, *self.labels])), self.folder)
        place = path + ENDING
        if index.etag and not remote.write(
            place, index.encoded()
        ):  # without ETag it was made on a disk, and lies there
            place = str(index.kept)
        return f"{path}: {len(index):,} samples, {place}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.index_shards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", metavar="FILES", help="paths, URLs, patterns, or a .txt that lists them")
    parser.add_argument("--label", action="append", default=[], help="a field that data.train.labels names; repeatable")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: this one")
    parser.add_argument("--cache-dir", help="as data.train.cache_dir")
    options = parser.parse_args(arguments)
    with one_line_errors():
        if options.workers < 0:
            raise ValueError(f"--workers {options.workers}; set it to 0 or more")
        files = expand_files(options.files)
        warnings.filterwarnings("ignore", message="This DataLoader will create .* worker processes")
        indexes = Indexes(files, options.label, cache_folder(options.cache_dir))
        for line in Loader(indexes, batch_size=None, sampler=range(len(files)), num_workers=options.workers):
            print(line, flush=True)


if __name__ == "__main__":
    main()

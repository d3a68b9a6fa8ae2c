"""Files that are replaced as a whole, so that a kill or a full disk never leaves half of one."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import yaml

PART = ".part"  # what a file is called until it is complete
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the last is a limit of the process or the file system


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[BinaryIO]:
    """Open a file beside ``path`` that takes its place once it is complete and on the disk.

    Until then, and if writing fails, whatever stood at ``path`` stays.

    Args:
        path: the file; its folder is made where it is missing.
        shared: other processes may be writing the same file.

    Raises:
        OSError: the disk is full; the message says what is kept and what to do.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + (f".{_process()}" if shared else "") + PART)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch hides the first behind the second
        full = disk_full(error)
        if full is None:
            raise
        raise OSError(
            f"{path} cannot be written ({full.strerror}); what was saved before is kept. Make room and start again; "
            "a run goes on with resume=RUN_FOLDER"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Make a folder beside ``path`` that takes its place once it is complete and on the disk.

    Until then, and if that fails, whatever stood at ``path`` stays. Of two that write the same one, the later wins.

    Raises:
        OSError: the disk is full, and the like.
    """
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(path)
    partial = path.with_name(f"{path.name}.{_process()}{PART}")
    try:
        partial.mkdir()
        yield partial
        put_in_place(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def put_in_place(partial: Path, path: Path) -> None:
    """Flush the files of a complete folder and rename it to ``path``; what stood there goes once that is done."""
    old = path.with_name(f"{path.name}.{_process()}.old{PART}")
    try:
        for file in filter(Path.is_file, partial.rglob("*")):
            with file.open("rb") as written:
                os.fsync(written.fileno())
        if path.exists():  # a folder cannot be renamed over another
            os.replace(path, old)
        os.replace(partial, path)
        _sync_folder(path.parent)
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        remove(old)


def _process() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


def _clear_leftovers(path: Path) -> None:
    """Remove what killed processes of this machine have left of ``path``, or put it back where nothing stands there."""
    ours = re.compile(rf"{re.escape(path.name)}\.{re.escape(socket.gethostname())}-(\d+)(\.old)?{re.escape(PART)}")
    for left in path.parent.iterdir():
        if not (match := ours.fullmatch(left.name)) or _is_alive(int(match[1])):
            continue
        if match[2] and not path.exists():  # the kill came when the old one had just lost its name
            os.replace(left, path)
        else:
            remove(left)


def _is_alive(process: int) -> bool:
    if process == os.getpid() or os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        pass
    return True


def remove(path: Path) -> None:
    """Remove a file, or a folder with all in it; a folder loses its name first, so that no half of it is found."""
    if path.is_dir() and not path.name.endswith(PART):
        path = path.rename(path.with_name(f"{path.name}.removed{PART}"))
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def yaml_text(path: Path) -> str:
    """The text of a YAML file that is safe to load: of plain values, of which aliases make no more than 100,000.

    Raises:
        ValueError: it is no such file.
    """
    if path.stat().st_size > 10_000_000:
        raise ValueError("it is larger than 10 MB")
    try:
        text = path.read_text(encoding="utf-8")
        size = _num_nodes(yaml.compose(text, Loader=yaml.SafeLoader), {})  # what has an alias is one node here
    except yaml.YAMLError as error:
        raise ValueError(f"no YAML: {error}") from error
    except RecursionError:
        raise ValueError("its values are nested too deeply, or hold themselves") from None
    if size > 100_000:
        raise ValueError("its aliases make more than 100,000 values")
    return text


def _num_nodes(node: yaml.Node | None, known: dict[int, int]) -> int:
    """How many values a node of YAML holds once aliases are written out."""
    if node is None or not isinstance(node.value, list):
        return 1
    if id(node) not in known:
        children = [part for child in node.value for part in (child if isinstance(child, tuple) else (child,))]
        known[id(node)] = 1 + sum(_num_nodes(child, known) for child in children)
    return known[id(node)]


def checksum(path: Path) -> list[int]:
    """The size of a file, and the CRC-32 of what it holds."""
    value = size = 0
    with path.open("rb") as file:
        while block := file.read(2**24):
            value, size = zlib.crc32(block, value), size + len(block)
    return [size, value]


def disk_full(error: BaseException | None) -> OSError | None:
    """The error of a full disk, a spent quota or a limit that led to an error, or None."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            return error
        error = error.__cause__ or error.__context__
    return None


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a loss of power."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

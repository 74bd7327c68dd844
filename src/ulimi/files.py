"""Files that are there whole or not at all, whatever ends the program: an error, a signal, a power cut."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ulimi.errors import UlimiError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a path to write to, which becomes `path` when the block ends well, and vanishes when it does not.

    Of a link, what it leads to.

    Raises:
        UlimiError: there is a folder, a device or a pipe of that name.
    """
    if path.is_dir():
        raise UlimiError(f"{path}: this is a folder; give a file")
    if path.exists() and not path.is_file():
        raise UlimiError(f"{path}: this is a device or a pipe, which cannot be replaced; give a file")
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield unfinished
        _sync_file(unfinished)
        unfinished.replace(path)
    except OSError as error:
        # What fails to write names no file, and a full disk is one of several.
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            error.filename = str(path)
        raise
    finally:
        unfinished.unlink(missing_ok=True)
    _sync_folder(path.parent)


@contextmanager
def atomic_dir(out: Path) -> Iterator[Path]:
    """Give an empty folder to fill, which becomes `out` when the block ends well, and vanishes when it does not.

    Raises:
        UlimiError: there is something of that name.
    """
    if out.exists() or out.is_symlink():
        raise UlimiError(f"--out {out}: is there already; remove it or give another")
    new_parents = [parent for parent in out.parents if not parent.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        unfinished.mkdir()
        yield unfinished
        for path in unfinished.rglob("*"):
            if path.is_file():
                _sync_file(path)
        unfinished.replace(out)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        for parent in new_parents:
            with suppress(OSError):
                parent.rmdir()
        raise
    _sync_folder(out.parent)


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    with atomic_path(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _sync_file(path: Path) -> None:
    """Bring the content to the disk before the name: else, after a power cut, there may be an empty file."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Bring a new name to the disk, where the system lets a folder be opened; the file itself is there already."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

"""Atomic writes of files and folders, locks against a second writer, and checks against overwriting files."""

from __future__ import annotations

import errno
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout  # torch needs it too


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path next to ``path``, which replaces ``path`` when the block ends without an error.

    Raises:
        OSError: the file could not be written; the message names it and the free space. An existing file is kept.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except OSError as error:
        _remove(part)  # before the free space is measured, as it takes space itself
        full = _space(path) if error.errno in (None, errno.ENOSPC) else ""
        raise type(error)(f"{path} could not be written: {error.strerror or error}{full}") from error
    finally:
        _remove(part)


def save(content: Any, path: str | os.PathLike[str]) -> None:
    """Write ``content`` to ``path`` with ``torch.save``, atomically; raises as ``replacing``."""
    with replacing(path) as part:
        try:
            torch.save(content, part)
        except RuntimeError as error:
            if "inline_container" in str(error):  # PyTorch's error on a full disk
                raise OSError(f"it ends too early, as on a full disk ({str(error).strip().splitlines()[0]})") from error
            raise


def require_new(**files: str | os.PathLike[str] | None) -> None:
    """Raise ``FileExistsError`` for an output file that exists already, or that two options name.

    Args:
        **files: path of each output file by the option that names it; None where the option is not given.
    """
    seen: set[str] = set()
    for option, file in files.items():
        if file is None:
            continue
        if os.path.lexists(file) or os.path.realpath(file) in seen:
            what = "names a file that another option writes" if not os.path.lexists(file) else "exists already"
            raise FileExistsError(
                f"{option}: {os.fspath(file)} {what}, and no file is overwritten; give another name, or move it away"
            )
        seen.add(os.path.realpath(file))


@contextmanager
def making(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder next to ``folder``, which is renamed to ``folder`` when the block ends without an error.

    Raises:
        FileExistsError: ``folder`` exists already.
        OSError: the folder could not be written; the message names it, and nothing is left behind.
    """
    path = Path(folder)
    require_new(out=path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        yield part
        os.rename(part, path)
    except OSError as error:
        if error.filename is None or not Path(error.filename).is_relative_to(part):
            raise
        full = _space(path) if error.errno == errno.ENOSPC else ""
        raise type(error)(f"{path} could not be written: {error.strerror or error}{full}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def new_folder(folder: str | os.PathLike[str]) -> Path:
    """Return ``folder``, or where that exists the first free name of ``folder-2``, ``folder-3``, ..."""
    path, number = Path(folder), 1
    while os.path.lexists(path):
        number += 1
        path = Path(f"{os.fspath(folder)}-{number}")
    return path


def hold(lock_file: Path, what: Path) -> FileLock:
    """Return a file lock that this process holds until ``release()`` or until it ends.

    Args:
        lock_file: the file to lock.
        what: the file or folder that the lock protects, for messages.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    lock = FileLock(lock_file, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BlockingIOError(
            f"{what}: another process is writing there, as it holds {lock_file}; wait for it, or give another name"
        ) from None
    except OSError as error:  # not every network file system has locks
        warnings.warn(f"{what}: no lock against other processes that write there ({error})", stacklevel=3)
    return lock


@contextmanager
def alone_in(folder: str | os.PathLike[str], files: Sequence[str] = ()) -> Iterator[None]:
    """Return a context in which this process alone writes into ``folder``; the folder is created if it does not exist.

    Args:
        folder: the folder to lock.
        files: names of the files that are written there; temporary files that a killed process left are removed.

    Raises:
        BlockingIOError: another process holds the lock.
        NotADirectoryError: ``folder`` is a file.
    """
    path = Path(folder)
    if path.is_file():
        raise NotADirectoryError(f"{path}: expected a folder, got a file")
    path.mkdir(parents=True, exist_ok=True)
    lock = hold(path / ".lock", path)
    try:
        for name in files:
            for part in path.glob(f".{name}.*.part"):
                _remove(part)
        yield
    finally:
        lock.release()


def _remove(file: Path) -> None:
    with suppress(OSError):  # the file or its folder may not exist
        file.unlink()


def _space(path: Path) -> str:
    try:
        return f"; {shutil.disk_usage(path.parent).free / 1e6:,.0f} MB are free there"
    except OSError:
        return ""

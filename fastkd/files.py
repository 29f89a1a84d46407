"""Output files: complete or not there at all, one writer at a time, and nothing written over that others made."""

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
    """A path beside ``path`` to write to; it takes the place of ``path`` once the block ends without an error.

    Raises:
        OSError: the file could not be written (names it, and the space that is left); what was there is kept.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except OSError as error:
        _remove(part)  # first, as it takes space itself
        full = _space(path) if error.errno in (None, errno.ENOSPC) else ""
        raise type(error)(f"{path} could not be written: {error.strerror or error}{full}") from error
    finally:
        _remove(part)


def save(content: Any, path: str | os.PathLike[str]) -> None:
    """``torch.save`` to a file that is whole or absent. Raises as ``replacing``."""
    with replacing(path) as part:
        try:
            torch.save(content, part)
        except RuntimeError as error:
            if "inline_container" in str(error):  # what PyTorch makes of a disk that is full
                raise OSError(f"it ends too early, as on a full disk ({str(error).strip().splitlines()[0]})") from error
            raise


def require_new(**files: str | os.PathLike[str] | None) -> None:
    """Refuse output files, by the option that names them, that are there already or are named twice.

    Raises:
        FileExistsError: names the file.
    """
    seen: set[str] = set()
    for option, file in files.items():
        if file is None:
            continue
        if os.path.lexists(file) or os.path.realpath(file) in seen:
            what = "names a file that another option writes" if not os.path.lexists(file) else "is there already"
            raise FileExistsError(
                f"{option}: {os.fspath(file)} {what}, and nothing is written over; give another name, or move it away"
            )
        seen.add(os.path.realpath(file))


@contextmanager
def making(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder beside ``folder`` to write into, which gets that name once the block ends without an error.

    Raises:
        FileExistsError: ``folder`` is there already. OSError: it could not be written (names it); nothing is left.
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
    """``folder``, or with the first number behind it that makes a name which is not there: ``inspect-2``."""
    path, number = Path(folder), 1
    while os.path.lexists(path):
        number += 1
        path = Path(f"{os.fspath(folder)}-{number}")
    return path


def hold(lock_file: Path, what: Path) -> FileLock:
    """A lock that this process has until ``release()``, or its end.

    Raises:
        BlockingIOError: another process has it, and so is at work on ``what``.
    """
    lock = FileLock(lock_file, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BlockingIOError(
            f"{what}: another process is writing there, as it holds {lock_file}; wait for it, or give another name"
        ) from None
    except OSError as error:  # not every network disk has locks
        warnings.warn(f"{what}: no lock against other processes that write there ({error})", stacklevel=3)
    return lock


@contextmanager
def alone_in(folder: str | os.PathLike[str], files: Sequence[str] = ()) -> Iterator[None]:
    """Hold a folder, which is made if it is absent, against other processes that ask the same.

    Args:
        files: names of those that are written there: what a killed process left half-written of them is removed.

    Raises:
        BlockingIOError: another process holds it. NotADirectoryError: it is a file.
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
    with suppress(OSError):  # it may not be there, nor its folder
        file.unlink()


def _space(path: Path) -> str:
    try:
        return f"; {shutil.disk_usage(path.parent).free / 1e6:,.0f} MB are free there"
    except OSError:
        return ""

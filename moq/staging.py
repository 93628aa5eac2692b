"""Replaces a directory as a whole: readers see the complete old one or the complete new one.

The new content is written to a hidden sibling, flushed to the disk, and exchanged with the old
directory in one rename. Where the file system has no exchange, the old directory is renamed aside
first; `recover` undoes that if the process died before the second rename.

Names beside a target ``out/model``:

    out/.model.lock         held (flock) while a process replaces the target
    out/.model.new-XXXX     content that is being written
    out/.model.old          the old directory, between the two renames
"""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moq import _C


def _sibling(target: Path, suffix: str) -> Path:
    return target.with_name(f".{target.name}.{suffix}")


def _resolve(directory: str | os.PathLike[str]) -> Path:
    """The directory itself where a symbolic link names it: links are kept, not replaced."""
    target = Path(os.path.realpath(directory))
    if target.name == "":
        raise ValueError(f"{directory}: a checkpoint needs a directory of its own")
    return target


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(directory: Path) -> None:
    """Flushes every file below a directory, then the directories that name them."""
    for parent, _, files in os.walk(directory, topdown=False):
        for name in files:
            descriptor = os.open(os.path.join(parent, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        _sync_directory(Path(parent))


@contextmanager
def _lock(target: Path) -> Iterator[None]:
    """Holds the target's lock; waits while another process does.

    The file is removed by whoever holds the lock, so a lock counts only if the name still leads to
    the file that was locked. The kernel releases it when the process dies.
    """
    path = _sibling(target, "lock")
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.path.exists(path) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        except FileNotFoundError:
            pass  # removed between the two calls: lock its successor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    try:
        yield
    finally:
        os.unlink(path)
        os.close(descriptor)


def _put_back(target: Path) -> None:
    """Ends a replacement that died between its two renames. The caller holds the lock."""
    aside = _sibling(target, "old")
    if not target.exists() and aside.exists():
        os.rename(aside, target)
        _sync_directory(target.parent)


def recover(directory: str | os.PathLike[str]) -> None:
    """Brings back a checkpoint whose replacement was killed halfway; otherwise does nothing.

    Call it before opening a checkpoint. Only file systems without an atomic exchange ever need it.

    Args:
        directory: the checkpoint directory.
    """
    target = _resolve(directory)
    if not target.exists() and _sibling(target, "old").exists():
        with _lock(target):
            _put_back(target)


def _remove_leftovers(target: Path) -> None:
    """Deletes what killed processes left. The caller holds the lock, so nobody is using it."""
    for leftover in target.parent.glob(glob.escape(_sibling(target, "new-").name) + "*"):
        shutil.rmtree(leftover)
    if target.exists() and _sibling(target, "old").exists():
        shutil.rmtree(_sibling(target, "old"))


def _swap(staged: Path, target: Path) -> None:
    """Puts `staged` in the place of `target`, and removes what was there."""
    if not target.exists():
        os.rename(staged, target)
        _sync_directory(target.parent)
        return
    if _C.exchange_paths(str(staged), str(target)):
        _sync_directory(target.parent)
        shutil.rmtree(staged)
        return
    aside = _sibling(target, "old")
    os.rename(target, aside)
    os.rename(staged, target)
    _sync_directory(target.parent)
    shutil.rmtree(aside)


def files_below(directory: Path) -> list[str]:
    """Relative path of every file of a directory, sorted.

    Links and empty directories count as files, so that nothing in the directory goes unseen.
    """
    return sorted(
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if path.is_symlink() or not path.is_dir() or not any(path.iterdir())
    )


def _require_only(target: Path, own_files: Callable[[Path], Iterable[str]]) -> None:
    """Refuses to replace, and so to delete, what nobody who writes here has written.

    Raises:
        ValueError: naming the first such file.
    """
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target}: expected a directory, got a file")
    present = files_below(target)
    foreign = sorted(set(present) - set(own_files(target))) if present else []
    if foreign:
        raise ValueError(
            f"{target}: expected a directory that may be replaced (a new or an empty one, or one "
            f"that holds only what was written there before), got {foreign[0]} in it: move it "
            "away, or write to another place"
        )


def require_replaceable(
    directory: str | os.PathLike[str], own_files: Callable[[Path], Iterable[str]]
) -> None:
    """Raises now what `replaced_directory` would raise before its block.

    What is written there at the end of hours should not fail for a reason of the beginning.

    Args:
        directory: as for `replaced_directory`; its parent is created if missing.
        own_files: likewise.

    Raises:
        OSError: if the file system refuses.
        ValueError: if `directory` holds any other file.
    """
    target = _resolve(directory)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target):
        _put_back(target)
        _require_only(target, own_files)
        os.rmdir(tempfile.mkdtemp(prefix=_sibling(target, "new-").name, dir=target.parent))


@contextmanager
def replaced_directory(
    directory: str | os.PathLike[str], own_files: Callable[[Path], Iterable[str]]
) -> Iterator[Path]:
    """Yields an empty directory that takes the place of `directory` when the block ends.

    If the block raises, or the process is killed at any moment, `directory` keeps its complete old
    content. Processes that replace the same directory take turns.

    Args:
        directory: the directory to create or to replace; its parent is created if missing.
        own_files: lists those files of an old `directory`, as `files_below` does, that may be
            deleted with it.

    Yields:
        The path to write the new content to.

    Raises:
        OSError: if the file system refuses.
        ValueError: if `directory` holds any other file when the block begins; or when it ends:
            then the new content stays beside it, under a name that the message tells.
    """
    target = _resolve(directory)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target):
        _put_back(target)
        _remove_leftovers(target)
        _require_only(target, own_files)
        staged = Path(tempfile.mkdtemp(prefix=_sibling(target, "new-").name, dir=target.parent))
        try:
            os.chmod(staged, 0o777 & ~_umask())
            yield staged
            _sync_tree(staged)
            try:
                _require_only(target, own_files)  # the block may have taken minutes
            except ValueError as error:
                kept = staged.rename(target.with_name(f"{target.name}-{staged.name[-8:]}"))
                raise ValueError(f"{error}. What was written is complete: {kept}") from error
            _swap(staged, target)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise


@contextmanager
def replaced_file(directory: str | os.PathLike[str], name: str) -> Iterator[Path]:
    """Yields a path whose file takes the place of one in `directory` when the block ends.

    If the block raises, or the process is killed at any moment, the old file stays as it is.
    Processes that replace the directory or a file of it take turns.

    Args:
        directory: an existing one.
        name: of the file in it.

    Raises:
        OSError: if the file system refuses.
    """
    target = _resolve(directory)
    with _lock(target):
        _remove_leftovers(target)
        beside = Path(tempfile.mkdtemp(prefix=_sibling(target, "new-").name, dir=target.parent))
        try:
            yield beside / name
            _sync_tree(beside)
            os.replace(beside / name, target / name)
            _sync_directory(target)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def _umask() -> int:
    """The permission bits that this process withholds (mkdtemp withholds more)."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask

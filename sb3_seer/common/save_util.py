"""A file is replaced once the new one is complete: whatever happens, there is a whole file, the old one or the new one."""

import contextlib
import io
import os
import pathlib
import re
import shutil
import threading
from collections.abc import Iterator

import psutil
from stable_baselines3.common.save_util import open_path

from sb3_seer.common.utils import warn

PathOrFile = str | pathlib.Path | io.BufferedIOBase


@contextlib.contextmanager
def open_atomic(path: PathOrFile, suffix: str | None = None, verbose: int = 0) -> Iterator[io.BufferedIOBase]:
    """
    Open a file to write to, which replaces the one at ``path`` once it is complete, and only then.

    Until then it is ``<name>.<process id>-<thread id>.tmp`` beside it: an exception removes it, the next save removes the
    file that a killed process left. Paths and warnings are the same as with SB3's ``open_path``.

    :param path: where to save; a file object is written to directly
    :param suffix: appended, after a dot, to a path without one
    :param verbose: 2: warn if a file is overwritten
    :return: a context manager that gives the file
    """
    if not isinstance(path, (str, pathlib.Path)):
        yield open_path(path, "w")
        return
    target = _resolve(pathlib.Path(path), suffix, verbose)
    _remove_stale(target)
    temporary = target.with_name(f"{target.name}.{os.getpid()}-{threading.get_native_id()}.tmp")
    try:
        with open_path(temporary, "w") as file:
            if target.exists():
                shutil.copymode(target, temporary)
            yield file
            file.flush()
            # Otherwise a power cut could leave the new name with bytes that never reached the disk
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _resolve(path: pathlib.Path, suffix: str | None, verbose: int) -> pathlib.Path:
    """The file that SB3's ``open_path`` would open, without opening it: that would empty it."""
    if path.suffix == "" and suffix:
        path = pathlib.Path(f"{path}.{suffix}")
    while path.is_dir():
        warn(f"Path '{path}' is a folder. Will save instead to {path}_2")
        path = pathlib.Path(f"{path}_2")
    if path.exists():
        if verbose >= 2:
            warn(f"Path '{path}' exists, will overwrite it.")
        # A protected file can be replaced, but not opened: refuse it as a plain open() does
        path.open("r+b").close()
    # A link stays, what it points to is replaced
    return path.resolve() if path.is_symlink() else path


def _remove_stale(target: pathlib.Path) -> None:
    """Remove the temporary files of ``target`` whose processes were killed."""
    pattern = re.compile(re.escape(target.name) + r"\.(\d{1,9})(-\d+)?\.tmp")
    files = target.parent.iterdir() if target.parent.is_dir() else ()
    for file in files:
        match = pattern.fullmatch(file.name)
        if match and not psutil.pid_exists(int(match[1])):
            # A file of another user must not stop the save
            with contextlib.suppress(OSError):
                file.unlink()

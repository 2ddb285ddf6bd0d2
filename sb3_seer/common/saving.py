"""Files that are whole or not there at all: an old one is only replaced by a complete new one."""

import contextlib
import io
import os
import pathlib
import re
import shutil
import warnings
from collections.abc import Iterator

import psutil
from stable_baselines3.common.save_util import open_path


@contextlib.contextmanager
def replacing(
    path: str | pathlib.Path | io.BufferedIOBase, suffix: str | None = None, verbose: int = 0
) -> Iterator[io.BufferedIOBase]:
    """
    Open a file to write to, which takes the place of the one at ``path`` once it is complete, and only then.

    Until then it is ``<name>.<process id>.tmp`` beside it: an exception removes it, the next save removes
    what a killed process left. Where a path leads, and the warnings on the way, are those of SB3's ``open_path``.

    :param path: where to save; a file object is written to as it is
    :param suffix: appended, after a dot, to a path that has none
    :param verbose: 2: warn if a file is overwritten
    :return: a context manager that gives the file
    """
    if not isinstance(path, (str, pathlib.Path)):
        yield open_path(path, "w")
        return
    target = _resolve(pathlib.Path(path), suffix, verbose)
    _remove_stale(target)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        with open_path(temporary, "w") as file:
            if target.exists():
                shutil.copymode(target, temporary)
            yield file
            file.flush()
            # Or a power cut could leave the new name to a file whose bytes never reached the disk
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _resolve(path: pathlib.Path, suffix: str | None, verbose: int) -> pathlib.Path:
    """The file that SB3's ``open_path`` would open, without opening it: that would empty it."""
    if path.suffix == "" and suffix:
        path = pathlib.Path(f"{path}.{suffix}")
    while path.is_dir():
        warnings.warn(f"Path '{path}' is a folder. Will save instead to {path}_2", stacklevel=4)
        path = pathlib.Path(f"{path}_2")
    if path.exists():
        if verbose >= 2:
            warnings.warn(f"Path '{path}' exists, will overwrite it.", stacklevel=4)
        # A protected file can be replaced, but not opened: refuse it as a plain open() does
        path.open("r+b").close()
    # A link stays, what it points to is replaced
    return path.resolve() if path.is_symlink() else path


def _remove_stale(target: pathlib.Path) -> None:
    """Remove the temporary files of ``target`` whose processes were killed."""
    pattern = re.compile(re.escape(target.name) + r"\.(\d{1,9})\.tmp")
    files = target.parent.iterdir() if target.parent.is_dir() else ()
    for file in files:
        match = pattern.fullmatch(file.name)
        if match and not psutil.pid_exists(int(match[1])):
            # Litter that belongs to somebody else is no reason not to save
            with contextlib.suppress(OSError):
                file.unlink()

"""Files are replaced once they are whole, and not before."""

import io
import os
import stat
import subprocess
import sys
import threading
import warnings

import pytest
from stable_baselines3.common.save_util import open_path

from sb3_seer.common.save_util import open_atomic


@pytest.mark.parametrize("suffix", ["pkl", "zip", None])
@pytest.mark.parametrize(
    "path", ["name", "name.zip", "name.v1", ".hidden", "new/folders/name", "folder", "taken", "link", "link.pkl", "./old"]
)
def test_files_end_up_where_sb3_puts_them(tmp_path, monkeypatch, path, suffix):
    """Same tree, permissions and warnings as with SB3's open_path."""

    def tree(name, save):
        monkeypatch.chdir(tmp_path)
        os.makedirs(name)
        os.chdir(name)
        for folder in ("folder", "folder.pkl", "taken", "taken_2", "taken.zip"):
            os.mkdir(folder)
        for file in ("old", "old.zip", "folder.pkl_2", "elsewhere"):
            with open(file, "wb") as old:
                old.write(b"old")
            os.chmod(file, 0o604)
        os.symlink("../elsewhere", "folder/link")
        os.symlink("elsewhere", "link")
        os.symlink("folder/link", "link.pkl")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            save()
        found = {
            str(file.relative_to(tmp_path / name)): (stat.filemode(file.lstat().st_mode), file.is_file() and file.read_bytes())
            for file in (tmp_path / name).rglob("*")
        }
        return found, [str(warning.message) for warning in caught]

    def save_sb3():
        with open_path(path, "w", verbose=2, suffix=suffix) as file:
            file.write(b"new")

    def save_seer():
        with open_atomic(path, suffix, verbose=2) as file:
            file.write(b"new")

    old_mask = os.umask(0o027)
    try:
        expected = tree("sb3", save_sb3)
        found = tree("seer", save_seer)
    finally:
        os.umask(old_mask)
    assert any(content == b"new" for _, content in expected[0].values())
    assert found == expected


def test_overwriting_is_silent_unless_verbose(tmp_path, recwarn):
    for _ in range(2):
        with open_atomic(tmp_path / "buffer", "pkl") as file:
            file.write(b"new")
    assert not recwarn.list


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("is_new", [True, False])
def test_an_exception_leaves_everything_as_it_was(tmp_path, error, is_new):
    path = tmp_path / "buffer.pkl"
    if not is_new:
        path.write_bytes(b"old")
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(type(error)), open_atomic(path, "pkl") as file:
        file.write(b"n" * 100_000)
        file.flush()
        (temporary,) = (file.name for file in tmp_path.iterdir() if file != path)
        assert temporary.startswith(f"buffer.pkl.{os.getpid()}-") and temporary.endswith(".tmp")
        raise error
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_two_threads_that_save_to_one_path(tmp_path):
    path = tmp_path / "buffer.pkl"
    has_begun, may_end = threading.Event(), threading.Event()

    def save_slowly():
        with open_atomic(path) as file:
            file.write(b"a" * 100)
            file.flush()
            has_begun.set()
            may_end.wait()
            file.write(b"a" * 100)

    thread = threading.Thread(target=save_slowly)
    thread.start()
    has_begun.wait()
    with open_atomic(path) as file:
        file.write(b"b" * 10)
    assert path.read_bytes() == b"b" * 10
    may_end.set()
    thread.join()
    assert path.read_bytes() == b"a" * 200 and list(tmp_path.iterdir()) == [path]


def test_the_new_file_is_on_the_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(("fsync", os.fstat(fd).st_size)), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("replace"), replace(*paths)))
    with open_atomic(tmp_path / "buffer.pkl") as file:
        file.write(b"new")
    assert events == [("fsync", 3), "replace"]


def test_a_protected_file_is_refused_as_open_does(tmp_path):
    """Root may write to it, anyone else may not; to replace it, the folder's permissions would do for both."""
    path = tmp_path / "buffer.pkl"
    path.write_bytes(b"old")
    path.chmod(0o444)
    raised = []
    for save in (lambda: open(path, "ab"), lambda: open_atomic(path)):
        try:
            with save():
                raised.append(None)
        except PermissionError as error:
            raised.append(type(error))
    assert raised[0] == raised[1]


def test_only_the_temporary_files_of_dead_processes_are_removed(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as alive:
        dead = subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        stale = [tmp_path / f"buffer.pkl.{dead.pid}.tmp", tmp_path / f"buffer.pkl.{dead.pid}-123.tmp"]
        others = [
            tmp_path / name
            for name in (
                f"buffer.pkl.{alive.pid}-{alive.pid}.tmp",
                f"other.pkl.{dead.pid}.tmp",
                f"bufferxpkl.{dead.pid}.tmp",
                f"buffer.pkl.{dead.pid}.tmp.pkl",
                "buffer.pkl.mine.tmp",
                "buffer.pkl.123456789012345678901234567890.tmp",
            )
        ]
        for file in (*stale, *others):
            file.write_bytes(b"half")
        with open_atomic(tmp_path / "buffer", "pkl") as file:
            file.write(b"new")
        assert set(tmp_path.iterdir()) == {tmp_path / "buffer.pkl", *others}
        alive.communicate(b"\n")


def test_file_objects_are_written_to_directly(tmp_path):
    memory = io.BytesIO()
    with open_atomic(memory, "pkl") as file:
        assert file is memory
        file.write(b"new")
    assert not memory.closed and memory.getvalue() == b"new"
    with open(tmp_path / "name", "wb") as opened:
        with open_atomic(opened, "pkl") as file:
            assert file is opened
        assert not opened.closed
    assert [path.name for path in tmp_path.iterdir()] == ["name"]
    with open(tmp_path / "name", "rb") as opened, pytest.raises(ValueError, match="writable"), open_atomic(opened):
        pass
    with pytest.raises(TypeError, match="invalid type"), open_atomic(3):  # type: ignore[arg-type]
        pass

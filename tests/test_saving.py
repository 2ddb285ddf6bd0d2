"""Nothing on disk is lost or half-written, and what is read is what was written or a ValueError that says why not."""

import io
import json
import multiprocessing
import os
import random
import stat
import subprocess
import sys
import time
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest
from stable_baselines3 import DQN
from stable_baselines3.common.save_util import open_path

import sb3_seer
from sb3_seer.common import archive as archive_module
from sb3_seer.common.archive import Archive, is_archive, write_archive
from sb3_seer.common.saving import replacing

RING = np.arange(5 * 7, dtype=np.uint8).reshape(5, 7)
ARRAYS = dict(
    ring=[RING[3:], RING[:3]],  # the halves of a ring, oldest first
    flags=np.array([True, False, True]),
    rewards=np.array([[0.5, -np.inf], [np.nan, 2.0]], dtype=np.float32),
    position=np.array(3),
    nothing=np.empty((0, 4), dtype=np.float16),
)
# What must be read: numpy's own concatenation
EXPECTED = {name: np.concatenate(array) if isinstance(array, list) else array for name, array in ARRAYS.items()}
META = dict(n_envs=2, stage="images", nested=dict(successors=[[1, 0], [4, 1]], nothing=None))


def archive_bytes(arrays=ARRAYS, meta=META) -> bytes:
    file = io.BytesIO()
    write_archive(file, meta, arrays)
    return file.getvalue()


def edited(data: bytes, **changes) -> bytes:
    """An archive, sound in itself, whose meta.json says something else."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, json.dumps(json.loads(content) | changes) if name == "meta.json" else content)
    return file.getvalue()


def read_all(file):
    """Everything in the archive, as something that compares bit for bit: NaN, dtypes and shapes included."""
    with Archive(file) as archive:
        arrays = {name: archive.read(name) for name in EXPECTED}
        return archive.meta, {name: (array.dtype, array.shape, array.tobytes()) for name, array in arrays.items()}


WRITTEN = META, {name: (array.dtype, array.shape, array.tobytes()) for name, array in EXPECTED.items()}


# ---- archives ----


@pytest.mark.parametrize("chunk_bytes", [1, 3, 7, 2**20])
def test_what_is_read_is_what_was_written(monkeypatch, chunk_bytes):
    monkeypatch.setattr(archive_module, "CHUNK_BYTES", chunk_bytes)
    assert read_all(io.BytesIO(archive_bytes())) == WRITTEN


@pytest.mark.parametrize("chunk_bytes", [3, 2**20])
def test_halves_of_a_ring_are_read_into_other_halves(monkeypatch, chunk_bytes):
    monkeypatch.setattr(archive_module, "CHUNK_BYTES", chunk_bytes)
    memory = np.zeros_like(RING)
    with Archive(io.BytesIO(archive_bytes())) as archive:
        assert archive.shape("ring") == (5, 7) and archive.dtype("ring") == np.uint8
        archive.read_into("ring", [memory[4:], memory[:4]])
    assert np.array_equal(np.concatenate((memory[4:], memory[:4])), np.concatenate((RING[3:], RING[:3])))


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "int64", ">i4", "float16", "float32", "float64", "complex64"])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (4, 2)])
def test_dtypes_and_shapes(dtype, shape):
    array = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    with Archive(io.BytesIO(archive_bytes(dict(array=array)))) as archive:
        read = archive.read("array")
    assert read.dtype == array.dtype and read.shape == array.shape and read.tobytes() == array.tobytes()


def test_numpy_reads_it_without_pickle(tmp_path):
    path = tmp_path / "replay_buffer.pkl"
    path.write_bytes(archive_bytes())
    with np.load(path, allow_pickle=False) as arrays:
        assert set(arrays.files) == {"meta.json", *EXPECTED}
        for name, expected in EXPECTED.items():
            np.testing.assert_array_equal(arrays[name], expected, strict=True)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        contents = json.loads(archive.read("meta.json"))
    assert contents["format"] == "sb3_seer replay buffer" and contents["version"] == 1
    assert contents["sb3_seer"] == sb3_seer.__version__ and contents["meta"] == META


def test_memory_stays_within_a_few_chunks(tmp_path):
    size = 64 * 2**20
    array, memory = np.ones(size // 8), np.zeros(size // 8)

    def peak(function) -> int:
        tracemalloc.start()
        function()
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    def write():
        with replacing(tmp_path / "large.pkl") as file:
            write_archive(file, {}, dict(array=[array[100:], array[:100]]))

    def read_into():
        with Archive(tmp_path / "large.pkl") as archive:
            archive.read_into("array", [memory[:10], memory[10:]])

    def read():
        with Archive(tmp_path / "large.pkl") as archive:
            archive.read("array")

    assert peak(write) < 4 * 2**20
    assert peak(read_into) < 4 * 2**20
    assert size < peak(read) < size + 4 * 2**20
    assert np.array_equal(memory, array)


@pytest.mark.parametrize(
    "array, message",
    [
        (np.array([None]), "'a'.*object"),
        (np.array(["text"]), "'a'.*<U4"),
        (np.zeros(2, dtype=[("x", "O")]), r"'a'.*\('x', 'O'\)"),
        (np.zeros((3, 2)).T, "'a'.*strides.*C-contiguous"),
        ([], "'a'.*no parts"),
        ([np.zeros((2, 3)), np.zeros((2, 4))], r"'a'.*\(2, 3\).*\(2, 4\)"),
        ([np.zeros(2), np.zeros(2, dtype=np.float32)], "'a'.*float64.*float32"),
        ([np.array(1), np.array(2)], "'a'.*shape"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_written(array, message):
    file = io.BytesIO()
    with pytest.raises(ValueError, match=message):
        write_archive(file, {}, dict(fine=np.zeros(3), a=array))
    assert file.getvalue() == b""


@pytest.mark.parametrize(
    "name, parts, message",
    [
        ("rewards", np.zeros((2, 3), dtype=np.float32), r"'rewards' is float32 of shape \(2, 2\), but float32 of .*\(2, 3\)"),
        ("rewards", np.zeros((2, 2)), r"'rewards' is float32 of shape \(2, 2\), but float64 of shape \(2, 2\)"),
        ("rewards", np.zeros(4, dtype=np.float32), r"\(2, 2\), but .*\(4,\)"),
        ("ring", [RING[:3].copy(), RING[:3].copy()], r"\(5, 7\), but .*\(6, 7\)"),
        ("missing", np.zeros(1), "no array 'missing', but 'ring', 'flags'"),
    ],
)
def test_arrays_other_than_those_saved(tmp_path, name, parts, message):
    path = tmp_path / "buffer.pkl"
    path.write_bytes(archive_bytes())
    with Archive(path) as archive:
        with pytest.raises(ValueError, match=message) as error:
            archive.read_into(name, parts)
        assert str(path) in str(error.value)
    with Archive(path) as archive, pytest.raises(ValueError, match="'missing'"):
        archive.read("missing")


def test_read_only_and_strided_arrays_are_not_read_into():
    with Archive(io.BytesIO(archive_bytes())) as archive:
        with pytest.raises(ValueError, match="strides"):
            archive.read_into("rewards", np.zeros((2, 2), dtype=np.float32).T)
        read_only = np.zeros((2, 2), dtype=np.float32)
        read_only.flags.writeable = False
        with pytest.raises(ValueError, match="cannot be read into an array that is read-only"):
            archive.read_into("rewards", read_only)


# ---- files that are not what was written ----


def outcome(file) -> str:
    """:return: "same" or the message; anything but a ValueError, or other contents, fails the test"""
    try:
        contents = read_all(file)
    except ValueError as error:
        return str(error)
    assert contents == WRITTEN
    return "same"


def test_every_flip_of_a_small_archive_is_refused_or_harmless():
    data = archive_bytes()
    outcomes = []
    for i in range(len(data)):
        for mask in (0xFF, *(1 << bit for bit in range(8))):
            flipped = bytearray(data)
            flipped[i] ^= mask
            outcomes.append(outcome(io.BytesIO(flipped)))
    # Unused fields of the zip: dates, attributes, sizes in front of the members
    assert 0 < outcomes.count("same") < len(outcomes) / 2


def test_every_byte_flipped_in_a_file(tmp_path):
    """A file fails in other ways than BytesIO: seeking to where a damaged table says is an OSError."""
    path = tmp_path / "buffer.pkl"
    data = archive_bytes()
    path.write_bytes(data)
    with open(path, "r+b") as file:
        for i in range(len(data)):
            os.pwrite(file.fileno(), bytes([data[i] ^ 0xFF]), i)
            message = outcome(path)
            assert message == "same" or str(path) in message
            os.pwrite(file.fileno(), data[i : i + 1], i)
    assert outcome(path) == "same"


def test_flips_of_a_larger_archive(monkeypatch):
    """Several chunks an array, the last one not full."""
    monkeypatch.setattr(archive_module, "CHUNK_BYTES", 2**12)
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, 50_001, dtype=np.uint8)
    data = archive_bytes(dict(array=array))
    start = data.index(array.tobytes())
    for i in (start, start + 2**12, start + len(array) - 1, *rng.integers(start, start + len(array), 300)):
        flipped = bytearray(data)
        flipped[i] ^= 1 << rng.integers(8)
        with Archive(io.BytesIO(flipped)) as archive, pytest.raises(ValueError, match=r"corrupted, in array\.npy.*CRC"):
            archive.read("array")


def test_every_truncation_is_refused():
    data = archive_bytes()
    for length in range(len(data)):
        file = io.BytesIO(data[:length])
        assert is_archive(file)
        with pytest.raises(ValueError, match="is truncated"):
            Archive(file)


def test_a_truncated_file_is_named(tmp_path):
    path = tmp_path / "buffer.pkl"
    path.write_bytes(archive_bytes()[:-30])
    with pytest.raises(ValueError) as error:
        Archive(str(path))
    assert str(path) in str(error.value)


def test_a_later_version_is_refused():
    with pytest.raises(ValueError) as error:
        Archive(io.BytesIO(edited(archive_bytes(), version=2, sb3_seer="7.0.0", arrays="nobody knows")))
    for part in ("format version 2 (of sb3_seer 7.0.0)", f"{sb3_seer.__version__} reads up to version 1", "update sb3_seer"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(format="something else"), "another kind of file"),
        (dict(version="one"), r"corrupted, in meta\.json"),
        (dict(arrays=[]), r"corrupted, in meta\.json"),
        (dict(arrays=dict(x=dict(dtype="|u1", shape=[1]))), r"corrupted, in x\.npy"),
        (dict(arrays=dict(flags=dict(dtype="|O", shape=[1]))), r"corrupted, in meta\.json.*object"),
        (dict(arrays=dict(flags=dict(dtype="not one", shape=[1]))), r"corrupted, in meta\.json"),
        (dict(arrays=dict(flags=dict(dtype="|b1", shape=[-3, -1]))), r"corrupted, in meta\.json"),
        (dict(arrays=dict(flags=dict(dtype="|b1", shape=[2**50]))), r"corrupted, in flags\.npy.*size"),
        (dict(arrays=dict(flags=dict(dtype="|b1", shape=[2**12]))), r"corrupted, in flags\.npy.*size"),
    ],
)
def test_a_meta_that_lies(changes, message):
    """Whoever wrote it got the CRC-32 right: no memory is taken by its word."""
    with pytest.raises(ValueError, match=message):
        Archive(io.BytesIO(edited(archive_bytes(), **changes)))


def test_a_meta_that_tells_a_part_only():
    """What it does not tell of would be skipped as if it were numpy's header."""
    data = archive_bytes(dict(a=np.zeros(2**17, dtype=np.uint8)))
    with pytest.raises(ValueError, match=r"corrupted, in a\.npy.*size"):
        Archive(io.BytesIO(edited(data, arrays=dict(a=dict(dtype="|u1", shape=[9])))))


def test_a_compressed_copy_is_refused():
    """It could hold a thousand times its size."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive_bytes())) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ValueError, match=r"corrupted.*compressed"):
        Archive(file)


def test_other_kinds_of_files(tmp_path):
    DQN("MlpPolicy", "CartPole-v1", buffer_size=1).save(tmp_path / "model")
    assert is_archive(tmp_path / "model.zip")
    with pytest.raises(ValueError, match=r"model\.zip is another kind of file.*meta\.json, but data"):
        Archive(tmp_path / "model.zip")
    (tmp_path / "buffer.pkl").write_bytes(b"\x80\x04 a pickle")
    assert not is_archive(tmp_path / "buffer")
    with pytest.raises(ValueError, match=r"buffer\.pkl is another kind of file.*no zip"):
        Archive(tmp_path / "buffer")
    with pytest.raises(FileNotFoundError):
        Archive(tmp_path / "nothing")


def test_files_are_found_and_closed_as_sb3_does(tmp_path):
    (tmp_path / "replay_buffer.pkl").write_bytes(archive_bytes())
    assert is_archive(tmp_path / "replay_buffer")
    assert read_all(tmp_path / "replay_buffer") == WRITTEN
    with pytest.warns(UserWarning, match=r"Attempting .*replay_buffer\.pkl"):
        archive = Archive(str(tmp_path / "replay_buffer"), verbose=2)
    archive.close()
    with pytest.raises(ValueError, match="closed"):
        archive.read("ring")
    with open(tmp_path / "replay_buffer.pkl", "rb") as file:
        assert is_archive(file) and file.tell() == 0
        assert read_all(file) == WRITTEN
        assert not file.closed


# ---- replacing files ----


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
        with replacing(path, suffix, verbose=2) as file:
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
        with replacing(tmp_path / "buffer", "pkl") as file:
            file.write(b"new")
    assert not recwarn.list


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("is_new", [True, False])
def test_an_exception_leaves_everything_as_it_was(tmp_path, error, is_new):
    path = tmp_path / "buffer.pkl"
    if not is_new:
        path.write_bytes(b"old")
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(type(error)), replacing(path, "pkl") as file:
        file.write(b"n" * 100_000)
        file.flush()
        assert [file for file in tmp_path.iterdir() if file != path] == [tmp_path / f"buffer.pkl.{os.getpid()}.tmp"]
        raise error
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_the_new_file_is_on_the_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(("fsync", os.fstat(fd).st_size)), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("replace"), replace(*paths)))
    with replacing(tmp_path / "buffer.pkl") as file:
        file.write(b"new")
    assert events == [("fsync", 3), "replace"]


def test_a_protected_file_is_refused_as_open_does(tmp_path):
    """Root may write to it, anyone else may not; to replace it, the folder's permissions would do for both."""
    path = tmp_path / "buffer.pkl"
    path.write_bytes(b"old")
    path.chmod(0o444)
    raised = []
    for save in (lambda: open(path, "ab"), lambda: replacing(path)):
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
        stale = tmp_path / f"buffer.pkl.{dead.pid}.tmp"
        others = [
            tmp_path / name
            for name in (
                f"buffer.pkl.{alive.pid}.tmp",
                f"other.pkl.{dead.pid}.tmp",
                f"bufferxpkl.{dead.pid}.tmp",
                f"buffer.pkl.{dead.pid}.tmp.pkl",
                "buffer.pkl.mine.tmp",
                "buffer.pkl.123456789012345678901234567890.tmp",
            )
        ]
        for file in (stale, *others):
            file.write_bytes(b"half")
        with replacing(tmp_path / "buffer", "pkl") as file:
            file.write(b"new")
        assert set(tmp_path.iterdir()) == {tmp_path / "buffer.pkl", *others}
        alive.communicate(b"\n")


def test_file_objects_are_written_to_as_they_are(tmp_path):
    memory = io.BytesIO()
    with replacing(memory, "pkl") as file:
        assert file is memory
        write_archive(file, META, ARRAYS)
    assert not memory.closed and read_all(memory) == WRITTEN
    with open(tmp_path / "name", "wb") as opened:
        with replacing(opened, "pkl") as file:
            assert file is opened
            write_archive(file, META, ARRAYS)
        assert not opened.closed
    assert [path.name for path in tmp_path.iterdir()] == ["name"]
    assert read_all(tmp_path / "name") == WRITTEN
    with open(tmp_path / "name", "rb") as opened, pytest.raises(ValueError, match="writable"), replacing(opened):
        pass
    with pytest.raises(TypeError, match="invalid type"), replacing(3):  # type: ignore[arg-type]
        pass


# ---- processes that are killed ----

CONTENTS = [np.random.default_rng(i).integers(0, 2**63, 500_000) for i in range(2)]  # 4 MB each


def save_contents(path, i: int) -> None:
    with replacing(path, "pkl") as file:
        write_archive(file, dict(i=i), dict(contents=[CONTENTS[i][1000:], CONTENTS[i][:1000]]))


def save_for_ever(path, i: int, started) -> None:
    started.send(True)
    while True:
        save_contents(path, i)
        i = 1 - i


def test_whenever_a_process_is_killed_the_file_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "replay_buffer.pkl"
    # Writing takes most of the time of a save, so that most kills come when half is written
    monkeypatch.setattr(archive_module, "CHUNK_BYTES", 2**9)
    start = time.perf_counter()
    for i in (1, 0):
        save_contents(path, i)
    save_seconds = (time.perf_counter() - start) / 2
    rng = random.Random(0)
    # Forked, so that nothing has to be imported again
    fork = multiprocessing.get_context("fork")
    n_kills, n_inside, seen = 40, 0, []
    for _ in range(n_kills):
        before = set(tmp_path.iterdir())
        has_started, started = fork.Pipe(duplex=False)
        saver = fork.Process(target=save_for_ever, args=(path, rng.randrange(2), started))
        saver.start()
        has_started.recv()
        time.sleep(rng.uniform(0, 4 * save_seconds))
        saver.kill()
        saver.join()
        n_inside += bool(set(tmp_path.iterdir()) - before)
        with Archive(path) as archive:
            i = archive.meta["i"]
            expected = np.concatenate((CONTENTS[i][1000:], CONTENTS[i][:1000]))
            assert np.array_equal(archive.read("contents"), expected)
        seen.append(i)
    assert n_inside >= n_kills / 3
    assert set(seen) == {0, 1}  # not every kill came before the first save was complete
    save_contents(path, 0)
    assert list(tmp_path.iterdir()) == [path]

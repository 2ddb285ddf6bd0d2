"""
Arrays and what they mean in a file: an uncompressed zip of ``meta.json`` and one ``.npy`` file an array, so that
``np.load`` opens it as well. Nothing in it is pickled, and its CRC-32 show every change of a single byte: what is read
is what was written, or a ``ValueError`` that says why not.
"""

import contextlib
import io
import json
import math
import pathlib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from stable_baselines3.common.save_util import open_path

import sb3_seer

FORMAT = "sb3_seer replay buffer"
FORMAT_VERSION = 1
# Read or written at a time
CHUNK_BYTES = 2**20

META = "meta.json"
# Kinds of numpy dtypes that are numbers: none that holds Python objects
NUMBERS = "biufc"
# The longest header of a .npy file of version 1.0: magic string, version, 16 bits of length, so many characters
MAX_NPY_HEADER = 10 + 2**16
# How a zip begins
ZIP_MAGIC = b"PK\x03\x04"
# What zipfile, json and numpy raise over bytes that are not what was written
MISREAD = (zipfile.BadZipFile, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError)


class ArrayType(NamedTuple):
    """
    What an array is, but for its numbers.

    :param dtype: of its numbers
    :param shape: of the array
    """

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """bytes of the array"""
        return self.dtype.itemsize * math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype} of shape {self.shape}"


def write_archive(
    file: io.BufferedIOBase, meta: dict[str, Any], arrays: Mapping[str, np.ndarray | Sequence[np.ndarray]]
) -> None:
    """
    Write arrays, and what they mean, a chunk at a time: no array is ever copied whole.

    :param file: where to write
    :param meta: anything that JSON can hold (it makes tuples lists, and keys strings)
    :param arrays: name -> C-contiguous array of numbers, or several that are saved as their concatenation along axis 0
    :raises ValueError: if an array is not of numbers or not C-contiguous, or if several do not fit together
    """
    parts_of = {name: _as_parts(parts) for name, parts in arrays.items()}
    types = {name: _type_of(name, parts) for name, parts in parts_of.items()}
    contents = dict(
        format=FORMAT,
        version=FORMAT_VERSION,
        sb3_seer=sb3_seer.__version__,
        arrays={name: dict(dtype=dtype.str, shape=shape) for name, (dtype, shape) in types.items()},
        meta=meta,
    )
    text = json.dumps(contents).encode()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(META, "w") as member:
            member.write(text)
        for name, (dtype, shape) in types.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                header = dict(descr=np.lib.format.dtype_to_descr(dtype), fortran_order=False, shape=shape)
                np.lib.format.write_array_header_1_0(member, header)
                for chunk in _chunks(parts_of[name]):
                    member.write(chunk)


def is_archive(path: str | pathlib.Path | io.BufferedIOBase) -> bool:
    """
    Whether a file is for :class:`Archive` to open, be it to say what is wrong with it: it begins as a zip,
    or ends before it could have begun otherwise.

    :param path: of the file (as it is, or with ".pkl" appended), or a file object, whose position is kept
    :return: whether it begins as a zip
    """
    if isinstance(path, (str, pathlib.Path)):
        with open_path(path, "r", suffix="pkl") as file:
            return is_archive(file)
    position = path.tell()
    beginning = path.read(len(ZIP_MAGIC))
    path.seek(position)
    return ZIP_MAGIC.startswith(beginning)


class Archive:
    """
    What :func:`write_archive` wrote: a context manager that closes the file if it opened it.

    :param path: of the file (as it is, or with ".pkl" appended), or a file object
    :param verbose: 2: warn if ".pkl" was appended
    :raises ValueError: if the file is truncated, corrupted, of a later format version, or of another kind
    """

    def __init__(self, path: str | pathlib.Path | io.BufferedIOBase, verbose: int = 0):
        self._file: io.BufferedIOBase = open_path(path, "r", verbose=verbose, suffix="pkl")
        self._is_own = isinstance(path, (str, pathlib.Path))
        self.name = str(getattr(self._file, "name", self._file))
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Archive":
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc_value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, unless it was given open."""
        if self._is_own:
            self._file.close()

    @property
    def names(self) -> list[str]:
        """The arrays that were saved."""
        return list(self._types)

    def shape(self, name: str) -> tuple[int, ...]:
        """
        :param name: of an array
        :return: its shape
        :raises ValueError: if it was not saved
        """
        return self._type(name).shape

    def dtype(self, name: str) -> np.dtype:
        """
        :param name: of an array
        :return: its dtype
        :raises ValueError: if it was not saved
        """
        return self._type(name).dtype

    def read(self, name: str) -> np.ndarray:
        """
        :param name: of an array
        :return: the array
        :raises ValueError: if it was not saved, or is corrupted
        """
        # The file is large enough for what its META says: that was checked when it was opened
        dtype, shape = self._type(name)
        array = np.empty(shape, dtype)
        self.read_into(name, array)
        return array

    def read_into(self, name: str, parts: np.ndarray | Sequence[np.ndarray]) -> None:
        """
        Read an array into memory that is already there, a chunk at a time.

        :param name: of an array
        :param parts: C-contiguous array to fill, or several whose concatenation along axis 0 is the array;
            what they hold after an error is undefined
        :raises ValueError: if the array was not saved, is of another shape or dtype, or is corrupted
        """
        saved, parts = self._type(name), _as_parts(parts)
        wanted = _type_of(name, parts)
        if wanted != saved:
            raise ValueError(f"{self.name}: array {name!r} is {saved}, but {wanted} was asked for")
        if not all(part.flags.writeable for part in parts):
            raise ValueError(f"{self.name}: array {name!r} cannot be read into an array that is read-only")
        member = f"{name}.npy"
        with self._intact(member), self._zip.open(member) as data:
            data.read(self._member(member).file_size - saved.nbytes)  # its header, which says what META says
            for chunk in _chunks(parts):
                # Raises if it ends too early and, with the last chunk, if the CRC-32 is another one
                chunk[:] = data.read(len(chunk))

    def _open(self) -> None:
        """Read everything but the arrays."""
        another_kind = f"{self.name} is another kind of file, no {FORMAT}"
        if not is_archive(self._file):
            raise ValueError(f"{another_kind}: it is no zip")
        self._size = self._file.seek(0, io.SEEK_END)
        try:
            self._zip = zipfile.ZipFile(self._file)
        # OSError: older Pythons seek to where a damaged table says, be it before the file
        except (*MISREAD, OSError) as error:
            raise ValueError(
                f"{self.name} is truncated, or the table of contents at its end is corrupted ({error!r})"
            ) from error
        if META not in self._zip.namelist():
            raise ValueError(f"{another_kind}: it has no {META}, but {', '.join(self._zip.namelist()[:3])}")
        with self._intact(META):
            self._member(META)
            contents = json.loads(self._zip.read(META))
        if not isinstance(contents, dict) or contents.get("format") != FORMAT:
            raise ValueError(f"{another_kind}: its {META} does not say so")
        with self._intact(META):
            version = int(contents["version"])
        if version > FORMAT_VERSION:
            raise ValueError(
                f"{self.name} has format version {version} (of sb3_seer {contents.get('sb3_seer')}), but sb3_seer "
                f"{sb3_seer.__version__} reads up to version {FORMAT_VERSION}: update sb3_seer"
            )
        with self._intact(META):
            self.meta: dict[str, Any] = contents["meta"]
            self._types = {name: _parse_type(**given) for name, given in contents["arrays"].items()}
        for name, saved in self._types.items():
            with self._intact(f"{name}.npy"):
                if not 0 <= self._member(f"{name}.npy").file_size - saved.nbytes <= MAX_NPY_HEADER:
                    raise ValueError(f"its size is not that of {saved}")

    def _type(self, name: str) -> ArrayType:
        if name not in self._types:
            raise ValueError(f"{self.name} has no array {name!r}, but {', '.join(map(repr, self._types)) or 'none'}")
        return self._types[name]

    def _member(self, member: str) -> zipfile.ZipInfo:
        """What the zip says about a member, if that can be: memory is taken by its size."""
        info = self._zip.getinfo(member)
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError("it is compressed")
        if not 0 <= info.header_offset <= info.header_offset + info.file_size <= self._size:
            raise ValueError("it does not lie within the file")
        return info

    @contextlib.contextmanager
    def _intact(self, member: str) -> Iterator[None]:
        """:raises ValueError: that names the file and the member, if reading the member fails"""
        try:
            yield
        except MISREAD as error:
            raise ValueError(f"{self.name} is corrupted, in {member} ({error!r})") from error


def _as_parts(parts: np.ndarray | Sequence[np.ndarray]) -> Sequence[np.ndarray]:
    return [parts] if isinstance(parts, np.ndarray) else parts


def _type_of(name: str, parts: Sequence[np.ndarray]) -> ArrayType:
    """
    :param name: of the array, for the messages
    :param parts: its parts
    :return: dtype and shape of their concatenation along axis 0
    :raises ValueError: if an array is not of numbers or not C-contiguous, or if several do not fit together
    """
    if len(parts) == 0:
        raise ValueError(f"array {name!r}: no parts were given, allowed is one or more")
    for part in parts:
        if part.dtype.kind not in NUMBERS:
            raise ValueError(f"array {name!r}: dtype {part.dtype} was given, allowed are bool, integers, floats and complex")
        if not part.flags.c_contiguous:
            raise ValueError(f"array {name!r}: strides {part.strides} were given, allowed are C-contiguous arrays")
    first = parts[0]
    if len(parts) == 1:
        return ArrayType(first.dtype, first.shape)
    if first.ndim == 0 or any(part.dtype != first.dtype or part.shape[1:] != first.shape[1:] for part in parts):
        given = " and ".join(str(ArrayType(part.dtype, part.shape)) for part in parts)
        raise ValueError(f"array {name!r}: {given} were given, allowed are parts that differ in their length only")
    return ArrayType(first.dtype, (sum(len(part) for part in parts), *first.shape[1:]))


def _parse_type(dtype: str, shape: list[int]) -> ArrayType:
    """What META says of an array."""
    saved = ArrayType(np.dtype(dtype), tuple(shape))
    if saved.dtype.kind not in NUMBERS or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"it says {saved}")
    return saved


def _chunks(parts: Sequence[np.ndarray]) -> Iterator[memoryview]:
    """The bytes of the arrays, in views of at most CHUNK_BYTES."""
    for part in parts:
        data = part.reshape(-1).view(np.uint8).data
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]

"""
A replay buffer on disk: an uncompressed zip of ``.npy`` files with CRC-32, as ``np.savez`` writes it, of the steps that
are held, oldest first. ``np.load(path, allow_pickle=False)`` opens it.
"""

import contextlib
import io
import json
import os
import pathlib
import pickle
import re
import shutil
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psutil
from gymnasium import spaces
from numpy.lib.npyio import NpzFile
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.save_util import load_from_pkl, open_path
from tqdm import tqdm

from sb3_seer.common.encoding import LatentCodec
from sb3_seer.common.replay import LatentReplayBuffer
from sb3_seer.common.storage import ImageStore
from sb3_seer.common.type_aliases import LatentEncoder, Observations

Path = str | pathlib.Path | io.BufferedIOBase
MakeBuffer = Callable[..., LatentReplayBuffer]

FORMAT = "sb3_seer replay buffer"
FORMAT_VERSION = 2
CHUNK_BYTES = 2**20  # read at a time

# Attributes of a buffer that are saved
BUFFER_META = ("n_envs", "n_stack", "handle_timeout_termination", "stage", "buffer_size", "pos", "n_valid")
SPACES = ("observation_space", "action_space")
# Attributes of a store with one entry an env, and with extra arrays
ENV_ARRAYS = ("pending", "is_open", "is_shifted")
EXTRAS = ("extra_next", "extra_frames")


def save_buffer(buffer: LatentReplayBuffer, path: Path, verbose: int = 0) -> None:
    """
    Save the steps that are held, without a copy of them. A file at ``path`` is replaced once that is done.

    :param buffer: the replay buffer
    :param path: where to save, ".pkl" is appended to a path without a suffix (SB3's and RL Zoo's name for such a file)
    :param verbose: 2: warn if a file is overwritten
    """
    store, codec = buffer.store, buffer.encoder.codec
    meta: dict[str, Any] = {name: getattr(buffer, name) for name in (*BUFFER_META, "latent_dtype", "encoder_fingerprint")}
    meta.update({name: describe(getattr(buffer, name)) for name in SPACES})
    meta.update(format=FORMAT, version=FORMAT_VERSION, image_transitions=buffer.nbytes // buffer.layout.frame_bytes)
    meta.update(n_augmentations=buffer.encoder.n_augmentations, n_clipped=buffer.encoder.n_clipped)
    arrays: dict[str, list[np.ndarray]] = {}
    if store is not None and buffer.n_valid > 0:
        meta["n_steps_stored"] = store.size
        for name, array in _row_arrays(buffer).items():
            arrays[name] = _last_of_ring(array, buffer.pos, buffer.n_valid)
        for name, array in _slot_arrays(buffer).items():
            arrays[name] = _last_of_ring(array, store.newest + 1, store.size)
        arrays.update({name: [getattr(store, name)] for name in ENV_ARRAYS if hasattr(store, name)})
        arrays.update({f"last_next_obs/{key}": [part] for key, part in buffer.last_next_obs.items()})
        for name in EXTRAS:
            extra = getattr(store, name, {})
            keys = [((slot - store.newest - 1 + store.size) % len(store.ring), env) for slot, env in extra]
            arrays[f"{name}/keys"] = [np.array(keys, dtype=np.int64).reshape(-1, 2)]
            arrays[f"{name}/lengths"] = [np.array(list(map(len, extra.values())), dtype=np.int64)]
            if extra:
                arrays[f"{name}/values"] = list(extra.values())
        if buffer.priorities is not None:
            meta.update(alpha=buffer.priorities.alpha, max_priority=buffer.priorities.max_priority)
            values = buffer.priorities.values.reshape(-1, buffer.n_envs)
            arrays["priorities"] = _last_of_ring(values, buffer.pos, buffer.n_valid)
    if buffer.stage == "latents" and codec is not None and codec.scale is not None and codec.offset is not None:
        arrays.update(codec_scale=[codec.scale], codec_offset=[codec.offset])
    with replacing(path, "pkl", verbose) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, parts in dict(meta=[np.array(json.dumps(meta))], **arrays).items():
            _write(archive, name, parts)


def load_buffer(
    path: Path, like: LatentReplayBuffer, make_buffer: MakeBuffer, policy: LatentEncoder, frozen: bool, verbose: int = 0
) -> LatentReplayBuffer:
    """
    :param path: of a file that ``save_buffer()`` wrote, or of a pickle of SB3's ``ReplayBuffer``, ``DictReplayBuffer`` or
        ``NStepReplayBuffer``, whose transitions are added as images, oldest first
    :param like: the buffer that the model has
    :param make_buffer: makes an empty one for the model, given ``buffer_size``, ``n_stack`` and
        ``handle_timeout_termination``; other settings (n-step returns, augmentation, priorities...) are the model's
    :param policy: of the model
    :param frozen: whether its encoder is frozen
    :param verbose: Verbosity level
    :return: a buffer that goes on as the saved one would have done; an empty one holds images
    :raises ValueError: if the file is damaged or not a replay buffer, of other spaces or another number of envs, or holds
        latents of another encoder
    """
    with contextlib.ExitStack() as stack:
        file = open_path(path, "r", verbose=verbose, suffix="pkl")
        if isinstance(path, (str, pathlib.Path)):
            stack.enter_context(file)
        name, start = str(getattr(file, "name", path)), file.tell()
        magic = file.read(4)
        file.seek(start)
        if not b"PK\x03\x04".startswith(magic):
            buffer = _from_sb3_pickle(file, name, like, make_buffer, verbose)
            buffer.set_encoder(policy)
            return buffer
        try:
            with np.load(file, allow_pickle=False) as arrays:
                return _from_arrays(arrays, name, like, make_buffer, policy, frozen)
        except (zipfile.BadZipFile, zlib.error, EOFError, LookupError, NotImplementedError, OSError, TypeError) as error:
            raise ValueError(f"{name} is damaged or not a replay buffer: {error!r}") from error


def describe(space: spaces.Space) -> str:
    """
    :param space: an observation or action space
    :return: gymnasium's description, and a checksum of all its bounds, which that leaves out if they are many
    """
    flat = spaces.flatten_space(space)
    bounds = flat.low.tobytes() + flat.high.tobytes() if isinstance(flat, spaces.Box) else b""
    return f"{space} #{zlib.crc32(bounds):08x}"


# ---- arrays of a buffer ----


def _row_arrays(buffer: LatentReplayBuffer) -> dict[str, np.ndarray]:
    """:return: arrays with one entry a row of the buffer"""
    arrays = {name: getattr(buffer, name) for name in ("actions", "rewards", "dones", "timeouts")}
    return {**arrays, **{f"vector_obs/{key}": array for key, array in buffer.vector_obs.items()}}


def _slot_arrays(buffer: LatentReplayBuffer) -> dict[str, np.ndarray]:
    """:return: arrays with one entry a slot of its store"""
    store = buffer.store
    assert store is not None
    arrays = dict(observations=store.ring, is_linked=store.is_linked)
    return {**arrays, "n_before": store.n_before} if isinstance(store, ImageStore) else arrays


def _last_of_ring(array: np.ndarray, end: int, n: int) -> list[np.ndarray]:
    """:return: views of the n entries of a ring in front of ``end``, oldest first: those in front of its end, and the rest"""
    n_newer = min(end, n)
    return [array[len(array) - (n - n_newer) :], array[end - n_newer : end]]


def _write(archive: zipfile.ZipFile, name: str, parts: list[np.ndarray]) -> None:
    """Write arrays as one, their concatenation along the first axis. ``np.savez`` would need that as a copy."""
    shape = parts[0].shape if len(parts) == 1 else (sum(map(len, parts)), *parts[0].shape[1:])
    header = dict(descr=np.lib.format.dtype_to_descr(parts[0].dtype), fortran_order=False, shape=shape)
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, header)
        for part in parts:
            member.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)


def _read_into(arrays: NpzFile, name: str, parts: list[np.ndarray]) -> None:
    """Read an array into memory that is there, a chunk at a time."""
    assert arrays.zip is not None
    with arrays.zip.open(f"{name}.npy") as member:
        np.lib.format.read_magic(member)
        shape, _, dtype = np.lib.format.read_array_header_1_0(member)
        wanted = (sum(map(len, parts)), *parts[0].shape[1:])
        if shape != wanted or dtype != parts[0].dtype:
            raise TypeError(f"array {name!r} must be {parts[0].dtype} of shape {wanted}, got {dtype} of shape {shape}")
        for part in parts:
            data = part.reshape(-1).view(np.uint8)
            for start in range(0, len(data), CHUNK_BYTES):
                chunk = data[start : start + CHUNK_BYTES]
                chunk[:] = np.frombuffer(member.read(len(chunk)), dtype=np.uint8)
        member.read(1)  # the end, where the CRC-32 is checked


# ---- loading ----


def _from_arrays(
    arrays: NpzFile, path: str, like: LatentReplayBuffer, make_buffer: MakeBuffer, policy: LatentEncoder, frozen: bool
) -> LatentReplayBuffer:
    """See ``load_buffer()``."""
    if "meta.json" in arrays.files:  # version 1
        contents = json.loads(bytes(arrays["meta.json"]))
        meta = {**contents, **contents.get("meta", {})}
    else:
        meta = json.loads(str(arrays["meta"]))
    if meta["format"] != FORMAT:
        raise ValueError(f"{path} must be of format {FORMAT!r}, got {meta['format']!r}")
    if meta["version"] > FORMAT_VERSION:
        raise ValueError(
            f"{path} must be of format version <= {FORMAT_VERSION}, got version {meta['version']}. Update sb3_seer"
        )
    _check_same(path, like, {name: meta[name] for name in (*SPACES, "n_envs")})
    _check_cap(path, like, meta["image_transitions"])
    if meta["stage"] == "latents" and meta["n_valid"] > 0:
        fingerprint = policy.encoder_fingerprint() if frozen else "not frozen"
        if meta["encoder_fingerprint"] != fingerprint:
            raise ValueError(
                f"The replay buffer in {path} holds latents of encoder {meta['encoder_fingerprint']}, "
                f"but the encoder of this model is {fingerprint}. Load the model that was saved with the buffer, "
                "or move this file away to go on without it"
            )
        _check_same(path, like.encoder, dict(n_augmentations=meta["n_augmentations"]))
        _check_same(path, like, dict(latent_dtype=meta["latent_dtype"]))
    settings = {name: meta[name] for name in ("n_stack", "handle_timeout_termination")}
    buffer = make_buffer(buffer_size=meta["image_transitions"], **settings)
    buffer.set_encoder(policy)
    if meta["n_valid"] == 0:
        return buffer
    if "codec_scale" in arrays:
        buffer.encoder.codec = LatentCodec(buffer.latent_dtype, arrays["codec_scale"], arrays["codec_offset"])
    for name in BUFFER_META:
        setattr(buffer, name, meta[name])
    buffer.full, buffer.encoder.n_clipped = buffer.n_valid == buffer.buffer_size, meta["n_clipped"]
    if meta["version"] == 1:
        _read_version_1(arrays, meta, buffer)
    else:
        _read_steps(arrays, meta, buffer)
    return buffer


def _read_steps(arrays: NpzFile, meta: dict[str, Any], buffer: LatentReplayBuffer) -> None:
    store = buffer._allocate()
    store.size = meta["n_steps_stored"]
    store.newest = store.size - 1
    for name, array in _row_arrays(buffer).items():
        _read_into(arrays, name, _last_of_ring(array, buffer.pos, buffer.n_valid))
    for name, array in _slot_arrays(buffer).items():
        _read_into(arrays, name, [array[: store.size]])
    for name in ENV_ARRAYS:
        if hasattr(store, name):
            setattr(store, name, arrays[name])
    buffer.last_next_obs = {key: arrays[f"last_next_obs/{key}"] for key in buffer.layout.shapes}
    for name in EXTRAS:
        if hasattr(store, name):
            setattr(store, name, _read_extra(arrays, name, buffer))
    _read_priorities(arrays, meta, buffer, lambda values: _last_of_ring(values, buffer.pos, buffer.n_valid))


def _read_extra(arrays: NpzFile, name: str, buffer: LatentReplayBuffer) -> dict[tuple[int, int], np.ndarray]:
    """:return: arrays by slot and env"""
    assert buffer.store is not None
    pending = buffer.store.pending
    values = [np.empty((length, *pending.shape[2:]), dtype=pending.dtype) for length in arrays[f"{name}/lengths"].tolist()]
    if values:
        _read_into(arrays, f"{name}/values", values)
    return {(slot, env): value for (slot, env), value in zip(arrays[f"{name}/keys"].tolist(), values, strict=True)}


def _read_priorities(
    arrays: NpzFile, meta: dict[str, Any], buffer: LatentReplayBuffer, parts_of: Callable[[np.ndarray], list[np.ndarray]]
) -> None:
    """:param parts_of: where the rows in the file are in an array of one entry a row"""
    if buffer.priorities is None:
        return
    values = np.zeros((buffer.buffer_size, buffer.n_envs))
    if meta.get("alpha") == buffer.priorities.alpha:
        buffer.priorities.max_priority = meta["max_priority"]
        _read_into(arrays, "priorities", parts_of(values))
    else:  # as if all transitions were new
        for part in parts_of(values):
            part[:] = buffer.priorities.max_priority
    buffer.priorities.values = values.reshape(-1)


def _read_version_1(arrays: NpzFile, meta: dict[str, Any], buffer: LatentReplayBuffer) -> None:
    """Files of sb3_seer 0.1.0: rows in the order of the ring, and older frames of the oldest row as its `tail`."""
    store, n, n_newer = buffer._allocate(), buffer.n_valid, buffer.pos
    n_spare = buffer.n_stack - 1 if isinstance(store, ImageStore) else 0
    store.size = n_spare + n
    store.newest = store.size - 1

    def rows(array: np.ndarray) -> list[np.ndarray]:
        return _last_of_ring(array, buffer.pos, n)[::-1]

    for name, array in _row_arrays(buffer).items():
        _read_into(arrays, name.replace("vector_obs/", "others/"), rows(array))
    names = dict(observations="observations", is_linked="linked", n_before="age")
    for name, array in _slot_arrays(buffer).items():
        steps = array[n_spare : store.size]
        _read_into(arrays, names[name], [steps[n - n_newer :], steps[: n - n_newer]])
    store.is_open = arrays["open"]
    pending = arrays["pending_bytes"].reshape(buffer.n_envs, buffer.n_stack, -1)
    images: Any = buffer.layout.to_images(pending)
    buffer.last_next_obs = dict(images) if buffer.layout.is_dict else {"": images}
    for key, array in buffer.vector_obs.items():
        buffer.last_next_obs[key] = array[buffer.pos - 1, :, 1].copy()
    extras = {"successor": store.extra_next}
    if isinstance(store, ImageStore):
        extras["history"] = store.extra_frames
        store.pending, store.is_shifted = pending, arrays["shifted"]
        store.ring[:n_spare] = np.roll(arrays["tail"], -meta["store"]["tail_start"], axis=0)
        n_before = store.n_before[n_spare : store.size]
        n_before[n_before > np.arange(n)[:, None]] = n_spare
    else:
        store.pending = arrays["pending_latents"]
    for name, extra in extras.items():
        for (row, env), value in _read_extra(arrays, name, buffer).items():
            extra[store.newest - (buffer.pos - 1 - row) % buffer.buffer_size, env] = value
    _read_priorities(arrays, meta, buffer, rows)


def _check_same(path: str, ours: Any, saved: dict[str, Any]) -> None:
    for name, value in saved.items():
        own = describe(getattr(ours, name)) if name in SPACES else getattr(ours, name)
        if value != own:
            raise ValueError(f"The replay buffer in {path} has {name}={value}, this model has {own}")


def _check_cap(path: str, like: LatentReplayBuffer, image_transitions: int) -> None:
    cap = like.max_latent_buffer_size
    if cap is not None and cap < image_transitions:
        raise ValueError(
            f"`max_latent_buffer_size` must be >= {image_transitions}, the transitions that the replay buffer in {path} holds "
            f"as images, got {cap}"
        )


def _from_sb3_pickle(
    file: io.BufferedIOBase, path: str, like: LatentReplayBuffer, make_buffer: MakeBuffer, verbose: int
) -> LatentReplayBuffer:
    """See ``load_buffer()``."""
    try:
        theirs = load_from_pkl(file, verbose)
    except (pickle.UnpicklingError, EOFError, LookupError, ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is neither a replay buffer of sb3_seer nor a pickle of one of SB3's ({error!r})") from error
    if type(theirs) not in (ReplayBuffer, DictReplayBuffer, NStepReplayBuffer):
        raise ValueError(
            f"{path} must hold a replay buffer of sb3_seer or SB3's ReplayBuffer, DictReplayBuffer or NStepReplayBuffer, "
            f"got {type(theirs).__name__}"
        )
    n_transitions, timeouts = theirs.buffer_size * theirs.n_envs, theirs.handle_timeout_termination
    _check_same(path, like, {name: describe(getattr(theirs, name)) for name in SPACES} | dict(n_envs=theirs.n_envs))
    _check_cap(path, like, n_transitions)
    buffer = make_buffer(buffer_size=n_transitions, handle_timeout_termination=timeouts)
    rows = np.arange(theirs.size()) + (theirs.pos if theirs.full else 0)
    if theirs.full and theirs.optimize_memory_usage:
        rows = rows[1:]  # the oldest observation was overwritten by the newest next one

    def at(observations: Observations, row: int) -> Observations:
        return {key: part[row] for key, part in observations.items()} if isinstance(observations, dict) else observations[row]

    for row in tqdm(rows % theirs.buffer_size, desc="transitions", delay=2):
        if theirs.optimize_memory_usage:
            next_obs = at(theirs.observations, (row + 1) % theirs.buffer_size)
        else:
            next_obs = at(theirs.next_observations, row)
        infos = [{"TimeLimit.truncated": bool(timeout)} for timeout in theirs.timeouts[row]]
        step = theirs.actions[row], theirs.rewards[row], theirs.dones[row]
        buffer.add(at(theirs.observations, row), next_obs, *step, infos)
    return buffer


# ---- replacing a file ----


@contextlib.contextmanager
def replacing(path: Path, suffix: str | None = None, verbose: int = 0) -> Iterator[io.BufferedIOBase]:
    """
    Open a file to write to, which replaces the one at ``path`` once it is complete, and only then.

    Until then it is ``<name>.<process id>.tmp`` beside it: an exception removes it, the next save removes the file that
    a killed process left. Paths and warnings are those of SB3's ``open_path``.

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
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
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
            # A leftover that belongs to somebody else must not stop the save
            with contextlib.suppress(OSError):
                file.unlink()

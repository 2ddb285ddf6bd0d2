"""
A replay buffer on disk: what ``np.savez`` writes (an uncompressed zip of ``.npy`` files, with CRC-32) of the steps that are
held, oldest first. Arrays are in chunks (``observations/0``, ``observations/1``...): ``np.load`` reads each as a whole.
"""

import contextlib
import io
import itertools
import json
import pathlib
import pickle
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.lib.npyio import NpzFile
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.save_util import load_from_pkl, open_path
from tqdm import tqdm

from sb3_seer.common.encoding import LatentCodec
from sb3_seer.common.observations import map_parts
from sb3_seer.common.policies import SEERPolicy
from sb3_seer.common.replay import LatentReplayBuffer
from sb3_seer.common.save_util import PathOrFile, open_atomic
from sb3_seer.common.storage import ImageStore, LatentStore
from sb3_seer.common.utils import warn

MakeBuffer = Callable[..., LatentReplayBuffer]
Store = ImageStore | LatentStore
Extra = dict[tuple[int, int], np.ndarray]  # arrays by slot and env
Rows = tuple[np.ndarray, np.ndarray]  # an array, and which rows of it are in a file, in this order

FORMAT = "sb3_seer replay buffer"
FORMAT_VERSION = 3
CHUNK_BYTES = 2**22

SPACES = ("observation_space", "action_space")
STATE = ("stage", "buffer_size", "pos", "n_valid")
SETTINGS = ("n_envs", "n_stack", "handle_timeout_termination", "latent_dtype", "encoder_fingerprint")
# Names of arrays in version 1 that have changed
NAMES_OF_VERSION_1 = dict(
    is_linked="linked", n_before="age", is_open="open", is_shifted="shifted", extra_next="successor", extra_frames="history"
)


def save_buffer(buffer: LatentReplayBuffer, path: PathOrFile, verbose: int = 0) -> None:
    """
    Save the steps that are held, without a copy of them. A file at ``path`` is replaced once that is done.

    :param buffer: the replay buffer
    :param path: where to save, ".pkl" is appended to a path without a suffix (SB3's and RL Zoo's name for such a file)
    :param verbose: 2: warn if a file is overwritten
    """
    store, codec, priorities = buffer.store, buffer.encoder.codec, buffer.priorities
    meta = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "image_transitions": buffer.nbytes // buffer.layout.frame_bytes,
        "n_augmentations": buffer.encoder.n_augmentations,
        "n_clipped": buffer.encoder.n_clipped,
        **{name: describe(getattr(buffer, name)) for name in SPACES},
        **{name: getattr(buffer, name) for name in (*STATE, *SETTINGS)},
    }
    arrays: dict[str, Any] = {}
    if store is not None and buffer.n_valid > 0:
        meta.update(n_steps_stored=store.size, newest=store.newest)
        rows = _rows(buffer, store)
        for name, extra in _extras(store).items():
            keys = [((slot - store.newest - 1 + store.size) % len(store.ring), env) for slot, env in extra]
            arrays[f"{name}/keys"] = np.array(keys, dtype=np.int64).reshape(-1, 2)
            arrays[f"{name}/lengths"] = np.array(list(map(len, extra.values())), dtype=np.int64)
            arrays[f"{name}/values"] = np.concatenate([store.pending[:0, 0], *extra.values()])
        if priorities is not None:
            meta.update(alpha=priorities.alpha, max_priority=priorities.max_priority)
            rows["priorities"] = priorities.values.reshape(-1, buffer.n_envs), rows["rewards"][1]
        for name, (array, indices) in rows.items():
            arrays.update({f"{name}/{i}": chunk for i, chunk in enumerate(_chunks(array, indices))})
    if buffer.stage == "latents" and codec is not None and codec.scale is not None and codec.offset is not None:
        arrays.update(codec_scale=codec.scale, codec_offset=codec.offset)
    with open_atomic(path, "pkl", verbose) as file:
        np.savez(file, meta=np.array(json.dumps(meta, default=np.generic.item)), **arrays)


def load_buffer(
    path: PathOrFile, make_buffer: MakeBuffer, policy: SEERPolicy | None, frozen: bool, verbose: int = 0
) -> LatentReplayBuffer:
    """
    :param path: of a file that ``save_buffer()`` wrote, or of a pickle of SB3's ``ReplayBuffer``, ``DictReplayBuffer`` or
        ``NStepReplayBuffer``, whose transitions are added as images, oldest first
    :param make_buffer: makes an empty buffer for the model, given ``buffer_size``, ``n_stack`` and
        ``handle_timeout_termination``; other settings (n-step returns, augmentation, priorities...) are the model's
    :param policy: of the model. None for one without an encoder to freeze, which also loads a pickled ``LatentReplayBuffer``
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
            buffer = _from_pickle(file, name, make_buffer, policy, verbose)
            if policy is not None:
                buffer.set_encoder(policy)
            return buffer
        try:
            with np.load(file, allow_pickle=False) as arrays:
                return _from_arrays(arrays, name, make_buffer, policy, frozen)
        except (zipfile.BadZipFile, zlib.error, EOFError, LookupError, NotImplementedError, OSError, TypeError) as error:
            raise ValueError(f"{name} is damaged or not a replay buffer: {error!r}") from error


def warn_of_other_sizes(path: PathOrFile, ours: LatentReplayBuffer, loaded: LatentReplayBuffer) -> None:
    """
    Warn of sizes that have no effect: a loaded buffer keeps the memory, and as latents the capacity, of the saved one.

    :param path: of the file
    :param ours: an empty buffer of the model
    :param loaded: the buffer from the file
    """
    asked, held = (buffer.nbytes // buffer.layout.frame_bytes for buffer in (ours, loaded))
    if held != asked:
        warn(f"buffer_size={asked} has no effect: the replay buffer in {path} has the memory of {held} images")
    held, cap = loaded.buffer_size * loaded.n_envs, ours.max_latent_buffer_size
    if loaded.stage == "images" and loaded.max_latent_buffer_size != cap:
        warn(f"max_latent_buffer_size={cap} has no effect: the replay buffer in {path} is for {held} transitions as images")
    if loaded.stage == "latents" and held != loaded.plan().latent_transitions:
        warn(f"max_latent_buffer_size={cap} has no effect: the replay buffer in {path} holds {held} transitions as latents")


def describe(space: spaces.Space) -> str:
    """
    :param space: an observation or action space
    :return: gymnasium's description, and a checksum of all its bounds, which that leaves out if they are many
    """
    flat = spaces.flatten_space(space)
    bounds = flat.low.tobytes() + flat.high.tobytes() if isinstance(flat, spaces.Box) else b""
    return f"{space} #{zlib.crc32(bounds):08x}"


# ---- what is in a file ----


def _rows(buffer: LatentReplayBuffer, store: Store) -> dict[str, Rows]:
    """:return: arrays by their name in a file"""
    steps = {name: getattr(buffer, name) for name in ("actions", "rewards", "dones", "timeouts")}
    steps.update({f"vector_obs/{key}": array for key, array in buffer.vector_obs.items()})
    slots = {"observations": store.ring, "is_linked": store.is_linked}
    envs = {"pending": store.pending, "is_open": store.is_open}
    envs.update({f"last_next_obs/{key}": array for key, array in buffer.last_next_obs.items()})
    if isinstance(store, ImageStore):
        slots["n_before"], envs["is_shifted"] = store.n_before, store.is_shifted
    newest_steps = np.arange(buffer.pos - buffer.n_valid, buffer.pos) % buffer.buffer_size
    newest_slots = np.arange(store.newest + 1 - store.size, store.newest + 1) % len(store.ring)
    return {
        **{name: (array, newest_steps) for name, array in steps.items()},
        **{name: (array, newest_slots) for name, array in slots.items()},
        **{name: (array, np.arange(buffer.n_envs)) for name, array in envs.items()},
    }


def _extras(store: Store) -> dict[str, Extra]:
    """:return: arrays kept beside the ring, by their name in a file"""
    if isinstance(store, ImageStore):
        return {"extra_next": store.extra_next, "extra_frames": store.extra_frames}
    return {"extra_next": store.extra_next}


def _chunks(array: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    """:return: views of these rows, which go on at the start of a ring after its end"""
    n = max(CHUNK_BYTES // max(array[0].nbytes, 1), 1)
    for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
        for start in range(run[0], run[-1] + 1, n):
            yield array[start : min(start + n, run[-1] + 1)]


def _read(arrays: NpzFile, name: str, array: np.ndarray, rows: np.ndarray) -> None:
    """Read the rows of an array into memory that is there, a chunk at a time."""
    # Before version 3, arrays were whole
    names = (f"{name}/{i}" for i in itertools.count()) if f"{name}/0" in arrays else iter([name])
    n_read = 0
    while n_read < len(rows):
        chunk = arrays[next(names)]
        if chunk.shape[1:] != array.shape[1:] or chunk.dtype != array.dtype:
            raise TypeError(
                f"rows of {name!r} must be {array.dtype} of shape {array.shape[1:]}, got {chunk.dtype} {chunk.shape}"
            )
        array[rows[n_read : n_read + len(chunk)]] = chunk
        n_read += len(chunk)


# ---- loading ----


def _from_arrays(
    arrays: NpzFile, path: str, make_buffer: MakeBuffer, policy: SEERPolicy | None, frozen: bool
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
    ours = make_buffer(buffer_size=1)
    _check_same(path, ours, {name: meta[name] for name in (*SPACES, "n_envs")})
    if meta["stage"] == "latents" and meta["n_valid"] > 0:
        fingerprint = policy.encoder_fingerprint() if policy is not None and frozen else "not frozen"
        if meta["encoder_fingerprint"] != fingerprint:
            raise ValueError(
                f"The replay buffer in {path} holds latents of encoder {meta['encoder_fingerprint']}, "
                f"but the encoder of this model is {fingerprint}. Load the model that was saved with the buffer, "
                "or move this file away to go on without it"
            )
        _check_same(path, ours, dict(latent_dtype=meta["latent_dtype"]))
        _check_same(path, ours.encoder, dict(n_augmentations=meta["n_augmentations"]))
    settings = {name: meta[name] for name in ("n_stack", "handle_timeout_termination")}
    buffer = _make_of_size(meta["image_transitions"], ours, make_buffer, **settings)
    if policy is not None:
        buffer.set_encoder(policy)
    if meta["n_valid"] == 0:
        return buffer
    if "codec_scale" in arrays:
        codec = (arrays["codec_scale"], arrays["codec_offset"], meta["encoder_fingerprint"])
        buffer.encoder.codec = LatentCodec(buffer.latent_dtype, *codec)
    for name in STATE:
        setattr(buffer, name, meta[name])
    buffer.full, buffer.encoder.n_clipped = buffer.n_valid == buffer.buffer_size, meta["n_clipped"]
    if meta["version"] == 1:
        _read_version_1(arrays, meta, buffer, buffer._allocate())
    else:
        _read_steps(arrays, meta, buffer, buffer._allocate())
    if buffer.priorities is not None:
        rows = np.arange(buffer.pos - buffer.n_valid, buffer.pos) % buffer.buffer_size
        _read_priorities(arrays, meta, buffer, np.sort(rows) if meta["version"] == 1 else rows)
    return buffer


def _make_of_size(buffer_size: int, ours: LatentReplayBuffer, make_buffer: MakeBuffer, **settings: Any) -> LatentReplayBuffer:
    """:return: a buffer that holds as many transitions as the saved one, whatever ``max_latent_buffer_size`` is"""
    if ours.max_latent_buffer_size is not None:
        settings["max_latent_buffer_size"] = max(buffer_size, ours.max_latent_buffer_size)
    return make_buffer(buffer_size=buffer_size, **settings)


def _read_steps(arrays: NpzFile, meta: dict[str, Any], buffer: LatentReplayBuffer, store: Store) -> None:
    store.size = meta["n_steps_stored"]
    store.newest = meta["newest"]  # the ring goes on where it was, so that a freeze augments in the same order
    oldest = store.newest + 1 - store.size
    layout = buffer.layout
    buffer.last_next_obs = {key: np.empty((buffer.n_envs, *layout.shapes[key]), layout.dtypes[key]) for key in layout.shapes}
    for name, (array, rows) in _rows(buffer, store).items():
        _read(arrays, name, array, rows)
    for name, extra in _extras(store).items():
        extra.update({((oldest + i) % len(store.ring), env): value for (i, env), value in _read_extra(arrays, name).items()})


def _read_extra(arrays: NpzFile, name: str) -> Extra:
    lengths = arrays[f"{name}/lengths"]
    if len(lengths) == 0:
        return {}
    values = np.split(arrays[f"{name}/values"], np.cumsum(lengths)[:-1])
    return {(slot, env): value.copy() for (slot, env), value in zip(arrays[f"{name}/keys"].tolist(), values, strict=True)}


def _read_priorities(arrays: NpzFile, meta: dict[str, Any], buffer: LatentReplayBuffer, rows: np.ndarray) -> None:
    assert buffer.priorities is not None
    values = np.zeros((buffer.buffer_size, buffer.n_envs))
    if meta.get("alpha") == buffer.priorities.alpha:
        buffer.priorities.max_priority = meta["max_priority"]
        _read(arrays, "priorities", values, rows)
    else:  # as if all transitions were new
        values[rows] = buffer.priorities.max_priority
    buffer.priorities.values = values.reshape(-1)


def _read_version_1(arrays: NpzFile, meta: dict[str, Any], buffer: LatentReplayBuffer, store: Store) -> None:
    """Files of sb3_seer 0.1.0: rows in the order of the ring, and older frames of the oldest row as its `tail`."""
    n_slots, n = len(store.ring), buffer.n_valid
    store.newest, store.size = (buffer.pos - 1) % n_slots, n
    all_rows = _rows(buffer, store)
    del all_rows["pending"]
    for name, (array, rows) in all_rows.items():
        _read(arrays, NAMES_OF_VERSION_1.get(name, name.replace("vector_obs/", "others/")), array, np.sort(rows))
    for name, extra in _extras(store).items():
        for (row, env), value in _read_extra(arrays, NAMES_OF_VERSION_1[name]).items():
            extra[(store.newest - (buffer.pos - 1 - row) % buffer.buffer_size) % n_slots, env] = value
    pending = arrays["pending_bytes"].reshape(buffer.n_envs, buffer.n_stack, -1)
    images: Any = buffer.layout.to_images(pending)
    vectors = {key: array[buffer.pos - 1, :, 1].copy() for key, array in buffer.vector_obs.items()}
    buffer.last_next_obs = {**images, **vectors} if buffer.layout.is_dict else {"": images}
    if isinstance(store, LatentStore):
        store.pending = arrays["pending_latents"]
        return
    store.pending = pending
    n_spare = buffer.n_stack - 1
    slots = store.slots(np.arange(n + n_spare)[::-1])  # oldest first
    store.ring[slots[:n_spare]] = np.roll(arrays["tail"], -meta["store"]["tail_start"], axis=0)
    n_before = store.n_before[slots[n_spare:]]
    store.n_before[slots[n_spare:]] = np.where(n_before > np.arange(n)[:, None], n_spare, n_before)
    store.size += n_spare


def _check_same(path: str, ours: Any, saved: dict[str, Any]) -> None:
    for name, value in saved.items():
        own = describe(getattr(ours, name)) if name in SPACES else getattr(ours, name)
        is_same = _without_bounds(value) == _without_bounds(own) if name in SPACES else value == own
        if not is_same:
            raise ValueError(f"`{name}` of the replay buffer in {path} must be {own}, as in this model, got {value}")


def _without_bounds(description: str) -> str:
    """Versions of numpy print a bound in several ways. The checksum knows its value."""
    return re.sub(r"Box\([^(]*\(", "Box((", description)


def _from_pickle(
    file: io.BufferedIOBase, path: str, make_buffer: MakeBuffer, policy: SEERPolicy | None, verbose: int
) -> LatentReplayBuffer:
    """See ``load_buffer()``."""
    try:
        theirs = load_from_pkl(file, verbose)
    except (pickle.UnpicklingError, EOFError, LookupError, ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is neither a replay buffer of sb3_seer nor a pickle of one of SB3's ({error!r})") from error
    if isinstance(theirs, LatentReplayBuffer) and policy is None:
        return theirs
    if isinstance(theirs, LatentReplayBuffer):
        raise ValueError(f"{path} is a pickled LatentReplayBuffer. Only algorithms without an encoder to freeze load it")
    if type(theirs) not in (ReplayBuffer, DictReplayBuffer, NStepReplayBuffer):
        raise ValueError(
            f"{path} must hold a replay buffer of sb3_seer or SB3's ReplayBuffer, DictReplayBuffer or NStepReplayBuffer, "
            f"got {type(theirs).__name__}"
        )
    saved = {name: describe(getattr(theirs, name)) for name in SPACES}
    ours = make_buffer(buffer_size=1)
    _check_same(path, ours, {**saved, "n_envs": theirs.n_envs})
    n_rows, timeouts = theirs.buffer_size, theirs.handle_timeout_termination
    buffer = _make_of_size(n_rows * theirs.n_envs, ours, make_buffer, handle_timeout_termination=timeouts)
    rows = np.arange(theirs.size()) + (theirs.pos if theirs.full else 0)
    if theirs.full and theirs.optimize_memory_usage:
        rows = rows[1:]  # the oldest observation was overwritten by the newest next one
    for row in tqdm(rows % n_rows, desc="transitions", delay=2):
        obs = map_parts(itemgetter(row), theirs.observations)
        if theirs.optimize_memory_usage:
            next_obs = map_parts(itemgetter((row + 1) % n_rows), theirs.observations)
        else:
            next_obs = map_parts(itemgetter(row), theirs.next_observations)
        infos = [{"TimeLimit.truncated": bool(timeout)} for timeout in theirs.timeouts[row]]
        buffer.add(obs, next_obs, theirs.actions[row], theirs.rewards[row], theirs.dones[row], infos)
    return buffer

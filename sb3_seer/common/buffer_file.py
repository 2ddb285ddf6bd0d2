"""
A replay buffer on disk: an uncompressed zip of ``.npy`` files with CRC-32, as ``np.savez`` writes it, of the steps that
are held, oldest first. ``np.load(path, allow_pickle=False)`` opens it.
"""

import contextlib
import io
import json
import pathlib
import pickle
import zipfile
import zlib
from collections.abc import Callable
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
from sb3_seer.common.replay import LatentReplayBuffer
from sb3_seer.common.save_util import Path, replacing
from sb3_seer.common.storage import ImageStore, LatentStore
from sb3_seer.common.type_aliases import LatentEncoder

MakeBuffer = Callable[..., LatentReplayBuffer]
Store = ImageStore | LatentStore
Extra = dict[tuple[int, int], np.ndarray]  # arrays by slot and env

FORMAT = "sb3_seer replay buffer"
FORMAT_VERSION = 2
CHUNK_BYTES = 2**20  # read at a time

SPACES = ("observation_space", "action_space")
STATE = ("stage", "buffer_size", "pos", "n_valid")
SETTINGS = ("n_envs", "n_stack", "handle_timeout_termination", "latent_dtype", "encoder_fingerprint")
# Names of arrays in version 1 that have changed
NAMES_OF_VERSION_1 = dict(
    is_linked="linked", n_before="age", is_open="open", is_shifted="shifted", extra_next="successor", extra_frames="history"
)


def save_buffer(buffer: LatentReplayBuffer, path: Path, verbose: int = 0) -> None:
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
    arrays: dict[str, list[np.ndarray]] = {}
    if store is not None and buffer.n_valid > 0:
        meta["n_steps_stored"] = store.size
        arrays = _views(buffer, store)
        for name, extra in _extras(store).items():
            keys = [((slot - store.newest - 1 + store.size) % len(store.ring), env) for slot, env in extra]
            arrays[f"{name}/keys"] = [np.array(keys, dtype=np.int64).reshape(-1, 2)]
            arrays[f"{name}/lengths"] = [np.array(list(map(len, extra.values())), dtype=np.int64)]
            if extra:
                arrays[f"{name}/values"] = list(extra.values())
        if priorities is not None:
            meta.update(alpha=priorities.alpha, max_priority=priorities.max_priority)
            arrays["priorities"] = _newest(priorities.values.reshape(-1, buffer.n_envs), buffer.pos, buffer.n_valid)
    if buffer.stage == "latents" and codec is not None and codec.scale is not None and codec.offset is not None:
        arrays.update(codec_scale=[codec.scale], codec_offset=[codec.offset])
    with replacing(path, "pkl", verbose) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, parts in {"meta": [np.array(json.dumps(meta))], **arrays}.items():
            _write(archive, name, parts)


def load_buffer(
    path: Path, make_buffer: MakeBuffer, policy: LatentEncoder, frozen: bool, verbose: int = 0
) -> LatentReplayBuffer:
    """
    :param path: of a file that ``save_buffer()`` wrote, or of a pickle of SB3's ``ReplayBuffer``, ``DictReplayBuffer`` or
        ``NStepReplayBuffer``, whose transitions are added as images, oldest first
    :param make_buffer: makes an empty buffer for the model, given ``buffer_size``, ``n_stack`` and
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
            buffer = _from_sb3_pickle(file, name, make_buffer, verbose)
            buffer.set_encoder(policy)
            return buffer
        try:
            with np.load(file, allow_pickle=False) as arrays:
                return _from_arrays(arrays, name, make_buffer, policy, frozen)
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


# ---- what is in a file ----


def _views(buffer: LatentReplayBuffer, store: Store) -> dict[str, list[np.ndarray]]:
    """:return: the memory of each array of a file, in one or two parts: they are written from there, and read into it"""
    rows = {name: getattr(buffer, name) for name in ("actions", "rewards", "dones", "timeouts")}
    rows.update({f"vector_obs/{key}": array for key, array in buffer.vector_obs.items()})
    slots = {"observations": store.ring, "is_linked": store.is_linked}
    envs = {"pending": store.pending, "is_open": store.is_open}
    envs.update({f"last_next_obs/{key}": array for key, array in buffer.last_next_obs.items()})
    if isinstance(store, ImageStore):
        slots["n_before"], envs["is_shifted"] = store.n_before, store.is_shifted
    return {
        **{name: _newest(array, buffer.pos, buffer.n_valid) for name, array in rows.items()},
        **{name: _newest(array, store.newest + 1, store.size) for name, array in slots.items()},
        **{name: [array] for name, array in envs.items()},
    }


def _extras(store: Store) -> dict[str, Extra]:
    """:return: arrays kept beside the ring, by their name in a file"""
    if isinstance(store, ImageStore):
        return {"extra_next": store.extra_next, "extra_frames": store.extra_frames}
    return {"extra_next": store.extra_next}


def _newest(ring: np.ndarray, end: int, n: int) -> list[np.ndarray]:
    """:return: views of the n entries in front of ``end``, oldest first: the last ones of the ring, and its first ones"""
    n_first = min(end, n)
    return [ring[len(ring) - (n - n_first) :], ring[end - n_first : end]]


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
    arrays: NpzFile, path: str, make_buffer: MakeBuffer, policy: LatentEncoder, frozen: bool
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
        fingerprint = policy.encoder_fingerprint() if frozen else "not frozen"
        if meta["encoder_fingerprint"] != fingerprint:
            raise ValueError(
                f"The replay buffer in {path} holds latents of encoder {meta['encoder_fingerprint']}, "
                f"but the encoder of this model is {fingerprint}. Load the model that was saved with the buffer, "
                "or move this file away to go on without it"
            )
        _check_same(path, ours, dict(latent_dtype=meta["latent_dtype"]))
        _check_same(path, ours.encoder, dict(n_augmentations=meta["n_augmentations"]))
    settings = {name: meta[name] for name in ("n_stack", "handle_timeout_termination")}
    buffer = make_buffer(buffer_size=meta["image_transitions"], **settings)
    buffer.set_encoder(policy)
    if meta["n_valid"] == 0:
        return buffer
    if "codec_scale" in arrays:
        buffer.encoder.codec = LatentCodec(buffer.latent_dtype, arrays["codec_scale"], arrays["codec_offset"])
    for name in STATE:
        setattr(buffer, name, meta[name])
    buffer.full, buffer.encoder.n_clipped = buffer.n_valid == buffer.buffer_size, meta["n_clipped"]
    if meta["version"] == 1:
        _read_version_1(arrays, meta, buffer, buffer._allocate())
    else:
        _read_steps(arrays, meta, buffer, buffer._allocate())
    if buffer.priorities is not None:
        _read_priorities(arrays, meta, buffer)
    return buffer


def _read_steps(arrays: NpzFile, meta: dict[str, Any], buffer: LatentReplayBuffer, store: Store) -> None:
    store.newest, store.size = meta["n_steps_stored"] - 1, meta["n_steps_stored"]
    layout = buffer.layout
    buffer.last_next_obs = {key: np.empty((buffer.n_envs, *layout.shapes[key]), layout.dtypes[key]) for key in layout.shapes}
    for name, parts in _views(buffer, store).items():
        _read_into(arrays, name, parts)
    for name, extra in _extras(store).items():
        extra.update(_read_extra(arrays, name, store))


def _read_extra(arrays: NpzFile, name: str, store: Store) -> Extra:
    lengths, (_, _, *shape) = arrays[f"{name}/lengths"].tolist(), store.pending.shape
    values = [np.empty((length, *shape), dtype=store.pending.dtype) for length in lengths]
    if values:
        _read_into(arrays, f"{name}/values", values)
    return {(slot, env): value for (slot, env), value in zip(arrays[f"{name}/keys"].tolist(), values, strict=True)}


def _read_priorities(arrays: NpzFile, meta: dict[str, Any], buffer: LatentReplayBuffer) -> None:
    assert buffer.priorities is not None
    values = np.zeros((buffer.buffer_size, buffer.n_envs))
    parts = _newest(values, buffer.pos, buffer.n_valid)
    if meta.get("alpha") == buffer.priorities.alpha:
        buffer.priorities.max_priority = meta["max_priority"]
        _read_into(arrays, "priorities", parts[::-1] if meta["version"] == 1 else parts)
    else:  # as if all transitions were new
        for part in parts:
            part[:] = buffer.priorities.max_priority
    buffer.priorities.values = values.reshape(-1)


def _read_version_1(arrays: NpzFile, meta: dict[str, Any], buffer: LatentReplayBuffer, store: Store) -> None:
    """Files of sb3_seer 0.1.0: rows in the order of the ring, and older frames of the oldest row as its `tail`."""
    n_slots, n = len(store.ring), buffer.n_valid
    store.newest, store.size = (buffer.pos - 1) % n_slots, n
    views = _views(buffer, store)
    del views["pending"]
    for name, parts in views.items():
        _read_into(arrays, NAMES_OF_VERSION_1.get(name, name.replace("vector_obs/", "others/")), parts[::-1])
    for name, extra in _extras(store).items():
        for (row, env), value in _read_extra(arrays, NAMES_OF_VERSION_1[name], store).items():
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
        if value != own:
            raise ValueError(f"`{name}` of the replay buffer in {path} must be {own}, as in this model, got {value}")


def _from_sb3_pickle(file: io.BufferedIOBase, path: str, make_buffer: MakeBuffer, verbose: int) -> LatentReplayBuffer:
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
    saved = {name: describe(getattr(theirs, name)) for name in SPACES}
    _check_same(path, make_buffer(buffer_size=1), {**saved, "n_envs": theirs.n_envs})
    n_rows, timeouts = theirs.buffer_size, theirs.handle_timeout_termination
    buffer = make_buffer(buffer_size=n_rows * theirs.n_envs, handle_timeout_termination=timeouts)
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

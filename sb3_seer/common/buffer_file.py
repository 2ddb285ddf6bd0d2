"""A replay buffer as a file: what is written, and how it is read back."""

import io
import pathlib
import pickle
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.save_util import load_from_pkl
from tqdm import tqdm

from sb3_seer.common.archive import Archive, write_archive
from sb3_seer.common.codec import LatentCodec
from sb3_seer.common.replay import LatentReplayBuffer
from sb3_seer.common.saving import replacing
from sb3_seer.common.transitions import Asides
from sb3_seer.common.type_aliases import LatentEncoder, Observations

Path = str | pathlib.Path | io.BufferedIOBase
MakeBuffer = Callable[..., LatentReplayBuffer]
Arrays = dict[str, np.ndarray | list[np.ndarray]]

# Of a buffer, what the file says in its meta.json
META = ("n_envs", "n_stack", "handle_timeout_termination", "stage", "buffer_size", "pos", "n_valid", "n_clipped")
LATENTS_META = ("n_augmentations", "latent_dtype", "encoder_fingerprint")
SPACES = ("observation_space", "action_space")


def describe(space: spaces.Space) -> str:
    """
    :param space: an observation or action space
    :return: gymnasium's words for it, and a checksum of all its bounds, which these leave out if there are many
    """
    flat = spaces.flatten_space(space)
    bounds = flat.low.tobytes() + flat.high.tobytes() if isinstance(flat, spaces.Box) else b""
    return f"{space} #{zlib.crc32(bounds):08x}"


def save_buffer(buffer: LatentReplayBuffer, path: Path, verbose: int = 0) -> None:
    """
    Save the rows that are filled, in the order of the ring. A file at ``path`` is replaced once that is done.

    :param buffer: the replay buffer
    :param path: where to save, ".pkl" is appended to a path without a suffix (SB3's and RL Zoo's name for such a file)
    :param verbose: 2: warn if a file is overwritten
    """
    meta: dict[str, Any] = {name: getattr(buffer, name) for name in (*META, *LATENTS_META)}
    meta.update({name: describe(getattr(buffer, name)) for name in SPACES})
    meta["image_transitions"] = buffer.nbytes // buffer.layout.frame_bytes
    arrays: Arrays = {}
    if buffer.n_valid > 0:
        store: Any = buffer._store
        meta["store"] = {name: getattr(store, name) for name in store.NUMBERS}
        arrays.update({name: _ring(buffer, array) for name, array in _row_arrays(buffer).items()})
        arrays.update({name: np.asarray(getattr(store, name)) for name in store.ENV_ARRAYS})
        for name in store.ASIDES:
            arrays.update(_pack(name, getattr(store, name)))
        if buffer.priorities is not None:
            meta.update(alpha=buffer.priorities.alpha, max_priority=buffer.priorities.max_priority)
            arrays["priorities"] = _ring(buffer, buffer.priorities.values.reshape(-1, buffer.n_envs))
    if buffer.stage == "latents" and buffer.codec is not None and buffer.codec.scale is not None:
        assert buffer.codec.offset is not None
        arrays.update(codec_scale=buffer.codec.scale, codec_offset=buffer.codec.offset)
    with replacing(path, "pkl", verbose) as file:
        write_archive(file, meta, arrays)


def load_buffer(
    path: Path, like: LatentReplayBuffer, make_buffer: MakeBuffer, encoder: LatentEncoder, frozen: bool, verbose: int = 0
) -> LatentReplayBuffer:
    """
    :param path: of the file
    :param like: the buffer that the model has
    :param make_buffer: makes an empty one for the model, given ``buffer_size``, ``n_stack`` and
        ``handle_timeout_termination``. How to go on (n-step returns, augmentation, priorities...) is its to say
    :param encoder: of the model
    :param frozen: whether it is frozen
    :param verbose: Verbosity level
    :return: a buffer that goes on exactly as the saved one would have done; an empty one holds images
    :raises ValueError: if the file is damaged or no replay buffer, of other spaces or another number of envs, or if its
        latents are not those of the encoder; says which
    """
    with Archive(path, verbose) as archive:
        meta = archive.meta
        _check_same(archive.name, like, {name: meta[name] for name in (*SPACES, "n_envs")})
        _check_cap(archive.name, like, meta["image_transitions"])
        if meta["stage"] == "latents" and meta["n_valid"] > 0:
            _check_latents(archive.name, like, meta, encoder.encoder_fingerprint(), frozen)
        arguments = {name: meta[name] for name in ("n_stack", "handle_timeout_termination")}
        buffer = make_buffer(buffer_size=meta["image_transitions"], **arguments)
        buffer.set_encoder(encoder)
        if meta["n_valid"] > 0:
            if "codec_scale" in archive.names:
                codec = LatentCodec(buffer.latent_dtype, archive.read("codec_scale"), archive.read("codec_offset"))
                buffer.codec = codec
            for name in META:
                setattr(buffer, name, meta[name])
            buffer.full = buffer.n_valid == buffer.buffer_size
            _read_rows(archive, buffer)
    return buffer


def _read_rows(archive: Archive, buffer: LatentReplayBuffer) -> None:
    store: Any = buffer._allocate()
    for name, number in archive.meta["store"].items():
        setattr(store, name, number)
    for name, array in _row_arrays(buffer).items():
        archive.read_into(name, _ring(buffer, array))
    for name in store.ENV_ARRAYS:
        setattr(store, name, archive.read(name))
    for name in store.ASIDES:
        _unpack(archive, name, getattr(store, name))
    if buffer.priorities is not None:
        # Of a buffer that had none, or others, all transitions are new
        values = np.zeros((buffer.buffer_size, buffer.n_envs))
        for part in _ring(buffer, values):
            part[:] = buffer.priorities.max_priority
        if archive.meta.get("alpha") == buffer.priorities.alpha:
            buffer.priorities.max_priority = archive.meta["max_priority"]
            archive.read_into("priorities", _ring(buffer, values))
        buffer.priorities.values = values.reshape(-1)


def _row_arrays(buffer: LatentReplayBuffer) -> dict[str, np.ndarray]:
    """:return: all arrays of one entry a row"""
    names = ("actions", "rewards", "dones", "timeouts")
    return {
        **{name: getattr(buffer, name) for name in names},
        **{f"others/{key}": array for key, array in buffer.others.items()},
        **buffer._store.row_arrays(),  # type: ignore[union-attr]
    }


def _ring(buffer: LatentReplayBuffer, array: np.ndarray) -> list[np.ndarray]:
    """:return: the filled rows, without the gap that a ring which grew has at its write head"""
    return [array[: buffer.pos], array[buffer.pos + buffer.buffer_size - buffer.n_valid :]]


def _pack(name: str, asides: Asides) -> Arrays:
    values = [value for _, value in asides.items()]
    arrays: Arrays = {
        f"{name}/keys": np.array([key for key, _ in asides.items()], dtype=np.int64).reshape(-1, 2),
        f"{name}/lengths": np.array([len(value) for value in values], dtype=np.int64),
    }
    return {**arrays, f"{name}/values": values} if values else arrays


def _unpack(archive: Archive, name: str, asides: Asides) -> None:
    keys, lengths = archive.read(f"{name}/keys"), archive.read(f"{name}/lengths")
    if len(keys) == 0:
        return
    dtype, shape = archive.dtype(f"{name}/values"), archive.shape(f"{name}/values")[1:]
    values = [np.empty((length, *shape), dtype=dtype) for length in lengths.tolist()]
    archive.read_into(f"{name}/values", values)
    for (row, env), value in zip(keys.tolist(), values, strict=True):
        asides[row, env] = value


def _check_same(path: str, buffer: ReplayBuffer, theirs: dict[str, Any]) -> None:
    for name, value in theirs.items():
        ours = describe(getattr(buffer, name)) if name in SPACES else getattr(buffer, name)
        if value != ours:
            raise ValueError(f"The replay buffer in {path} has {name}={value}, this model has {ours}")


def _check_cap(path: str, buffer: LatentReplayBuffer, image_transitions: int) -> None:
    cap = buffer.max_latent_buffer_size
    if cap is not None and cap < image_transitions:
        raise ValueError(
            f"The replay buffer in {path} holds {image_transitions} transitions as images, more than the "
            f"max_latent_buffer_size={cap} of this model"
        )


def _check_latents(path: str, buffer: LatentReplayBuffer, meta: dict[str, Any], fingerprint: str, frozen: bool) -> None:
    if not frozen or meta["encoder_fingerprint"] != fingerprint:
        raise ValueError(
            f"The replay buffer in {path} holds latents of encoder {meta['encoder_fingerprint']}, "
            f"but the encoder of this model is {fingerprint if frozen else 'not frozen'}: "
            "load the model that was saved with the buffer"
        )
    _check_same(path, buffer, {name: meta[name] for name in ("n_augmentations", "latent_dtype")})


# ---- SB3's own buffers ----


def from_sb3_pickle(path: Path, like: LatentReplayBuffer, make_buffer: MakeBuffer, verbose: int = 0) -> LatentReplayBuffer:
    """
    :param path: of a pickle of SB3's ``ReplayBuffer``, ``DictReplayBuffer`` or ``NStepReplayBuffer``
    :param like: the buffer that the model has
    :param make_buffer: as for ``load_buffer``
    :param verbose: Verbosity level
    :return: a buffer of the same size with the same transitions, as images, oldest first
    :raises ValueError: if it is none of these, or of other spaces or another number of envs
    """
    try:
        theirs = load_from_pkl(path, verbose)
    except (pickle.UnpicklingError, EOFError, LookupError, ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is neither a replay buffer of sb3_seer nor a pickle of one of SB3's ({error!r})") from error
    if type(theirs) not in (ReplayBuffer, DictReplayBuffer, NStepReplayBuffer):
        raise ValueError(
            f"{path} holds a {type(theirs).__name__}: allowed are what save_replay_buffer() of a SEER algorithm wrote, "
            "and pickles of SB3's ReplayBuffer, DictReplayBuffer and NStepReplayBuffer"
        )
    n_transitions, timeouts = theirs.buffer_size * theirs.n_envs, theirs.handle_timeout_termination
    _check_same(str(path), like, {name: describe(getattr(theirs, name)) for name in SPACES} | dict(n_envs=theirs.n_envs))
    _check_cap(str(path), like, n_transitions)
    buffer = make_buffer(buffer_size=n_transitions, handle_timeout_termination=timeouts)
    rows = np.arange(theirs.size()) + (theirs.pos if theirs.full else 0)
    if theirs.full and theirs.optimize_memory_usage:
        rows = rows[1:]  # the oldest observation was overwritten by the newest next one
    for row in tqdm(rows % theirs.buffer_size, desc="transitions", delay=2):
        if theirs.optimize_memory_usage:
            next_obs = _at(theirs.observations, (row + 1) % theirs.buffer_size)
        else:
            next_obs = _at(theirs.next_observations, row)
        infos = [{"TimeLimit.truncated": bool(timeout)} for timeout in theirs.timeouts[row]]
        step = theirs.actions[row], theirs.rewards[row], theirs.dones[row]
        buffer.add(_at(theirs.observations, row), next_obs, *step, infos)
    return buffer


def _at(observations: Observations, row: int) -> Observations:
    if isinstance(observations, dict):
        return {key: part[row] for key, part in observations.items()}
    return observations[row]

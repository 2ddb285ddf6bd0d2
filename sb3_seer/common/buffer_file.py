"""A replay buffer as a file: what is written, and how it is read back."""

import io
import pathlib
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
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
Arrays = dict[str, np.ndarray | list[np.ndarray]]

# Of a buffer, what the file says in its meta.json; what a space is, it says in gymnasium's words
META = ("n_envs", "n_stack", "handle_timeout_termination", "stage", "buffer_size", "pos", "n_valid", "n_clipped")
LATENTS_META = ("n_augmentations", "latent_dtype", "encoder_fingerprint")
SPACES = ("observation_space", "action_space")


def save_buffer(buffer: LatentReplayBuffer, path: Path, verbose: int = 0) -> None:
    """
    Save the rows that are filled, in the order of the ring. A file at ``path`` is replaced once that is done.

    :param buffer: the replay buffer
    :param path: where to save, ".pkl" is appended to a path without a suffix (SB3's and RL Zoo's name for such a file)
    :param verbose: 2: warn if a file is overwritten
    """
    meta: dict[str, Any] = {name: getattr(buffer, name) for name in (*META, *LATENTS_META)}
    meta.update({name: str(getattr(buffer, name)) for name in SPACES})
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
            meta["max_priority"] = buffer.priorities.max_priority
            arrays["priorities"] = _ring(buffer, buffer.priorities.values.reshape(-1, buffer.n_envs))
    if buffer.stage == "latents" and buffer.codec is not None and buffer.codec.scale is not None:
        assert buffer.codec.offset is not None
        arrays.update(codec_scale=buffer.codec.scale, codec_offset=buffer.codec.offset)
    with replacing(path, "pkl", verbose) as file:
        write_archive(file, meta, arrays)


def load_buffer(
    path: Path, make_buffer: Callable[..., LatentReplayBuffer], encoder: LatentEncoder, frozen: bool, verbose: int = 0
) -> LatentReplayBuffer:
    """
    :param path: of the file
    :param make_buffer: makes an empty buffer, given ``buffer_size``, ``n_stack`` and ``handle_timeout_termination``.
        How to go on (n-step returns, augmentation, priorities...) is its to say
    :param encoder: of the model
    :param frozen: whether it is frozen
    :param verbose: Verbosity level
    :return: a buffer that goes on exactly as the saved one would have done
    :raises ValueError: if the file is damaged or no replay buffer, of other spaces or another number of envs, or if its
        latents are not those of the encoder; says which
    """
    with Archive(path, verbose) as archive:
        meta = archive.meta
        arguments = {name: meta[name] for name in ("n_stack", "handle_timeout_termination")}
        buffer = make_buffer(buffer_size=meta["image_transitions"], **arguments)
        _check_same(archive.name, buffer, {name: meta[name] for name in (*SPACES, "n_envs")})
        buffer.set_encoder(encoder)
        if meta["stage"] == "latents":
            _check_latents(archive.name, buffer, meta, encoder.encoder_fingerprint(), frozen)
            if "codec_scale" in archive.names:
                codec = LatentCodec(buffer.latent_dtype, archive.read("codec_scale"), archive.read("codec_offset"))
                buffer.codec = codec
        for name in META:
            setattr(buffer, name, meta[name])
        buffer.full = buffer.n_valid == buffer.buffer_size
        if buffer.n_valid > 0:
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
        # Of a buffer that had none, all transitions are new
        values = np.zeros((buffer.buffer_size, buffer.n_envs))
        for part in _ring(buffer, values):
            part[:] = buffer.priorities.max_priority
        if "priorities" in archive.names:
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
        ours = getattr(buffer, name)
        if str(value) != str(ours):
            raise ValueError(f"The replay buffer in {path} has {name}={value}, this model has {ours}")


def _check_latents(path: str, buffer: LatentReplayBuffer, meta: dict[str, Any], fingerprint: str, frozen: bool) -> None:
    if not frozen or (meta["n_valid"] > 0 and meta["encoder_fingerprint"] != fingerprint):
        raise ValueError(
            f"The replay buffer in {path} holds latents of encoder {meta['encoder_fingerprint']}, "
            f"but the encoder of this model is {fingerprint if frozen else 'not frozen'}: "
            "load the model that was saved with the buffer"
        )
    _check_same(path, buffer, {name: meta[name] for name in ("n_augmentations", "latent_dtype")})


# ---- SB3's own buffers ----


def from_sb3_pickle(path: Path, make_buffer: Callable[..., LatentReplayBuffer], verbose: int = 0) -> LatentReplayBuffer:
    """
    :param path: of a pickle of SB3's ``ReplayBuffer``, ``DictReplayBuffer`` or ``NStepReplayBuffer``
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
    timeouts = theirs.handle_timeout_termination
    buffer = make_buffer(buffer_size=theirs.buffer_size * theirs.n_envs, handle_timeout_termination=timeouts)
    _check_same(str(path), buffer, {name: getattr(theirs, name) for name in (*SPACES, "n_envs")})
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

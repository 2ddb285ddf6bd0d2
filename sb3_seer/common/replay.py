"""The replay buffer that stores images until the encoder is frozen, and latents from then on."""

import warnings
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn
from tqdm import tqdm

from sb3_seer.common.codec import LatentCodec
from sb3_seer.common.encoding import MAX_ENCODER_INPUTS, ImageEncoding
from sb3_seer.common.memory import LATENT_DTYPES, MemoryPlan
from sb3_seer.common.storage import ImageStore, LatentStore
from sb3_seer.common.type_aliases import Latents

try:
    # Check memory used by replay buffer when possible
    import psutil
except ImportError:
    psutil = None  # type: ignore[assignment]

# Observations that the range of uint8 latents is fitted on
MAX_FIT_OBSERVATIONS = 1024


class LatentReplayBuffer(ImageEncoding, ReplayBuffer):
    """
    Replay buffer that holds images until ``to_latents()`` is called, and K * N latents an observation
    from then on, in the same bytes: see section 4 of the SEER paper (Chen et al., 2021).

    What is sampled is what SB3's ``ReplayBuffer`` (``NStepReplayBuffer`` when ``n_steps > 1``) would
    sample with the same random numbers. Differences: an observation, and a frame of a stack, is stored
    once; memory is allocated by the first ``add()``; an n-step window also ends where an episode
    was left without being done (a reset in the middle), and bootstraps there.

    :param buffer_size: transitions held while images are stored, over all the envs (C)
    :param observation_space: a ``Box`` of channels-first images
    :param action_space: Action space
    :param device: PyTorch device
    :param n_envs: Number of parallel environments
    :param optimize_memory_usage: accepted for SB3's sake, changes nothing: an observation is always stored once
    :param handle_timeout_termination: as in SB3, and never in conflict with ``optimize_memory_usage``
        (https://github.com/DLR-RM/stable-baselines3/issues/934)
    :param n_steps: steps of the n-step returns
    :param gamma: discount factor of the n-step returns
    :param n_stack: frames stacked along the channels, the newest last
    :param n_augmentations: augmented copies of an observation in the latents stage (K)
    :param augmentation: maps images of shape ``(batch_size, C, H, W)`` to ``(batch_size, C, h, w)``, same dtype
    :param latent_dtype: of the stored latents: "float32", "float16" or "uint8"
    :param max_latent_buffer_size: most transitions held in the latents stage, over all the envs; None: as many as fit
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: th.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        handle_timeout_termination: bool = True,
        n_steps: int = 1,
        gamma: float = 0.99,
        n_stack: int = 1,
        n_augmentations: int = 1,
        augmentation: nn.Module | None = None,
        latent_dtype: str = "float32",
        max_latent_buffer_size: int | None = None,
    ):
        # The arrays of ReplayBuffer are not wanted: skip its constructor
        super(ReplayBuffer, self).__init__(buffer_size, observation_space, action_space, device, n_envs=n_envs)
        if isinstance(observation_space, spaces.Dict):
            raise ValueError("observation_space: Dict observations are not supported yet, only a Box of images")
        if not isinstance(observation_space, spaces.Box) or len(observation_space.shape) != 3:
            raise ValueError(f"observation_space: {observation_space} was given, allowed is a Box of images (3 dimensions)")
        for name, value in dict(n_augmentations=n_augmentations, n_steps=n_steps, n_stack=n_stack).items():
            if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: {value!r} was given, allowed are integers from 1")
        if n_augmentations > 1 and augmentation is None:
            raise ValueError(f"n_augmentations: {n_augmentations} was given, only 1 is allowed without an augmentation")
        if latent_dtype not in LATENT_DTYPES:
            raise ValueError(f"latent_dtype: {latent_dtype!r} was given, allowed are {', '.join(map(repr, LATENT_DTYPES))}")
        n_channels = observation_space.shape[0]
        if n_channels % n_stack != 0:
            raise ValueError(f"n_stack: {n_stack} was given, allowed are divisors of the {n_channels} channels")
        if max_latent_buffer_size is not None and (
            not isinstance(max_latent_buffer_size, (int, np.integer)) or max_latent_buffer_size < buffer_size
        ):
            raise ValueError(
                f"max_latent_buffer_size: {max_latent_buffer_size!r} was given, "
                f"allowed are None and integers from buffer_size={buffer_size}"
            )
        self.optimize_memory_usage = optimize_memory_usage
        self.handle_timeout_termination = handle_timeout_termination
        self.n_steps, self.gamma, self.n_stack = n_steps, gamma, n_stack
        self.n_augmentations, self.augmentation = n_augmentations, augmentation
        self.latent_dtype, self.max_latent_buffer_size = latent_dtype, max_latent_buffer_size
        self.codec = None if latent_dtype == "uint8" else LatentCodec(latent_dtype)

        self.buffer_size = max(buffer_size // n_envs, 1)
        self.stage = "images"
        self.n_valid = 0  # rows that hold transitions
        self.encoder_fingerprint: str | None = None
        # The new observations to act on and their float32 latents, from the encoder call of the last add()
        self.acting: tuple[np.ndarray, th.Tensor] | None = None
        self._store: ImageStore | LatentStore | None = None
        self._image_dtype = np.dtype(observation_space.dtype)
        self._frame_bytes = int(np.prod(observation_space.shape)) * self._image_dtype.itemsize // n_stack
        self.nbytes = self.buffer_size * n_envs * self._frame_bytes
        self._warn_if_too_large()

    # ---- what it takes and what it holds ----

    def plan(self) -> MemoryPlan:
        """
        :return: bytes and transitions of both stages
        """
        n_networks, latent_dim = self._known_latent_shape()
        return MemoryPlan(
            image_transitions=self.nbytes // self._frame_bytes,
            n_envs=self.n_envs,
            frame_bytes=self._frame_bytes,
            number_bytes=np.dtype(self.latent_dtype).itemsize,
            n_networks=n_networks,
            n_augmentations=self.n_augmentations,
            latent_dim=latent_dim,
            max_latent_transitions=self.max_latent_buffer_size,
        )

    def check_capacity(self) -> None:
        """
        :raises ValueError: if the latents of an observation take more bytes than its newest frame
        """
        self.plan().check_capacity()

    def size(self) -> int:
        """
        :return: rows that hold transitions
        """
        return self.n_valid

    def reset(self) -> None:
        """Forget every transition; the stage stays."""
        super().reset()
        self.n_valid = self.n_clipped = 0
        self.acting = None
        if self._store is not None:
            self._store.clear()

    def __getstate__(self) -> dict[str, Any]:
        # The encoder is the policy's, and `acting` lives on its device
        return {**self.__dict__, "_encoder": None, "acting": None}

    # ---- storing ----

    def add(
        self,
        obs: np.ndarray,
        next_obs: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """
        Store a step of every env; in the latents stage with one call of the encoder.

        :param obs: observations, shape ``(n_envs, *obs_shape)``
        :param next_obs: next observations, the last ones of an episode where it ended
        :param action: actions
        :param reward: rewards, shape ``(n_envs,)``
        :param done: episode ends, shape ``(n_envs,)``
        :param infos: ``infos[e]["TimeLimit.truncated"]`` as in SB3; ``infos[e]["reset_observation"]``:
            where an episode ended, the first observation of the next one, if known
        """
        obs, next_obs = self._to_bytes(obs), self._to_bytes(next_obs)
        done = np.asarray(done).reshape(self.n_envs).astype(bool)
        # What is expected to come next: after an episode's end, the first observation of another
        pending = next_obs.copy()
        resets = [int(e) for e in done.nonzero()[0] if infos[e].get("reset_observation") is not None]
        for e in resets:
            pending[e] = self._to_bytes(infos[e]["reset_observation"], n_envs=1)[0]
        store = self._allocate()
        continues = store.continues(obs)
        if isinstance(store, LatentStore):
            latents, next_latents, pending_latents = self._encode_step(store, obs, next_obs, pending, continues, resets)

        row = self.pos
        if self.full:
            store.evict(row)
        # Rows held besides this one: in a ring of one row there are none
        others = self.n_valid - self.full
        if others > 0:
            store.link(row, continues)
        if isinstance(store, LatentStore):
            store.add(row, latents, next_latents, pending, pending_latents, done)
        else:
            store.add(row, continues & (others > 0), obs, next_obs, pending, done)

        self.actions[row] = np.asarray(action).reshape(self.n_envs, self.action_dim)
        self.rewards[row] = reward
        self.dones[row] = done
        if self.handle_timeout_termination:
            self.timeouts[row] = [info.get("TimeLimit.truncated", False) for info in infos]
        self.n_valid = others + 1
        self.pos = (row + 1) % self.buffer_size
        self.full = self.n_valid == self.buffer_size

    def _allocate(self) -> ImageStore | LatentStore:
        """Memory is taken by the first add(), so that a model loaded to predict takes none."""
        if self._store is None:
            try:
                arena = np.zeros(self.nbytes, dtype=np.uint8)
            except MemoryError as error:
                raise MemoryError(
                    f"The memory does not hold buffer_size={self.nbytes // self._frame_bytes:,} images, which take "
                    f"{self.nbytes / 1e9:.1f} GB: give a smaller buffer_size (SB3's default is 1,000,000)"
                ) from error
            if self.stage == "images":
                self._store = ImageStore(arena, self.buffer_size, self.n_envs, self.n_stack)
            else:
                self._store = self._latent_store(arena, self.buffer_size)
            shape = (self.buffer_size, self.n_envs)
            self.actions = np.zeros((*shape, self.action_dim), dtype=self._maybe_cast_dtype(self.action_space.dtype))
            self.rewards = np.zeros(shape, dtype=np.float32)
            self.dones = np.zeros(shape, dtype=np.float32)
            self.timeouts = np.zeros(shape, dtype=np.float32)
        return self._store

    def _encode_step(
        self,
        store: LatentStore,
        obs: np.ndarray,
        next_obs: np.ndarray,
        pending: np.ndarray,
        continues: np.ndarray,
        resets: list[int],
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        Encode all that is new in a step, in one call, and keep the latents to act on.

        :return: stored latents of ``obs``, ``next_obs`` and ``pending``, each of shape ``(n_envs, K, N, L)``
        """
        unexpected = (~continues).nonzero()[0]
        images = np.concatenate((next_obs, pending[resets], obs[unexpected]))
        inputs = self._network_inputs(images)
        n_inputs = len(inputs)  # len(images) * K
        if self.augmentation is not None:
            inputs = th.cat((inputs, self._center_crop(self._to_images(pending)).to(inputs.dtype)))
        encoded = self._encoder_or_raise().encode(inputs)
        fresh = self._to_stored(encoded[:n_inputs].cpu().numpy().reshape(len(images), *store.shape))

        next_latents = fresh[: self.n_envs]
        pending_latents = next_latents.copy()
        pending_latents[resets] = fresh[self.n_envs : self.n_envs + len(resets)]
        latents = store.pending_latents.copy()
        latents[unexpected] = fresh[self.n_envs + len(resets) :]
        if self.augmentation is None:
            order = np.arange(self.n_envs)
            order[resets] = self.n_envs + np.arange(len(resets))
            acting = encoded[th.as_tensor(order, device=encoded.device)]
        else:
            acting = encoded[n_inputs:]
        self._set_acting(pending, acting)
        return latents, next_latents, pending_latents

    # ---- the switch of stage ----

    def to_latents(self) -> None:
        """
        Turn every stored image into latents, in place, and let the buffer grow to what fits in the same bytes.

        :raises ValueError: if latents are larger than images, or if ``latent_dtype="uint8"`` has nothing to be fitted on
        """
        if self.stage == "latents":
            return
        self.check_capacity()
        images = self._store if self.n_valid > 0 else None
        assert not isinstance(images, LatentStore)
        if self.codec is None:
            if images is None:
                raise ValueError(
                    'latent_dtype: "uint8" needs stored observations to fit its range on, and the buffer is empty: '
                    "set the attribute codec (a LatentCodec), or use another latent_dtype"
                )
            self.codec = self._fit_codec(images)
        elif self.codec.scale is not None and self.codec.scale.shape != self._known_latent_shape():
            raise ValueError(
                f"codec: its scale has shape {self.codec.scale.shape}, allowed is {self._known_latent_shape()} (N, L)"
            )
        rows = self.plan().latent_transitions // self.n_envs
        if images is None:
            self._store = None  # allocated anew, if ever needed
            self.pos = 0
        else:
            # Once the ring has wrapped, the older rows are those from pos on: they move to its end, so that
            # it opens at the write head. In a ring that is just full, it is the write head that moves.
            self.pos = (self.pos or self.n_valid) % rows
            try:
                self._store = self._convert(images, rows)
            except BaseException:
                self.reset()  # rather empty than half images, half latents
                raise
            for name in ("actions", "rewards", "dones", "timeouts"):
                setattr(self, name, self._moved(getattr(self, name), rows))
        self.buffer_size, self.full = rows, self.n_valid == rows
        self.stage = "latents"

    def _convert(self, images: ImageStore, rows: int) -> LatentStore:
        """Write the latents of every row over its images, then open the ring at the write head."""
        latents = self._latent_store(images.arena, rows)
        gap = rows - self.n_valid
        chunk = max(MAX_ENCODER_INPUTS // (self.n_augmentations * self.n_envs), 1)
        bar = tqdm(total=self.n_valid * self.n_envs, desc="images to latents", delay=2)
        for first, stacks, keys, successors in images.drain(self.n_valid, chunk):
            encoded = self._encode(stacks.reshape(-1, *stacks.shape[2:]))
            # This chunk was copied, and a record is no larger than a frame: no image still to come is overwritten
            latents.records[first : first + len(stacks)] = encoded.reshape(len(stacks), self.n_envs, *latents.shape)
            for (row, env), successor in zip(keys, self._encode(successors), strict=True):
                latents.successor[row + gap if row >= self.pos else row, env] = successor
            bar.update(len(encoded))
        bar.close()
        latents.move_to_end(self.pos, self.n_valid)
        latents.linked, latents.open = self._moved(images.linked, rows), images.open
        assert images.pending is not None
        latents.pending, latents.pending_latents = images.pending, self._encode(images.pending)
        acting = self._encoder_or_raise().encode(self._center_crop(self._to_images(images.pending)))
        self._set_acting(images.pending, acting)
        return latents

    def _moved(self, array: np.ndarray, rows: int) -> np.ndarray:
        """:return: an array of one entry a row, with its rows where they are in a ring of that many rows"""
        moved = np.zeros((rows, *array.shape[1:]), dtype=array.dtype)
        moved[: self.pos] = array[: self.pos]
        moved[self.pos + rows - self.n_valid :] = array[self.pos : self.n_valid]
        return moved

    def _fit_codec(self, images: ImageStore) -> LatentCodec:
        total = self.n_valid * self.n_envs
        picks = np.linspace(0, total - 1, min(total, MAX_FIT_OBSERVATIONS)).astype(int)
        latents = []
        for some in np.array_split(picks, -(-len(picks) // MAX_ENCODER_INPUTS)):
            inputs = self._network_inputs(images.observations(some // self.n_envs, some % self.n_envs), n_copies=1)
            latents.append(self._encoder_or_raise().encode(inputs).cpu().numpy())
        return LatentCodec.fit(np.concatenate(latents))

    # ---- sampling ----

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> ReplayBufferSamples:
        """
        :param batch_size: Number of element to sample
        :param env: associated VecEnv, to normalize the rewards (never the observations)
        :return: images, or in the latents stage ``Latents``, with the rest as in SB3
        """
        batch_inds = np.random.randint(0, self.n_valid, size=batch_size)
        # A ring that grew has its gap at the write head
        batch_inds = np.where(batch_inds < self.pos, batch_inds, batch_inds + self.buffer_size - self.n_valid)
        return self._get_samples(batch_inds, env=env)

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> ReplayBufferSamples:
        """
        :param batch_inds: rows of the ring, shape ``(batch_size,)``
        :param env: associated VecEnv
        :return: a random env's transition in each of these rows
        """
        env_indices = np.random.randint(0, high=self.n_envs, size=(len(batch_inds),))
        rewards, last_inds, discounts = self._n_step(batch_inds, env_indices, env)
        obs, next_obs = self._observations(batch_inds, last_inds, env_indices)
        # Only use dones that are not due to timeouts
        dones = self.dones[last_inds, env_indices] * (1 - self.timeouts[last_inds, env_indices])
        return ReplayBufferSamples(
            observations=obs,  # type: ignore[arg-type]
            actions=self.to_torch(self.actions[batch_inds, env_indices]),
            next_observations=next_obs,  # type: ignore[arg-type]
            dones=self.to_torch(dones.reshape(-1, 1)),
            rewards=self.to_torch(rewards),
            discounts=None if discounts is None else self.to_torch(discounts),
        )

    def _n_step(
        self, rows: np.ndarray, envs: np.ndarray, env: VecNormalize | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """
        The n-step returns of SB3's ``NStepReplayBuffer``.

        :return: returns, shape ``(batch_size, 1)``; the row where each ends, shape ``(batch_size,)``; the discounts of
            the values that they bootstrap from, shape ``(batch_size, 1)``, None if one step
        """
        if self.n_steps == 1:
            return self._normalize_reward(self.rewards[rows, envs].reshape(-1, 1), env), rows, None
        assert self._store is not None
        indices = (rows[:, None] + np.arange(self.n_steps)) % self.buffer_size  # [batch_size, n_steps]
        rewards = self._normalize_reward(self.rewards[indices, envs[:, None]], env)  # [batch_size, n_steps]
        # A row that no row continues ends an episode, was left by a reset in the middle, or is the newest
        ends = (self.timeouts[indices, envs[:, None]] > 0) | ~self._store.linked[indices, envs[:, None]]
        last = np.where(ends.any(axis=1), ends.argmax(axis=1), self.n_steps - 1)  # [batch_size]
        mask = np.arange(self.n_steps) <= last[:, None]  # [batch_size, n_steps]
        returns = (rewards * self.gamma ** np.arange(self.n_steps, dtype=np.float32) * mask).sum(axis=1, keepdims=True)
        # gamma ** n_steps, or less where the window is cut short
        discounts = self.gamma ** mask.sum(axis=1, keepdims=True).astype(np.float32)
        return returns, (rows + last) % self.buffer_size, discounts

    def _observations(
        self, rows: np.ndarray, last_rows: np.ndarray, envs: np.ndarray
    ) -> tuple[th.Tensor, th.Tensor] | tuple[Latents, Latents]:
        """:return: the observations of ``rows`` and the next observations of ``last_rows``"""
        store = self._store
        if isinstance(store, LatentStore):
            assert self.codec is not None
            # The same copy for both, as in the authors' code
            copies = np.zeros(len(rows), dtype=int)
            if self.n_augmentations > 1:
                copies = np.random.randint(0, self.n_augmentations, size=len(rows))
            stored = store.latents(rows, envs, copies), store.next_latents(last_rows, envs, copies)  # [batch_size, N, L]
            obs, next_obs = (Latents(self.to_torch(self.codec.decode(latents), copy=False)) for latents in stored)
            return obs, next_obs
        assert store is not None
        images = self._to_images(store.observations(rows, envs)), self._to_images(store.next_observations(last_rows, envs))
        if self.augmentation is None:
            return images
        with th.no_grad():
            return self.augmentation(images[0]), self.augmentation(images[1])

    def _set_acting(self, pending: np.ndarray, latents: th.Tensor) -> None:
        observations = pending.view(self._image_dtype).reshape(self.n_envs, *self.obs_shape)
        self.acting = observations.copy(), latents

    def _latent_store(self, arena: np.ndarray, rows: int) -> LatentStore:
        # Not known any earlier: the weights of a model that is loaded come after its (empty) buffer
        self.encoder_fingerprint = self._encoder_or_raise().encoder_fingerprint()
        return LatentStore(arena, rows, self.n_envs, self.latent_dtype, (self.n_augmentations, *self._known_latent_shape()))

    def _warn_if_too_large(self) -> None:
        number_bytes = np.dtype(self._maybe_cast_dtype(self.action_space.dtype)).itemsize
        total = self.nbytes + self.buffer_size * self.n_envs * (self.action_dim * number_bytes + 3 * 4)
        available = psutil.virtual_memory().available if psutil is not None else total
        if total > available:
            warnings.warn(
                "This system does not have apparently enough memory to store the complete "
                f"replay buffer {total / 1e9:.2f}GB > {available / 1e9:.2f}GB",
                stacklevel=3,
            )

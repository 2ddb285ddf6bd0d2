"""The replay buffer that stores images until the encoder is frozen, and latents from then on."""

import warnings
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from torch import nn

from sb3_seer.common.codec import LatentCodec
from sb3_seer.common.layout import ImageLayout, image_spaces
from sb3_seer.common.memory import LATENT_DTYPES
from sb3_seer.common.priorities import Priorities
from sb3_seer.common.storage import ImageStore, LatentStore
from sb3_seer.common.switch import StageSwitch
from sb3_seer.common.type_aliases import Observations


class LatentReplayBuffer(StageSwitch):
    """
    Replay buffer that holds images until ``to_latents()`` is called, and K * N latents an observation
    from then on, in the same bytes: see section 4 of the SEER paper (Chen et al., 2021).

    What is sampled is what SB3's ``ReplayBuffer`` (``NStepReplayBuffer`` when ``n_steps > 1``, ``DictReplayBuffer``
    for a ``Dict``) would sample with the same random numbers. Differences: an observation, and a frame of a stack, is
    stored once; memory is allocated by the first ``add()``; an n-step window also ends where an episode was left
    without being done (a reset in the middle), and bootstraps there.

    Of ``Dict`` observations, the images become latents; the other keys stay as they are, float64 as float32.

    :param buffer_size: transitions held while images are stored, over all the envs (C)
    :param observation_space: a ``Box`` of channels-first images, or a ``Dict`` with some
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
    :param prioritized: sample in proportion to the errors of the transitions (Schaul et al. 2016), with weights
    :param alpha: how much the errors count, from 0 (not at all) to 1
    :param beta: how much the weights correct for that when training starts, from 0 (not at all) to 1
    :param final_beta: how much they do when it ends; linear in between
    :param sample_positives: sample ``ContrastiveReplayBufferSamples``
    :raises ValueError: for a parameter outside of what is said here
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
        prioritized: bool = False,
        alpha: float = 0.6,
        beta: float = 0.4,
        final_beta: float = 1.0,
        sample_positives: bool = False,
    ):
        # The arrays of ReplayBuffer are not wanted: skip its constructor
        super(ReplayBuffer, self).__init__(buffer_size, observation_space, action_space, device, n_envs=n_envs)
        images = image_spaces(observation_space)
        if not images:
            raise ValueError(
                f"observation_space: {observation_space} was given, "
                "allowed is a Box of images (3 dimensions), or a Dict with some"
            )
        counts = dict(
            buffer_size=buffer_size, n_envs=n_envs, n_steps=n_steps, n_stack=n_stack, n_augmentations=n_augmentations
        )
        for name, value in counts.items():
            if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: {value!r} was given, allowed are integers from 1")
        if n_augmentations > 1 and augmentation is None:
            raise ValueError(f"n_augmentations: {n_augmentations} was given, only 1 is allowed without an augmentation")
        if latent_dtype not in LATENT_DTYPES:
            raise ValueError(f"latent_dtype: {latent_dtype!r} was given, allowed are {', '.join(map(repr, LATENT_DTYPES))}")
        for box in images.values():
            if box.shape[0] % n_stack != 0:
                raise ValueError(f"n_stack: {n_stack} was given, allowed are divisors of the {box.shape[0]} channels")
        if max_latent_buffer_size is not None and (
            not isinstance(max_latent_buffer_size, (int, np.integer)) or max_latent_buffer_size < buffer_size
        ):
            raise ValueError(
                f"max_latent_buffer_size: {max_latent_buffer_size!r} was given, "
                f"allowed are None and integers from buffer_size={buffer_size}"
            )
        self._set_betas(beta, final_beta)
        self.optimize_memory_usage = optimize_memory_usage
        self.handle_timeout_termination = handle_timeout_termination
        # Integers of numpy are none to JSON
        self.n_envs, self.n_steps, self.n_stack, self.gamma = int(n_envs), int(n_steps), int(n_stack), gamma
        self.n_augmentations, self.augmentation = int(n_augmentations), augmentation
        self.latent_dtype, self.max_latent_buffer_size = latent_dtype, max_latent_buffer_size
        self.prioritized = prioritized
        self.sample_positives = sample_positives
        # As large as the buffer once that has memory
        self.priorities = Priorities(1, alpha) if prioritized else None
        self.codec = None if latent_dtype == "uint8" else LatentCodec(latent_dtype)

        self.buffer_size = max(int(buffer_size) // self.n_envs, 1)
        self.stage = "images"
        self.n_valid = 0  # rows that hold transitions
        self.encoder_fingerprint: str | None = None
        self.layout = ImageLayout(observation_space, self.n_stack)
        # What is no image, by key: of the observation and of the next one, shape (rows, n_envs, 2, *obs_shape)
        self.others: dict[str, np.ndarray] = {}
        self._store: ImageStore | LatentStore | None = None
        self.nbytes = self.buffer_size * self.n_envs * self.layout.frame_bytes

    # ---- what it takes and what it holds ----

    def size(self) -> int:
        """
        :return: rows that hold transitions
        """
        return self.n_valid

    @property
    def aside_bytes(self) -> int:
        """Bytes of the few frames and latents that are kept aside, at the ends of episodes."""
        return 0 if self._store is None else self._store.aside_bytes()

    def check_asides(self) -> None:
        """Warn if what is kept aside is no longer little: the stacks do not move on frame by frame."""
        held = self.n_valid * self.n_envs * self.layout.frame_bytes
        if self.stage == "images" and self.n_stack > 1 and self.aside_bytes > max(held, self.nbytes // 10) / 2:
            warnings.warn(
                "The replay buffer takes at least half as much memory again as was announced: the observations do not move "
                f"on by one of {self.n_stack} stacked frames in a step. To store each as it is, give "
                "replay_buffer_kwargs=dict(n_stack=1)",
                stacklevel=2,
            )

    def reset(self) -> None:
        """Forget every transition; the stage stays."""
        super().reset()
        self.n_valid = self.n_clipped = 0
        self.acting = None
        self._store = None  # allocated anew by the next add()
        if self.priorities is not None:
            self.priorities.clear()

    def __getstate__(self) -> dict[str, Any]:
        # The encoder is the policy's, and `acting` lives on its device
        return {**self.__dict__, "_encoder": None, "acting": None}

    # ---- storing ----

    def add(
        self,
        obs: Observations,
        next_obs: Observations,
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
        store = self._allocate()
        # As they are: to sort the bytes of an image would take longer than to store it
        read = self.layout.in_memory
        images, next_images = read(obs), read(next_obs)
        ended = np.asarray(done).reshape(self.n_envs).tolist()
        # After an episode's end, what is expected to come next is the first observation of another
        resets = {
            env: read(infos[env]["reset_observation"])[0]
            for env in range(self.n_envs)
            if ended[env] and infos[env].get("reset_observation") is not None
        }
        continues = store.continues(images)
        if self.others and self.n_valid > 0:
            # A reset in the middle may show in a key that is no image, and in no other
            for key, array in self.others.items():
                parts = np.asarray(obs[key]).reshape(self.n_envs, *array.shape[3:]).astype(array.dtype)
                for env in np.flatnonzero(store.open):
                    continues[env] &= parts[env].tobytes() == array[self.pos - 1, env, 1].tobytes()
        if not isinstance(store, ImageStore):
            encoded = self._encode_step(store, images, next_images, continues, resets)

        row = self.pos
        if self.full:
            store.evict(row)
        # Rows held besides this one: in a ring of one row there are none
        n_others = self.n_valid - self.full
        if n_others > 0:
            store.link(row, continues)
        if isinstance(store, ImageStore):
            store.add(row, continues if n_others > 0 else [False] * self.n_envs, images, next_images, resets, ended)
        else:
            store.add(row, *encoded, ended)

        self.actions[row] = np.asarray(action).reshape(self.n_envs, self.action_dim)
        self.rewards[row] = reward
        self.dones[row] = ended
        if self.handle_timeout_termination:
            self.timeouts[row] = [info.get("TimeLimit.truncated", False) for info in infos]
        for key, array in self.others.items():
            for i, observations in enumerate((obs, next_obs)):
                array[row, :, i] = np.asarray(observations[key]).reshape(self.n_envs, *array.shape[3:])
        if self.priorities is not None:
            self.priorities.add(np.arange(row * self.n_envs, (row + 1) * self.n_envs))
        self.n_valid = n_others + 1
        self.pos = (row + 1) % self.buffer_size
        self.full = self.n_valid == self.buffer_size

    def _allocate(self) -> ImageStore | LatentStore:
        """Memory is taken by the first add(), so that a model loaded to predict takes none."""
        if self._store is None:
            try:
                arena = np.zeros(self.nbytes, dtype=np.uint8)
            except MemoryError as error:
                raise MemoryError(
                    f"The memory does not hold buffer_size={self.nbytes // self.layout.frame_bytes:,} images, which take "
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
            self.others = {
                key: np.zeros((*shape, 2, *self.obs_shape[key]), dtype=self._maybe_cast_dtype(space.dtype))
                for key, space in self.layout.others.items()
            }
            if self.priorities is not None:
                self.priorities.values = np.zeros(self.buffer_size * self.n_envs)
        return self._store

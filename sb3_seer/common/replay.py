"""The replay buffer: images until the encoder is frozen, latents from then on."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import DictReplayBufferSamples, PyTorchObs, ReplayBufferSamples, TensorDict
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from sb3_seer.common.encoding import MAX_ENCODER_INPUTS, ObservationEncoder
from sb3_seer.common.latents_dataset import LatentsDataset
from sb3_seer.common.memory import MemoryPlan
from sb3_seer.common.observations import ObservationLayout, check_images_are_not_normalized, map_parts
from sb3_seer.common.policies import SEERPolicy
from sb3_seer.common.priorities import Priorities, PrioritizedReplayBufferSamples, n_step_returns
from sb3_seer.common.storage import ImageStore, LatentStore, images_to_latents
from sb3_seer.common.type_aliases import Latents, Observations
from sb3_seer.common.utils import check_positive_int, warn

# Observations that the range of uint8 latents is fitted on
MAX_FIT_OBSERVATIONS = 1024


class ContrastiveReplayBufferSamples(NamedTuple):
    """
    SB3's ``ReplayBufferSamples`` with a second augmentation of the observations, for a contrastive loss.

    :param positives: the images of the observations, augmented again; None in the latents stage
    :param weights: as in ``PrioritizedReplayBufferSamples``, None if the buffer is not prioritised
    :param indices: as in ``PrioritizedReplayBufferSamples``, None if the buffer is not prioritised
    """

    observations: PyTorchObs | Latents
    actions: th.Tensor
    next_observations: PyTorchObs | Latents
    dones: th.Tensor
    rewards: th.Tensor
    # For n-step replay buffer
    discounts: th.Tensor | None
    positives: PyTorchObs | None
    weights: th.Tensor | None = None
    indices: np.ndarray | None = None


class LatentReplayBuffer(ReplayBuffer):
    """
    Replay buffer that holds images until ``to_latents()`` is called, and K * N latents of each observation
    from then on, in the same bytes: see section 4 of the SEER paper (Chen et al., 2021).

    Samples are the same as SB3's ``ReplayBuffer`` gives (``NStepReplayBuffer`` when ``n_steps > 1``, ``DictReplayBuffer``
    for a ``Dict``) with the same random numbers. Differences: an observation, and a frame of a stack, is stored once;
    memory is allocated by the first ``add()``; an n-step return also ends where an episode was left without being
    done (a reset in the middle), and bootstraps there.

    Of ``Dict`` observations, the images become latents; the other keys stay as they are, float64 as float32.

    :param buffer_size: transitions held while images are stored, over all the envs (C)
    :param observation_space: a ``Box`` of channels-first images, or a ``Dict`` with some
    :param action_space: Action space
    :param device: PyTorch device
    :param n_envs: Number of parallel environments
    :param optimize_memory_usage: no effect: an observation is always stored once
    :param handle_timeout_termination: as in SB3, also together with ``optimize_memory_usage``
        (https://github.com/DLR-RM/stable-baselines3/issues/934)
    :param n_steps: steps of the n-step returns
    :param gamma: discount factor of the n-step returns
    :param n_stack: frames stacked in each image, the newest last
    :param n_augmentations: augmented copies of an observation in the latents stage (K)
    :param augmentation: maps images of shape ``(batch_size, C, H, W)`` to ``(batch_size, C, h, w)``, same dtype
    :param latent_dtype: of the stored latents: "float32", "float16" or "uint8"
    :param max_latent_buffer_size: most transitions held in the latents stage, over all the envs; None: as many as fit
    :param prioritized: sample in proportion to the errors of the transitions (Schaul et al. 2016), with weights
    :param alpha: see :class:`~sb3_seer.common.priorities.Priorities`
    :param beta: see :class:`~sb3_seer.common.priorities.Priorities`
    :param final_beta: see :class:`~sb3_seer.common.priorities.Priorities`
    :param sample_positives: sample ``ContrastiveReplayBufferSamples``
    :raises ValueError: for an invalid parameter
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
        counts = dict(
            buffer_size=buffer_size, n_envs=n_envs, n_steps=n_steps, n_stack=n_stack, n_augmentations=n_augmentations
        )
        for name, value in counts.items():
            check_positive_int(name, value)
        if max_latent_buffer_size is not None and (
            not isinstance(max_latent_buffer_size, int | np.integer) or max_latent_buffer_size < buffer_size
        ):
            raise ValueError(
                f"`max_latent_buffer_size` must be None or an integer >= buffer_size={buffer_size}, "
                f"got {max_latent_buffer_size!r}"
            )
        # Integers of numpy cannot be written as JSON
        self.n_envs, self.n_steps, self.n_stack, self.gamma = int(n_envs), int(n_steps), int(n_stack), gamma
        self.layout = ObservationLayout(observation_space, self.n_stack, self.n_envs)
        # ReplayBuffer would allocate its arrays: skip its constructor
        super(ReplayBuffer, self).__init__(buffer_size, observation_space, action_space, device, n_envs=self.n_envs)
        self.encoder = ObservationEncoder(self.layout.images, self.device, int(n_augmentations), augmentation, latent_dtype)
        self.optimize_memory_usage = optimize_memory_usage
        self.handle_timeout_termination = handle_timeout_termination
        self.latent_dtype, self.max_latent_buffer_size = latent_dtype, max_latent_buffer_size
        self.sample_positives = sample_positives
        # The policy's, during train(): from images of a batch to what the networks are given in their place
        self.encode_batch: Callable[[Any, Any], tuple[Any, Any]] | None = None
        self.priorities: Priorities | None = None

        self.buffer_size = max(int(buffer_size) // self.n_envs, 1)
        if prioritized:
            self.priorities = Priorities(1, alpha, beta, final_beta)  # larger once there is memory
        elif (alpha, beta, final_beta) != (0.6, 0.4, 1.0):
            raise ValueError(f"`prioritized` must be True with alpha={alpha}, beta={beta}, final_beta={final_beta}, got False")
        self.stage = "images"
        self.nbytes = self.buffer_size * self.n_envs * self.layout.frame_bytes
        self.n_valid = 0  # rows that hold transitions
        self.encoder_fingerprint: str | None = None
        self.store: ImageStore | LatentStore | None = None
        # The next observations of the newest step, as they were added
        self.last_next_obs: dict[str, np.ndarray] = {}
        # Keys without images: of the observation and of the next one, shape (buffer_size, n_envs, 2, *obs_shape)
        self.vector_obs: dict[str, np.ndarray] = {}

    def size(self) -> int:
        """
        :return: rows that hold transitions
        """
        return self.n_valid

    def reset(self) -> None:
        """Forget every transition; the stage stays."""
        super().reset()
        self.n_valid = self.encoder.n_clipped = 0
        self.store = None  # allocated by the next add()
        if self.priorities is not None:
            self.priorities.clear()

    def set_encoder(self, policy: SEERPolicy) -> None:
        """
        :param policy: turns images into latents; needed before ``to_latents()`` and, after loading,
            before the next ``add()`` of the latents stage
        """
        self.encoder.policy = policy

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
        Add a step of every env; in the latents stage with one call of the encoder. If it fails, nothing is added.

        :param obs: observations, shape ``(n_envs, *obs_shape)``
        :param next_obs: next observations, the last ones of an episode where it ended
        :param action: actions
        :param reward: rewards, shape ``(n_envs,)``
        :param done: episode ends, shape ``(n_envs,)``
        :param infos: as in SB3: ``infos[env]["TimeLimit.truncated"]``
        :raises ValueError: for another shape
        """
        store = self._allocate()
        parts, next_parts = self.layout.check("obs", obs), self.layout.check("next_obs", next_obs)
        actions = np.asarray(action, dtype=self.actions.dtype).reshape(self.n_envs, self.action_dim)
        rewards = np.asarray(reward, dtype=np.float32).reshape(self.n_envs)
        dones = np.asarray(done, dtype=bool).reshape(self.n_envs)
        timeouts = np.zeros(self.n_envs, dtype=np.float32)
        if self.handle_timeout_termination:
            timeouts[:] = np.array([info.get("TimeLimit.truncated", False) for info in infos]).reshape(self.n_envs)

        continues = self._continues(store, parts)
        if isinstance(store, ImageStore):
            # Cut into frames already where it continues
            frames = store.pending if continues.all() else self.layout.to_frames(parts)
            next_frames = self.layout.to_frames(next_parts)
        else:
            frames, next_frames = self._encode_step(store, parts, next_parts, dones, continues)

        row = self.pos
        self.actions[row], self.rewards[row], self.dones[row], self.timeouts[row] = actions, rewards, dones, timeouts
        for key, array in self.vector_obs.items():
            array[row, :, 0], array[row, :, 1] = parts[key], next_parts[key]
        before = store.newest, store.size
        try:
            store.add(frames, next_frames, dones, continues)
        finally:  # after Ctrl-C in store.add(), rows must still belong to their observations
            if (store.newest, store.size) != before:
                self.n_valid += not self.full
                self.pos = (row + 1) % self.buffer_size
                self.full = self.n_valid == self.buffer_size
        # In the same order of bytes, which is faster to compare
        self.last_next_obs = {key: part.copy(order="K") for key, part in next_parts.items()}
        if self.priorities is not None:
            self.priorities.add(np.arange(row * self.n_envs, (row + 1) * self.n_envs))

    def _continues(self, store: ImageStore | LatentStore, parts: dict[str, np.ndarray]) -> np.ndarray:
        """:return: for each env, whether these are the next observations of the newest step, shape ``(n_envs,)``"""
        continues = store.is_open.copy()
        for env in continues.nonzero()[0].tolist():
            continues[env] = all(
                np.array_equal(part[env], self.last_next_obs[key][env], equal_nan=part.dtype.kind == "f")
                for key, part in parts.items()
            )
        return continues

    def _encode_step(
        self,
        store: LatentStore,
        parts: dict[str, np.ndarray],
        next_parts: dict[str, np.ndarray],
        dones: np.ndarray,
        continues: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """:return: latents of the observations and of the next ones, both of shape ``(n_envs, K, N, L)``"""
        starts = np.flatnonzero(~continues)
        new = {key: np.concatenate((next_parts[key], parts[key][starts])) for key in self.layout.images}
        # Where an episode ended, the policy acts on the first observation of the next one, which add() is not given
        to_act_on = None if dones.any() else self.layout.images_of(next_parts)
        encoded = self.encoder.encode(self.layout.images_of(new), to_act_on)
        latents = store.pending.copy()
        latents[starts] = encoded[self.n_envs :]
        return latents, encoded[: self.n_envs]

    def _allocate(self) -> ImageStore | LatentStore:
        """Memory is allocated by the first add(): a model that is loaded to predict needs none."""
        if self.store is not None:
            return self.store
        n_spare = (self.n_stack - 1) * self.n_envs * self.layout.frame_bytes if self.stage == "images" else 0
        try:
            arena = np.zeros(self.nbytes + n_spare, dtype=np.uint8)
        except MemoryError as error:
            raise MemoryError(
                f"buffer_size={self.nbytes // self.layout.frame_bytes:,} images take {self.nbytes / 1e9:.1f} GB, "
                "more than the memory holds. Set a smaller buffer_size (SB3's default is 1,000,000)"
            ) from error
        if self.stage == "images":
            self.store = ImageStore(arena, self.buffer_size, self.n_envs, self.n_stack)
        else:
            self.store = self._latent_store(arena, self.buffer_size)
        shape = (self.buffer_size, self.n_envs)
        self.actions = np.zeros((*shape, self.action_dim), dtype=self._maybe_cast_dtype(self.action_space.dtype))
        self.rewards, self.dones, self.timeouts = (np.zeros(shape, dtype=np.float32) for _ in range(3))
        self.vector_obs = {
            key: np.zeros((*shape, 2, *self.layout.shapes[key]), dtype=self.layout.dtypes[key]) for key in self.layout.vectors
        }
        if self.priorities is not None:
            self.priorities.values = np.zeros(self.buffer_size * self.n_envs)
        return self.store

    def _latent_store(self, arena: np.ndarray, n_rows: int) -> LatentStore:
        # Not known earlier: the weights of a model are loaded after its empty buffer was made
        self.encoder_fingerprint = self.encoder.policy.encoder_fingerprint()
        shape = (self.encoder.n_augmentations, *self.encoder.policy.latent_shape)
        return LatentStore(arena, n_rows, self.n_envs, self.latent_dtype, shape)

    # ---- sampling ----

    def sample(self, batch_size: int, env: VecNormalize | None = None, n_views: int = 1) -> Any:
        """
        Sample transitions; with ``n_views``, each several times, augmented differently, to average over them as in
        DrQ (Kostrikov et al. 2020, https://arxiv.org/abs/2004.13649: K target augmentations of equation 1 and M of
        equation 2). In the latents stage, these are different ones of the K stored copies.

        :param batch_size: Number of element to sample
        :param env: associated VecEnv, to normalize the rewards, and keys without images
        :param n_views: how often each transition is in the batch: view v of transition i is at ``v * batch_size + i``
        :return: images, or in the latents stage ``Latents``, with the rest as in SB3; ``PrioritizedReplayBufferSamples``
            if the buffer is prioritised, ``ContrastiveReplayBufferSamples`` with ``sample_positives``
        :raises ValueError: if ``n_views`` is larger than ``n_augmentations``, or ``env`` normalizes images
        """
        check_images_are_not_normalized(env, self.layout.images)
        if not 1 <= n_views <= self.encoder.n_augmentations:
            raise ValueError(f"`n_views` must be from 1 to n_augmentations={self.encoder.n_augmentations}, got {n_views}")
        if self.priorities is not None:
            rows, envs = np.divmod(self.priorities.sample(batch_size), self.n_envs)
            return self._transitions(rows, envs, env, n_views)
        rows = np.random.randint(0, self.n_valid, size=batch_size)
        # A ring that grew has its gap at the write head
        rows = np.where(rows < self.pos, rows, rows + self.buffer_size - self.n_valid)
        return self._get_samples(rows, env, n_views)

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None, n_views: int = 1) -> Any:
        """:return: a random env's transition in each of these rows, shape ``(batch_size,)``"""
        envs = np.random.randint(0, high=self.n_envs, size=(len(batch_inds),))
        return self._transitions(batch_inds, envs, env, n_views)

    def update_priorities(self, indices: np.ndarray, errors: np.ndarray) -> None:
        """
        :param indices: of a sample, before another transition is added
        :param errors: of each of its transitions, shape ``(batch_size,)``
        :raises ValueError: if the buffer is not prioritised, or an error is not finite
        """
        if self.priorities is None:
            raise ValueError("The buffer has no priorities to update. Set prioritized=True")
        self.priorities.update(indices, errors)

    def _transitions(self, rows: np.ndarray, envs: np.ndarray, env: VecNormalize | None, n_views: int) -> Any:
        """:return: what ``sample()`` returns, of these rows and envs, both of shape ``(batch_size,)``"""
        rewards, last_rows, discounts = self._returns(rows, envs, env)
        # Only use dones that are not due to timeouts
        dones = self.dones[last_rows, envs] * (1 - self.timeouts[last_rows, envs])
        indices = rows * self.n_envs + envs
        arrays = dict(actions=self.actions[rows, envs], dones=dones.reshape(-1, 1), rewards=rewards, discounts=discounts)
        if self.priorities is not None:
            arrays["weights"] = self.priorities.weights(indices).reshape(-1, 1)
        fields: dict[str, Any] = {
            name: None if array is None else _repeat(self.to_torch(array, copy=False), n_views)
            for name, array in arrays.items()
        }
        vector_obs = self._vectors(rows, envs, 0, env, n_views)
        next_vector_obs = self._vectors(last_rows, envs, 1, env, n_views)
        slots = self.slots_of(rows)
        last_slots = slots if last_rows is rows else self.slots_of(last_rows)
        if isinstance(self.store, LatentStore):
            latents, next_latents = self._sample_latents(self.store, slots, last_slots, envs, n_views)
            fields["observations"] = Latents(latents.unbind(dim=1), vector_obs)
            fields["next_observations"] = Latents(next_latents.unbind(dim=1), next_vector_obs)
        else:
            assert self.store is not None
            frames = self.store.observations(slots, envs)
            # An augmentation may work in place, and the positives are of the same frames
            images = self._augment(frames.copy() if self.sample_positives else frames, n_views)
            next_images = self._augment(self.store.next_observations(last_slots, envs), n_views)
            batch = (images, next_images)
            if self.layout.is_dict:
                batch = ({**images, **vector_obs}, {**next_images, **next_vector_obs})
            fields["observations"], fields["next_observations"] = (
                batch if self.encode_batch is None else self.encode_batch(*batch)
            )
        if self.priorities is not None:
            fields["indices"] = np.tile(indices, n_views)
        if self.sample_positives:
            positives = None if self.stage == "latents" else self._augment(frames, n_views)
            return ContrastiveReplayBufferSamples(**fields, positives=positives)
        if self.priorities is not None:
            return PrioritizedReplayBufferSamples(**fields)
        return DictReplayBufferSamples(**fields) if self.layout.is_dict else ReplayBufferSamples(**fields)

    def _returns(
        self, rows: np.ndarray, envs: np.ndarray, env: VecNormalize | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """
        :return: n-step returns, shape ``(batch_size, 1)``; the row where each ends, shape ``(batch_size,)``; the discounts of
            the values that they bootstrap from, shape ``(batch_size, 1)``, None if one step
        """
        assert self.store is not None
        if self.n_steps == 1:
            return self._normalize_reward(self.rewards[rows, envs].reshape(-1, 1), env), rows, None
        window, window_envs = rows[:, None] + np.arange(self.n_steps), envs[:, None]  # [batch_size, n_steps]
        window %= self.buffer_size
        rewards = self._normalize_reward(self.rewards[window, window_envs], env)
        # A step that no step goes on from ends an episode, was left by a reset in the middle, or is the newest
        ends = (self.timeouts[window, window_envs] > 0) | ~self.store.is_linked[self.slots_of(window), window_envs]
        returns, last, discounts = n_step_returns(rewards, ends, self.gamma)
        return returns, (rows + last) % self.buffer_size, discounts

    def slots_of(self, rows: np.ndarray) -> np.ndarray:
        """:return: where these rows are in the store, same shape"""
        assert self.store is not None
        return self.store.slots((self.pos - 1 - rows) % self.buffer_size)

    def _sample_latents(
        self, store: LatentStore, slots: np.ndarray, last_slots: np.ndarray, envs: np.ndarray, n_views: int
    ) -> tuple[th.Tensor, th.Tensor]:
        """:return: latents and, of ``last_slots``, next latents, shape ``(n_views * batch_size, N, L)``"""
        n_copies = self.encoder.n_augmentations
        if n_copies == 1:
            copies = np.zeros(len(slots), dtype=int)
        elif n_views == 1:
            copies = np.random.randint(0, n_copies, size=len(slots))
        else:  # different ones for each transition
            copies = np.random.random_sample((len(slots), n_copies)).argsort(axis=1)[:, :n_views].T.ravel()
            slots, last_slots, envs = (np.tile(array, n_views) for array in (slots, last_slots, envs))
        # The same copy of both, as in the authors' code
        stored = store.latents(slots, envs, copies), store.next_latents(last_slots, envs, copies)
        return self.decode(stored[0]), self.decode(stored[1])

    def decode(self, stored: np.ndarray) -> th.Tensor:
        """:return: float32 latents of these stored numbers, same shape"""
        assert self.encoder.codec is not None
        return self.encoder.codec.decode(self.to_torch(stored, copy=False))

    def _augment(self, frames: np.ndarray, n_views: int) -> Any:
        """:return: augmented images of these bytes"""
        images = map_parts(lambda part: self.to_torch(part, copy=False), self.layout.to_images(frames))
        return self.encoder.augment(images, n_views)

    def _vectors(self, rows: np.ndarray, envs: np.ndarray, which: int, env: VecNormalize | None, n_views: int) -> TensorDict:
        """:return: keys without images, of the observations (``which`` 0) or of the next ones (1)"""
        if not self.vector_obs:
            return {}
        arrays: Any = self._normalize_obs({key: array[rows, envs, which] for key, array in self.vector_obs.items()}, env)
        return {key: _repeat(self.to_torch(array), n_views) for key, array in arrays.items()}

    def images_at(self, indices: np.ndarray) -> tuple[Observations, Observations, np.ndarray]:
        """
        Transitions as they were added, not augmented; no random number is drawn.

        :param indices: from 0 to ``size() * n_envs - 1``, in the order of the ring, shape ``(batch_size,)``
        :return: the images of the observations and of the next ones (one step later), and the actions
        :raises ValueError: in the latents stage
        """
        if not isinstance(self.store, ImageStore):
            raise ValueError(f"`images_at()` needs the stage 'images' and stored transitions, got {self.stage!r}")
        rows, envs = np.divmod(indices, self.n_envs)
        slots = self.slots_of(rows)
        frames, next_frames = self.store.observations(slots, envs), self.store.next_observations(slots, envs)
        return self.layout.to_images(frames), self.layout.to_images(next_frames), self.actions[rows, envs]

    def latents_dataset(self) -> LatentsDataset:
        """
        :return: the stored transitions as a data set, to train a model on latents offline
        :raises ValueError: in the images stage
        """
        return LatentsDataset(self)

    # ---- memory, and the switch of stage ----

    @property
    def extra_bytes(self) -> int:
        """bytes of the few frames or latents at the ends of episodes that are kept beside the arena"""
        return 0 if self.store is None else self.store.extra_bytes

    def check_extra_frames(self) -> None:
        """Warn if much is kept beside the arena: stacks do not shift by one frame in a step, or episodes are short."""
        store = self.store
        if store is None or self.extra_bytes <= max(self.n_valid / self.buffer_size, 0.1) * self.nbytes / 2:
            return
        n_episodes = self.n_envs + int(np.count_nonzero(self.dones))
        if isinstance(store, ImageStore) and len(store.extra_frames) > 2 * n_episodes:
            why = (
                f"the observations' stacks of {self.n_stack} frames do not shift by one frame per step. To store each stack "
                "as it is, set replay_buffer_kwargs=dict(n_stack=1)"
            )
        else:
            why = "an episode of n steps has n + 1 observations, and these episodes are short"
        warn(f"Extra frames take at least half as much memory as the stored {self.stage}: {why}")

    def plan(self) -> MemoryPlan:
        """
        :return: bytes and transitions of both stages
        """
        n_networks, latent_dim = self.encoder.policy.latent_shape
        step_bytes = self.action_dim * np.dtype(self._maybe_cast_dtype(self.action_space.dtype)).itemsize
        step_bytes += 3 * np.dtype(np.float32).itemsize  # reward, done, timeout
        step_bytes += np.dtype(bool).itemsize + np.dtype(np.int16).itemsize  # is_linked, n_before
        for key in self.layout.vectors:
            step_bytes += 2 * int(np.prod(self.layout.shapes[key])) * self.layout.dtypes[key].itemsize
        if self.priorities is not None:
            step_bytes += 9  # a priority and its part of the sums
        return MemoryPlan(
            image_transitions=self.nbytes // self.layout.frame_bytes,
            n_envs=self.n_envs,
            frame_bytes=self.layout.frame_bytes,
            number_bytes=np.dtype(self.latent_dtype).itemsize,
            n_networks=n_networks,
            n_augmentations=self.encoder.n_augmentations,
            latent_dim=latent_dim,
            max_latent_transitions=self.max_latent_buffer_size,
            step_bytes=step_bytes,
            bytes_of={key: part.stop - part.start for key, part in self.layout.bytes_of.items()},
        )

    def to_latents(self) -> None:
        """
        Turn every stored image into latents, in place, and let the buffer grow to what fits in the same bytes.

        :raises ValueError: if latents are larger than images, or if ``latent_dtype="uint8"`` has nothing to be fitted on
        """
        if self.stage == "latents":
            return
        plan = self.plan()
        plan.check_capacity()
        images = self.store if self.n_valid > 0 else None
        assert not isinstance(images, LatentStore)
        codec = self.encoder.codec
        if codec is None and images is None:
            raise ValueError(
                '`latent_dtype` "uint8" needs stored observations to fit its range on, and the buffer is empty. '
                "Set encoder.codec to a LatentCodec, or another latent_dtype"
            )
        shape = self.encoder.policy.latent_shape
        if codec is not None and codec.scale is not None and codec.scale.shape != shape:
            raise ValueError(f"The scale of `codec` must have shape {shape} (N, L), got {codec.scale.shape}")
        n_rows = plan.latent_transitions // self.n_envs
        if images is None:
            self.store = None
            self.pos = 0
        else:
            try:
                self._convert(images, n_rows)
            except BaseException:
                self.reset()  # an empty buffer is better than a half-converted one
                self.encoder.codec = codec
                raise
        self.buffer_size, self.full = n_rows, self.n_valid == n_rows
        self.stage = "latents"

    def _convert(self, images: ImageStore, n_rows: int) -> None:
        """Move every array to a ring of ``n_rows`` rows, and turn images into latents."""
        if self.encoder.codec is None:
            self._fit_codec(images)
        latents = self._latent_store(images.ring.reshape(-1), n_rows)
        n_inputs = self.encoder.n_augmentations * self.n_envs
        images_to_latents(images, latents, self.n_valid, self._encode, chunk=max(MAX_ENCODER_INPUTS // n_inputs, 1))
        # After a wrap, the rows from `pos` on are the older ones. They move to the end of the ring, so that it opens
        # at the write head. In a ring that is just full, the write head moves instead
        self.pos = (self.pos or self.n_valid) % n_rows
        for name in ("actions", "rewards", "dones", "timeouts"):
            setattr(self, name, self._enlarged(getattr(self, name), n_rows))
        self.vector_obs = {key: self._enlarged(array, n_rows) for key, array in self.vector_obs.items()}
        if self.priorities is not None:
            self.priorities.values = self._enlarged(self.priorities.values.reshape(-1, self.n_envs), n_rows).reshape(-1)
        if images.is_open.all():
            next_images = self.layout.images_of(self.last_next_obs)
            self.encoder.encode(next_images, to_act_on=next_images)
        self.store = latents

    def _enlarged(self, array: np.ndarray, n_rows: int) -> np.ndarray:
        """:return: a copy with ``n_rows`` rows. The new ones are at ``pos``, where the next steps are written"""
        enlarged = np.zeros((n_rows, *array.shape[1:]), dtype=array.dtype)
        enlarged[: self.pos] = array[: self.pos]
        enlarged[self.pos + n_rows - self.n_valid :] = array[self.pos : self.n_valid]
        return enlarged

    def _encode(self, frames: np.ndarray) -> np.ndarray:
        """
        :param frames: bytes of images, shape ``(batch_size, n_stack, frame_bytes)``, at least one
        :return: stored latents, shape ``(batch_size, K, N, L)``, computed ``MAX_ENCODER_INPUTS`` at a time
        """
        step = max(MAX_ENCODER_INPUTS // self.encoder.n_augmentations, 1)
        batches = [self.layout.to_images(frames[i : i + step]) for i in range(0, len(frames), step)]
        return np.concatenate([self.encoder.encode(images) for images in batches])

    def _fit_codec(self, images: ImageStore) -> None:
        total = self.n_valid * self.n_envs
        picks = np.linspace(0, total - 1, min(total, MAX_FIT_OBSERVATIONS)).astype(int)

        def batches() -> Iterator[Observations]:
            for some in np.array_split(picks, -(-len(picks) // MAX_ENCODER_INPUTS)):
                slots, envs = self.slots_of(some // self.n_envs), some % self.n_envs
                yield self.layout.to_images(images.observations(slots, envs))
                # The last observation of an episode is the observation of no slot
                ends = ~images.is_linked[slots, envs]
                if ends.any():
                    yield self.layout.to_images(images.next_observations(slots[ends], envs[ends]))

        self.encoder.fit_codec(batches())


def _repeat(tensor: th.Tensor, n_views: int) -> th.Tensor:
    """:return: the batch ``n_views`` times, one after the other"""
    return tensor if n_views == 1 else th.cat([tensor] * n_views)

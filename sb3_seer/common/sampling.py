"""What is sampled of the transitions that are stored."""

from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import DictReplayBufferSamples, PyTorchObs, ReplayBufferSamples, TensorDict
from stable_baselines3.common.vec_env import VecNormalize

from sb3_seer.common.encoding import ImageEncoding
from sb3_seer.common.priorities import BetaSchedule, Priorities, PrioritizedReplayBufferSamples
from sb3_seer.common.storage import ImageStore, LatentStore
from sb3_seer.common.type_aliases import Latents


class ContrastiveReplayBufferSamples(NamedTuple):
    """
    SB3's ``ReplayBufferSamples``, with what a contrastive loss compares the observations with.

    :param positives: the images of the observations, augmented once more; None in the latents stage
    :param weights: as ``PrioritizedReplayBufferSamples``, None if the buffer is not prioritised
    :param indices: likewise
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


class TransitionSampling(BetaSchedule, ImageEncoding, ReplayBuffer):
    """
    Mixin for a buffer of images or latents: n-step returns, observations of both stages, priorities.
    """

    n_steps: int
    gamma: float
    n_valid: int  # rows that hold transitions
    priorities: Priorities | None
    sample_positives: bool
    others: dict[str, np.ndarray]  # by key, shape (rows, n_envs, 2, *obs_shape)
    _store: ImageStore | LatentStore | None

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> ReplayBufferSamples:
        """
        :param batch_size: Number of element to sample
        :param env: associated VecEnv, to normalize the rewards, and of observations what is no image
        :return: images, or in the latents stage ``Latents``, with the rest as in SB3; ``PrioritizedReplayBufferSamples``
            if the buffer is prioritised, ``ContrastiveReplayBufferSamples`` with ``sample_positives``
        """
        if self.priorities is not None:
            rows, env_indices = np.divmod(self.priorities.sample(batch_size), self.n_envs)
            return self._transitions(rows, env_indices, env)
        batch_inds = np.random.randint(0, self.n_valid, size=batch_size)
        # A ring that grew has its gap at the write head
        batch_inds = np.where(batch_inds < self.pos, batch_inds, batch_inds + self.buffer_size - self.n_valid)
        return self._get_samples(batch_inds, env=env)

    def update_priorities(self, indices: np.ndarray, errors: np.ndarray) -> None:
        """
        :param indices: those of a sample, before another transition is added
        :param errors: how wrong the agent was about each of its transitions, shape ``(batch_size,)``
        :raises ValueError: if the buffer is not prioritised, or an error is not finite
        """
        if self.priorities is None:
            raise ValueError("The buffer has no priorities to update: make it with prioritized=True")
        self.priorities.update(indices, errors)

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> ReplayBufferSamples:
        """
        :param batch_inds: rows of the ring, shape ``(batch_size,)``
        :param env: associated VecEnv
        :return: a random env's transition in each of these rows
        """
        return self._transitions(batch_inds, np.random.randint(0, high=self.n_envs, size=(len(batch_inds),)), env)

    def _transitions(self, rows: np.ndarray, envs: np.ndarray, env: VecNormalize | None) -> Any:
        """
        :param rows: rows of the ring, shape ``(batch_size,)``
        :param envs: shape ``(batch_size,)``
        :param env: associated VecEnv
        :return: the samples
        """
        rewards, last_rows, discounts = self._n_step(rows, envs, env)
        obs, next_obs = self._observations(rows, last_rows, envs, env)
        # Only use dones that are not due to timeouts
        dones = self.dones[last_rows, envs] * (1 - self.timeouts[last_rows, envs])
        # Indexing with arrays has copied them already
        fields: dict[str, Any] = dict(
            observations=obs,
            actions=self.to_torch(self.actions[rows, envs], copy=False),
            next_observations=next_obs,
            dones=self.to_torch(dones.reshape(-1, 1), copy=False),
            rewards=self.to_torch(rewards, copy=False),
            discounts=None if discounts is None else self.to_torch(discounts),
        )
        if self.priorities is not None:
            indices = rows * self.n_envs + envs
            weights = self.priorities.weights(indices, self.beta)
            fields.update(weights=self.to_torch(weights.reshape(-1, 1)), indices=indices)
        if self.sample_positives:
            return ContrastiveReplayBufferSamples(**fields, positives=self._positives(rows, envs))
        if self.priorities is not None:
            return PrioritizedReplayBufferSamples(**fields)
        return DictReplayBufferSamples(**fields) if self.layout.is_dict else ReplayBufferSamples(**fields)

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
        self, rows: np.ndarray, last_rows: np.ndarray, envs: np.ndarray, env: VecNormalize | None
    ) -> tuple[PyTorchObs | Latents, PyTorchObs | Latents]:
        """:return: the observations of ``rows`` and the next observations of ``last_rows``"""
        others, next_others = self._other_keys(rows, envs, 0, env), self._other_keys(last_rows, envs, 1, env)
        store = self._store
        if isinstance(store, LatentStore):
            assert self.codec is not None
            # The same copy for both, as in the authors' code
            copies = np.zeros(len(rows), dtype=int)
            if self.n_augmentations > 1:
                copies = np.random.randint(0, self.n_augmentations, size=len(rows))
            stored = store.latents(rows, envs, copies), store.next_latents(last_rows, envs, copies)  # [batch_size, N, L]
            latents, next_latents = (self.codec.decode(self.to_torch(codes, copy=False)) for codes in stored)
            return Latents(latents, others), Latents(next_latents, next_others)
        assert store is not None
        images = self._augmented(store.observations(rows, envs))
        next_images = self._augmented(store.next_observations(last_rows, envs))
        if isinstance(images, dict) and isinstance(next_images, dict):
            return {**images, **others}, {**next_images, **next_others}
        return images, next_images

    def _positives(self, rows: np.ndarray, envs: np.ndarray) -> PyTorchObs | None:
        """:return: the images of the observations of ``rows``, augmented once more; None if there are latents"""
        if not isinstance(self._store, ImageStore):
            return None
        return self._augmented(self._store.observations(rows, envs))

    def _augmented(self, frames: np.ndarray) -> PyTorchObs:
        """:return: the images that these bytes are, on the device, augmented if anything is"""
        return self._augment(self._to_tensors(self.layout.to_images(frames)))

    def _other_keys(self, rows: np.ndarray, envs: np.ndarray, which: int, env: VecNormalize | None) -> TensorDict:
        """:return: what is no image, by key: of the observations (``which`` 0) or of the next ones (1)"""
        if not self.others:
            return {}
        others = self._normalize_obs({key: array[rows, envs, which] for key, array in self.others.items()}, env)
        assert isinstance(others, dict)
        return {key: self.to_torch(part) for key, part in others.items()}

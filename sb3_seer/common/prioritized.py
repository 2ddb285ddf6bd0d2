"""SB3's replay buffer with priorities, for observations that are no images to be frozen."""

from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.vec_env import VecNormalize

from sb3_seer.common.priorities import BetaSchedule, Priorities, PrioritizedReplayBufferSamples


class PrioritizedReplayBuffer(BetaSchedule, ReplayBuffer):
    """
    SB3's ``ReplayBuffer`` (``NStepReplayBuffer`` when ``n_steps > 1``), sampled in proportion to the errors of the
    transitions.

    Paper: Schaul et al. 2016, https://arxiv.org/abs/1511.05952, section 3.3. For images,
    :class:`~sb3_seer.common.replay.LatentReplayBuffer` with ``prioritized=True`` takes a fraction of the memory.

    :param buffer_size: Max number of element in the buffer
    :param observation_space: Observation space, no ``Dict``
    :param action_space: Action space
    :param args: as for ``ReplayBuffer``
    :param n_steps: steps of the n-step returns
    :param gamma: discount factor of the n-step returns
    :param alpha: how much the errors count, from 0 (not at all) to 1
    :param beta: how much the weights correct for that when training starts, from 0 (not at all) to 1
    :param final_beta: how much they do when it ends; linear in between
    :param kwargs: as for ``ReplayBuffer``, without ``optimize_memory_usage``
    :raises ValueError: for a parameter outside of what is said here; for ``Dict`` observations
    """

    prioritized = True

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        *args: Any,
        n_steps: int = 1,
        gamma: float = 0.99,
        alpha: float = 0.6,
        beta: float = 0.4,
        final_beta: float = 1.0,
        **kwargs: Any,
    ) -> None:
        if isinstance(observation_space, spaces.Dict):
            raise ValueError(f"observation_space: {observation_space} was given, allowed are spaces other than Dict")
        if kwargs.get("optimize_memory_usage"):
            raise ValueError("optimize_memory_usage: True was given, allowed is False")
        if n_steps < 1:
            raise ValueError(f"n_steps: {n_steps} was given, allowed are integers from 1")
        self._set_betas(beta, final_beta)
        super().__init__(buffer_size, observation_space, action_space, *args, **kwargs)
        self.n_steps, self.gamma = n_steps, gamma
        self.priorities = Priorities(self.buffer_size * self.n_envs, alpha)

    def add(
        self,
        obs: np.ndarray,
        next_obs: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """Add a step of every env, see :meth:`stable_baselines3.common.buffers.ReplayBuffer.add`."""
        row = self.pos
        super().add(obs, next_obs, action, reward, done, infos)
        self.priorities.add(np.arange(row * self.n_envs, (row + 1) * self.n_envs))

    def reset(self) -> None:
        """Forget every transition."""
        super().reset()
        self.priorities.clear()

    def sample(  # type: ignore[override]
        self, batch_size: int, env: VecNormalize | None = None
    ) -> PrioritizedReplayBufferSamples:
        """
        :param batch_size: number of transitions to sample
        :param env: associated VecEnv, to normalize the observations and rewards
        :return: transitions, and how much each counts
        """
        indices = self.priorities.sample(batch_size)
        rows, envs = np.divmod(indices, self.n_envs)
        rewards, last_rows, discounts = self._n_step(rows, envs, env)
        # Only use dones that are not due to timeouts
        dones = self.dones[last_rows, envs] * (1 - self.timeouts[last_rows, envs])
        return PrioritizedReplayBufferSamples(
            observations=self.to_torch(self._normalize_obs(self.observations[rows, envs], env)),  # type: ignore[arg-type]
            actions=self.to_torch(self.actions[rows, envs]),
            next_observations=self.to_torch(
                self._normalize_obs(self.next_observations[last_rows, envs], env)  # type: ignore[arg-type]
            ),
            dones=self.to_torch(dones.reshape(-1, 1)),
            rewards=self.to_torch(rewards),
            discounts=self.to_torch(discounts),
            weights=self.to_torch(self.priorities.weights(indices, self.beta).reshape(-1, 1)),
            indices=indices,
        )

    def _n_step(
        self, rows: np.ndarray, envs: np.ndarray, env: VecNormalize | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        The n-step returns of SB3's ``NStepReplayBuffer``, which chooses the envs itself.

        :return: returns, shape ``(batch_size, 1)``; the row where each ends, shape ``(batch_size,)``; the discounts of
            the values that they bootstrap from, shape ``(batch_size, 1)``
        """
        steps = np.arange(self.n_steps)
        indices = (rows[:, None] + steps) % self.buffer_size  # [batch_size, n_steps]
        rewards = self._normalize_reward(self.rewards[indices, envs[:, None]], env)  # [batch_size, n_steps]
        # The newest row is followed by the oldest, or by nothing: a window ends there, and bootstraps
        newest = (self.pos - 1) % self.buffer_size
        ends = (self.dones[indices, envs[:, None]] > 0) | (indices == newest)
        last = np.where(ends.any(axis=1), ends.argmax(axis=1), self.n_steps - 1)  # [batch_size]
        mask = steps <= last[:, None]  # [batch_size, n_steps]
        returns = (rewards * self.gamma ** steps.astype(np.float32) * mask).sum(axis=1, keepdims=True)
        # gamma ** n_steps, or less where the window is cut short
        discounts = self.gamma ** mask.sum(axis=1, keepdims=True).astype(np.float32)
        return returns, (rows + last) % self.buffer_size, discounts

    def update_priorities(self, indices: np.ndarray, errors: np.ndarray) -> None:
        """
        :param indices: those of a sample, before another transition is added
        :param errors: how wrong the agent was about each of its transitions, shape ``(batch_size,)``
        :raises ValueError: if an error is not finite
        """
        self.priorities.update(indices, errors)

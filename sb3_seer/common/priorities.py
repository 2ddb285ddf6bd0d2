"""Proportional prioritised replay (Schaul et al. 2016, https://arxiv.org/abs/1511.05952)."""

from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.vec_env import VecNormalize

from sb3_seer.common.utils import check_number, check_positive_int

# Keeps transitions without an error from never being sampled again
EPSILON = 1e-6


class PrioritizedReplayBufferSamples(NamedTuple):
    """
    SB3's ``ReplayBufferSamples`` with weights.

    :param weights: importance-sampling weights, float32 of shape ``(n_views * batch_size, 1)``
    :param indices: of the transitions, for ``update_priorities()``, shape ``(n_views * batch_size,)``
    """

    observations: th.Tensor
    actions: th.Tensor
    next_observations: th.Tensor
    dones: th.Tensor
    rewards: th.Tensor
    # For n-step replay buffer
    discounts: th.Tensor | None
    weights: th.Tensor
    indices: np.ndarray


def is_prioritized(replay_buffer: Any) -> bool:
    """
    :param replay_buffer: any replay buffer
    :return: whether it samples ``PrioritizedReplayBufferSamples`` and has ``update_priorities(indices, errors)``
    """
    return getattr(replay_buffer, "priorities", None) is not None


class SumTree:
    """
    Numbers that are drawn in proportion to their size: the root of this tree has a child for each block of leaves, so that few
    numbers are added up for a draw. A sum is always computed from its leaves, so rounding errors do not pile up.

    :param capacity: number of leaves, all 0 at first
    """

    BLOCK_SIZE = 256

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._blocks = np.zeros((-(-capacity // self.BLOCK_SIZE), self.BLOCK_SIZE))
        self._sums = np.zeros(len(self._blocks))  # of each block

    def set(self, indices: np.ndarray | int, values: np.ndarray | float) -> None:
        """
        :param indices: of the leaves, from 0; of duplicates the last one counts
        :param values: finite and not negative, one for each index or one for all
        """
        self._leaves[indices] = values
        changed = np.unique(indices // self.BLOCK_SIZE)
        self._sums[changed] = self._blocks[changed].sum(axis=1)

    def get(self, indices: np.ndarray | slice) -> np.ndarray:
        """
        :param indices: of the leaves
        :return: their values
        """
        return self._leaves[indices]

    @property
    def _leaves(self) -> np.ndarray:
        # Not kept: a copy of the tree would copy the view as a separate array
        return self._blocks.reshape(-1)[: self.capacity]

    @property
    def total(self) -> float:
        """The sum of all leaves."""
        return float(self._sums.sum())

    def find(self, prefix_sums: np.ndarray) -> np.ndarray:
        """
        Find the first leaves up to which the sum of all leaves exceeds the given sums.

        :param prefix_sums: from 0 to (and without) ``total``, shape ``(n,)``; others are clipped
        :return: the indices of the leaves, none of which is 0, shape ``(n,)``
        :raises ValueError: if all leaves are 0
        """
        if self.total == 0.0:
            raise ValueError("There are no transitions to sample: all priorities are 0")
        blocks, rest = _find(self._sums[None], np.maximum(prefix_sums, 0.0))
        leaves, _ = _find(self._blocks[blocks], rest)
        return blocks * self.BLOCK_SIZE + leaves


def _find(values: np.ndarray, prefix_sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    :param values: a row for each sum, or one row for all, shape ``(n or 1, n_values)``
    :param prefix_sums: shape ``(n,)``
    :return: for each sum, the first value up to which the sum of its row exceeds it, and what is left of it before that value
    """
    sums = values.cumsum(axis=1)
    # Rounding may have left more than the sum of the row
    prefix_sums = np.minimum(prefix_sums, np.nextafter(sums[:, -1], 0.0))
    # Never a 0, which adds nothing to the sum before it
    found = (sums <= prefix_sums[:, None]).sum(axis=1)
    before = np.take_along_axis(sums, found[:, None] - 1, axis=1)[:, 0]
    return found, prefix_sums - before * (found > 0)


class Priorities:
    """
    Priorities of transitions that are sampled in proportion to ``(|error| + EPSILON) ** alpha``.

    Paper: Schaul et al. 2016, https://arxiv.org/abs/1511.05952, section 3.3, equation 1 and appendix B.2.1.

    :param n: number of transitions that can be held
    :param alpha: how much priorities count: from 0 (not at all) to 1
    :param beta: how much the weights correct for that when training starts, from 0 (not at all) to 1
    :param final_beta: the same when it ends; linear in between
    :raises ValueError: for parameters outside of these ranges
    """

    def __init__(self, n: int, alpha: float = 0.6, beta: float = 0.4, final_beta: float = 1.0) -> None:
        check_positive_int("n", n)
        for name, number in dict(alpha=alpha, beta=beta, final_beta=final_beta).items():
            check_number(name, number, 0, 1)
        self.alpha, self.initial_beta, self.final_beta = alpha, beta, final_beta
        # SB3's: from 1 at the beginning of the training to 0 at its end, below for the few steps after it
        self.progress_remaining = 1.0
        self._tree = SumTree(n)
        # The largest ever, also of transitions that were overwritten
        self.max_priority = 1.0

    @property
    def beta(self) -> float:
        """how much the weights correct now"""
        return self.final_beta + (self.initial_beta - self.final_beta) * max(self.progress_remaining, 0.0)

    @property
    def values(self) -> np.ndarray:
        """
        The priorities, to the power of alpha, float64 of shape ``(n,)``, 0 where there is no transition.
        Set them to load or to move them; another length is a new ``n``.
        """
        return self._tree.get(slice(None)).copy()

    @values.setter
    def values(self, values: np.ndarray) -> None:
        self._tree = SumTree(len(values))
        self._tree.set(np.arange(len(values)), values)

    def add(self, indices: np.ndarray | int) -> None:
        """
        Give new transitions the largest priority so far, so that each of them is likely to be sampled soon.

        :param indices: of the transitions
        """
        self._tree.set(indices, self.max_priority)

    def update(self, indices: np.ndarray, errors: np.ndarray) -> None:
        """
        Set the priorities of transitions that were sampled.

        :param indices: of the transitions, shape ``(batch_size,)``; of duplicates the last one counts
        :param errors: of the same shape, the sign does not matter
        :raises ValueError: if an error is not finite; no priority is changed then
        """
        if not np.isfinite(errors).all():
            raise ValueError(f"`errors` must be finite, got {errors[~np.isfinite(errors)][0]}")
        # In float64: the tree's sums are over many of them
        values = (np.abs(errors, dtype=np.float64) + EPSILON) ** self.alpha
        self._tree.set(indices, values)
        self.max_priority = float(values.max(initial=self.max_priority))

    def sample(self, batch_size: int) -> np.ndarray:
        """
        Draw one transition from each of ``batch_size`` equal parts of the sum of all priorities.

        :param batch_size: number of transitions to sample
        :return: their indices, shape ``(batch_size,)``
        :raises ValueError: if there are no transitions
        """
        parts = np.arange(batch_size) + np.random.random_sample(batch_size)
        return self._tree.find(parts * (self._tree.total / batch_size))

    def weights(self, indices: np.ndarray) -> np.ndarray:
        """
        Importance-sampling weights ``(N * P(i)) ** -beta``, divided by the largest of the batch (as in Dopamine). The
        number of transitions N and the sum of all priorities cancel out.

        :param indices: of transitions that were sampled, shape ``(batch_size,)``
        :return: float32 weights from 0 to 1, shape ``(batch_size,)``
        """
        values = self._tree.get(indices)
        return ((values.min() / values) ** self.beta).astype(np.float32)

    def take_settings(self, other: "Priorities") -> None:
        """
        Take the exponents of others. With another alpha, all transitions are as if they were new.

        :param other: priorities of another buffer
        """
        if self.alpha != other.alpha:
            self.max_priority = 1.0
            self.values = (self.values > 0).astype(np.float64)
        self.alpha, self.initial_beta, self.final_beta = other.alpha, other.initial_beta, other.final_beta

    def clear(self) -> None:
        """Forget all transitions and the largest priority."""
        self._tree = SumTree(self._tree.capacity)
        self.max_priority = 1.0


def n_step_returns(rewards: np.ndarray, ends: np.ndarray, gamma: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    The n-step returns of SB3's ``NStepReplayBuffer``.

    :param rewards: of n steps in a row, shape ``(batch_size, n_steps)``
    :param ends: whether the return may not go on after a step, same shape
    :param gamma: discount factor
    :return: returns, shape ``(batch_size, 1)``; their last steps, shape ``(batch_size,)``; the discounts of the values that
        they bootstrap from (``gamma ** n_steps``, or less where a return ends early), shape ``(batch_size, 1)``
    """
    n_steps = rewards.shape[1]
    last = np.where(ends.any(axis=1), ends.argmax(axis=1), n_steps - 1)  # [batch_size]
    mask = np.arange(n_steps) <= last[:, None]  # [batch_size, n_steps]
    returns = (rewards * gamma ** np.arange(n_steps, dtype=np.float32) * mask).sum(axis=1, keepdims=True)
    return returns, last, gamma ** mask.sum(axis=1, keepdims=True).astype(np.float32)


class PrioritizedReplayBuffer(ReplayBuffer):
    """
    SB3's ``ReplayBuffer`` (``NStepReplayBuffer`` when ``n_steps > 1``), sampled in proportion to the errors of the
    transitions.

    Paper: Schaul et al. 2016, https://arxiv.org/abs/1511.05952, section 3.3. For images,
    :class:`~sb3_seer.common.replay.LatentReplayBuffer` with ``prioritized=True`` takes a fraction of the memory.

    :param buffer_size: Max number of element in the buffer
    :param observation_space: Observation space, not a ``Dict``
    :param action_space: Action space
    :param device: PyTorch device
    :param n_envs: Number of parallel environments
    :param optimize_memory_usage: must be False
    :param handle_timeout_termination: as in SB3
    :param n_steps: steps of the n-step returns
    :param gamma: discount factor of the n-step returns
    :param alpha: see :class:`Priorities`
    :param beta: see :class:`Priorities`
    :param final_beta: see :class:`Priorities`
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
        alpha: float = 0.6,
        beta: float = 0.4,
        final_beta: float = 1.0,
    ) -> None:
        if isinstance(observation_space, spaces.Dict):
            raise ValueError(f"`observation_space` must not be a Dict, got {observation_space}")
        if optimize_memory_usage:
            raise ValueError("`optimize_memory_usage` must be False, got True")
        check_positive_int("n_steps", n_steps)
        super().__init__(
            buffer_size,
            observation_space,
            action_space,
            device,
            n_envs=n_envs,
            handle_timeout_termination=handle_timeout_termination,
        )
        self.n_steps, self.gamma = n_steps, gamma
        self.priorities = Priorities(self.buffer_size * self.n_envs, alpha, beta, final_beta)

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
        :return: transitions with weights
        """
        indices = self.priorities.sample(batch_size)
        rows, envs = np.divmod(indices, self.n_envs)
        window = (rows[:, None] + np.arange(self.n_steps)) % self.buffer_size  # [batch_size, n_steps]
        rewards = self._normalize_reward(self.rewards[window, envs[:, None]], env)  # [batch_size, n_steps]
        ends = (self.dones[window, envs[:, None]] > 0) | (self.timeouts[window, envs[:, None]] > 0)
        # The newest row is followed by the oldest, or by nothing: a return ends there, and bootstraps
        ends |= window == (self.pos - 1) % self.buffer_size
        returns, last, discounts = n_step_returns(rewards, ends, self.gamma)
        last_rows = (rows + last) % self.buffer_size
        # Only use dones that are not due to timeouts
        dones = self.dones[last_rows, envs] * (1 - self.timeouts[last_rows, envs])
        return PrioritizedReplayBufferSamples(
            observations=self.to_torch(self._normalize_obs(self.observations[rows, envs], env)),  # type: ignore[arg-type]
            actions=self.to_torch(self.actions[rows, envs]),
            next_observations=self.to_torch(
                self._normalize_obs(self.next_observations[last_rows, envs], env)  # type: ignore[arg-type]
            ),
            dones=self.to_torch(dones.reshape(-1, 1)),
            rewards=self.to_torch(returns),
            discounts=None if self.n_steps == 1 else self.to_torch(discounts),  # None: the algorithm's gamma
            weights=self.to_torch(self.priorities.weights(indices).reshape(-1, 1)),
            indices=indices,
        )

    def update_priorities(self, indices: np.ndarray, errors: np.ndarray) -> None:
        """
        :param indices: of a sample, before another transition is added
        :param errors: of each of its transitions, shape ``(batch_size,)``
        :raises ValueError: if an error is not finite
        """
        self.priorities.update(indices, errors)

"""Proportional prioritised replay: which transitions to sample, and how much each of them counts."""

from typing import Any, NamedTuple

import numpy as np
import torch as th


class PrioritizedReplayBufferSamples(NamedTuple):
    """
    SB3's ``ReplayBufferSamples``, of a buffer that is prioritised.

    :param weights: importance-sampling weights, float32 of shape ``(batch_size, 1)``
    :param indices: what ``update_priorities()`` takes back with the errors, shape ``(batch_size,)``
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
    :param replay_buffer: any replay buffer; SB3's know nothing of priorities
    :return: whether it samples ``PrioritizedReplayBufferSamples`` and has ``update_priorities(indices, errors)``
    """
    return getattr(replay_buffer, "prioritized", False)


class BetaSchedule:
    """
    Mixin for a prioritised replay buffer: how much the weights correct for sampling by priority, linear from the beginning
    of the training to its end.
    """

    # SB3's: from 1 (beginning) to 0 (end of the training), and below for the few steps that training goes on after its end
    progress_remaining = 1.0

    def _set_betas(self, beta: float, final_beta: float) -> None:
        """
        :param beta: when training starts, from 0 (not at all) to 1
        :param final_beta: when it ends
        :raises ValueError: if one is not from 0 to 1
        """
        for name, number in dict(beta=beta, final_beta=final_beta).items():
            if not 0.0 <= number <= 1.0:
                raise ValueError(f"{name}: {number!r} was given, allowed are numbers from 0 to 1")
        self.initial_beta, self.final_beta = beta, final_beta

    @property
    def beta(self) -> float:
        """How much the weights correct now."""
        return self.final_beta + (self.initial_beta - self.final_beta) * max(self.progress_remaining, 0.0)


class SumTree:
    """
    Values that are not negative, and the sums over them that find where a prefix sum ends.

    Every node has ``FAN_OUT`` children: with numpy, a few wide levels are faster than twenty of pairs, and all sums
    together take a fifteenth of the memory of the values. A sum is always computed from its children, so rounding
    errors do not pile up.

    :param capacity: number of values (leaves), all 0 at first
    """

    FAN_OUT = 16

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        # From the leaves to the root, each of shape (nodes, FAN_OUT): entry (i, j) is child j of node i.
        # The sum of node i is entry i of the next level.
        self._levels: list[np.ndarray] = []
        n_nodes = capacity
        while n_nodes > 1 or not self._levels:
            n_nodes = -(-n_nodes // self.FAN_OUT)
            self._levels.append(np.zeros((n_nodes, self.FAN_OUT)))
        self._changed = np.zeros(len(self._levels[0]), dtype=bool)  # nodes of leaves whose sums are out of date
        self._up_to_date = True

    def set(self, indices: np.ndarray | int, values: np.ndarray | float) -> None:
        """
        Set some leaves. The sums over them are computed when they are next read.

        :param indices: of the leaves, from 0; of duplicates the last one counts
        :param values: finite and not negative, one for each index or one for all
        """
        self._leaves[indices] = values
        self._changed[indices // self.FAN_OUT] = True
        self._up_to_date = False

    def get(self, indices: np.ndarray | slice) -> np.ndarray:
        """
        :param indices: of the leaves
        :return: their values
        """
        return self._leaves[indices]

    @property
    def _leaves(self) -> np.ndarray:
        # A view, made anew each time: a copy of the tree would copy one that is kept
        return self._levels[0].reshape(-1)[: self.capacity]

    @property
    def total(self) -> float:
        """The sum of all leaves."""
        self._update_sums()
        return float(self._levels[-1].sum())

    def find(self, prefix_sums: np.ndarray) -> np.ndarray:
        """
        Find the leaves where sums over the leaves, from the first one on, exceed the given ones.

        :param prefix_sums: from 0 to (and without) ``total``, shape ``(n,)``; others are taken as the nearest of these
        :return: the indices of the leaves, shape ``(n,)``. None of them has the value 0
        :raises ValueError: if all leaves are 0
        """
        if self.total == 0.0:
            raise ValueError("All values are 0: there is nothing to be found")
        rest = np.maximum(prefix_sums, 0.0)
        nodes = np.zeros(len(rest), dtype=np.int64)
        rows = np.arange(len(rest))
        for level in reversed(self._levels):
            sums = level[nodes].cumsum(axis=1)  # [n, FAN_OUT]
            # What rounding left beyond the last child belongs to the last one that is not 0
            rest = np.minimum(rest, np.nextafter(sums[:, -1], 0.0))
            # The first whose sum exceeds the rest: never a 0, which adds nothing to the sum before it
            children = (sums <= rest[:, None]).sum(axis=1)
            rest = rest - np.where(children > 0, sums[rows, children - 1], 0.0)
            nodes = nodes * self.FAN_OUT + children
        return nodes

    def _update_sums(self) -> None:
        if self._up_to_date:
            return
        nodes = self._changed.nonzero()[0]
        self._changed[nodes] = False
        for level, parents in zip(self._levels, self._levels[1:], strict=False):
            parents.reshape(-1)[nodes] = level[nodes].sum(axis=1)
            nodes = nodes // self.FAN_OUT
        self._up_to_date = True


class Priorities:
    """
    Priorities of transitions that are sampled in proportion to ``(|error| + epsilon) ** alpha``.

    Paper: Schaul et al. 2016, https://arxiv.org/abs/1511.05952, section 3.3, equation 1 and appendix B.2.1.

    :param n: number of transitions that can be held
    :param alpha: how much priorities count: from 0 (not at all) to 1
    :param epsilon: keeps transitions without an error from never being sampled again, larger than 0
    :raises ValueError: for parameters outside of what is said here
    """

    def __init__(self, n: int, alpha: float, epsilon: float = 1e-6) -> None:
        if n < 1:
            raise ValueError(f"n: {n} was given, allowed are integers from 1")
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"alpha: {alpha} was given, allowed are numbers from 0 to 1")
        if not 0.0 < epsilon < np.inf:
            raise ValueError(f"epsilon: {epsilon} was given, allowed are finite numbers larger than 0")
        self.alpha = alpha
        self.epsilon = epsilon
        self._tree = SumTree(n)
        # The largest so far, of transitions that are gone too
        self.max_priority = 1.0

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
            raise ValueError(f"errors: {errors[~np.isfinite(errors)][0]} was given, allowed are finite numbers")
        # In float64: the tree's sums are over many of them
        values = (np.abs(errors, dtype=np.float64) + self.epsilon) ** self.alpha
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

    def weights(self, indices: np.ndarray, beta: float) -> np.ndarray:
        """
        Importance-sampling weights ``(N * P(i)) ** -beta``, divided by the largest of the batch (as in Dopamine; a
        maximum over all transitions would depend on the one with the smallest priority, rarely seen). So the
        number of transitions N and the sum of all priorities cancel out.

        :param indices: of transitions that were sampled, shape ``(batch_size,)``
        :param beta: how much of the bias is corrected: from 0 (nothing) to 1 (all)
        :return: float32 weights from 0 to 1, shape ``(batch_size,)``
        """
        values = self._tree.get(indices)
        return ((values.min() / values) ** beta).astype(np.float32)

    def clear(self) -> None:
        """Forget all transitions and the largest priority."""
        self._tree = SumTree(self._tree.capacity)
        self.max_priority = 1.0

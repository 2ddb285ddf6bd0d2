"""Updates of Q-learning algorithms from a prioritised replay buffer."""

from abc import abstractmethod
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_seer.common.priorities import PrioritizedReplayBufferSamples, is_prioritized


class WeightedUpdates(OffPolicyAlgorithm):
    """
    Mixin for an algorithm with one loss, whose ``train()`` knows nothing of priorities: DQN and what comes from it.

    With a prioritised replay buffer each transition's loss counts by its weight, and its error is its next priority
    (Schaul et al. 2016, https://arxiv.org/abs/1511.05952, Algorithm 1). With any other, ``train()`` is the algorithm's.
    """

    max_grad_norm: Any  # float, or None where the algorithm allows it

    @abstractmethod
    def _losses(self, batch: PrioritizedReplayBufferSamples) -> tuple[th.Tensor, th.Tensor]:
        """
        :param batch: a batch of transitions
        :return: the loss of each transition and its absolute error, both of shape ``(batch_size,)``
        """

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        """
        Sample the replay buffer and do the updates (gradient descent).

        :param gradient_steps: number of gradient steps
        :param batch_size: transitions in a batch
        """
        replay_buffer: Any = self.replay_buffer
        if not is_prioritized(replay_buffer):
            super().train(gradient_steps, batch_size)
            return
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)

        loss_values = []
        for _ in range(gradient_steps):
            batch = replay_buffer.sample(batch_size, env=self._vec_normalize_env)
            losses, errors = self._losses(batch)
            weights = batch.weights.squeeze(dim=1)
            # Another shape would be broadcast without a word
            assert losses.shape == errors.shape == weights.shape
            loss = (weights * losses).mean()
            loss_values.append(loss.item())

            self.policy.optimizer.zero_grad()
            loss.backward()
            if self.max_grad_norm is not None:
                th.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
            self.policy.optimizer.step()
            replay_buffer.update_priorities(batch.indices, errors.detach().cpu().numpy())

        self._n_updates += gradient_steps
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/loss", np.mean(loss_values))

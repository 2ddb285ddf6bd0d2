"""What DQN, QR-DQN and Rainbow share: updates with one loss, weighted by priorities."""

from abc import abstractmethod
from typing import Any

import torch as th
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_seer.common.priorities import PrioritizedReplayBufferSamples, is_prioritized


class WeightedUpdates(OffPolicyAlgorithm):
    """
    Mixin for an algorithm with one loss whose ``train()`` does not know priorities: DQN and its variants.

    With a prioritised replay buffer, the loss of each transition counts by its weight, and its error is its next priority
    (Schaul et al. 2016, https://arxiv.org/abs/1511.05952, Algorithm 1). With any other buffer, ``train()`` is the algorithm's.
    An algorithm without its own ``train()`` calls ``_train_on_losses()`` in both cases.
    """

    uses_priorities = True
    max_grad_norm: Any  # float, or None where the algorithm allows it

    @abstractmethod
    def _losses(self, batch: PrioritizedReplayBufferSamples) -> tuple[th.Tensor, th.Tensor]:
        """
        :param batch: a batch of transitions. The caller applies its weights
        :return: the loss of each transition and its absolute error, both of shape ``(batch_size,)``
        """

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        """
        Sample the replay buffer and do the updates (gradient descent).

        :param gradient_steps: number of gradient steps
        :param batch_size: transitions in a batch
        """
        if is_prioritized(self.replay_buffer):
            self._train_on_losses(gradient_steps, batch_size)
        else:
            super().train(gradient_steps, batch_size)

    def _train_on_losses(self, gradient_steps: int, batch_size: int) -> None:
        """
        The updates of ``DQN.train()`` with ``_losses()``, weighted if the replay buffer is prioritised.

        :param gradient_steps: number of gradient steps
        :param batch_size: transitions in a batch
        """
        replay_buffer: Any = self.replay_buffer
        prioritized = is_prioritized(replay_buffer)
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)

        # Read at the end: each .item() would make the host wait for the device
        loss_values = []
        for _ in range(gradient_steps):
            batch = replay_buffer.sample(batch_size, env=self._vec_normalize_env)
            losses, errors = self._losses(batch)
            # A wrong shape would broadcast silently
            assert losses.shape == errors.shape == (len(batch.rewards),)
            loss = (batch.weights.squeeze(dim=1) * losses).mean() if prioritized else losses.mean()
            loss_values.append(loss.detach())

            self.policy.optimizer.zero_grad()
            loss.backward()
            if self.max_grad_norm is not None:
                th.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
            self.policy.optimizer.step()
            if prioritized:
                replay_buffer.update_priorities(batch.indices, errors.detach().cpu().numpy())

        self._n_updates += gradient_steps
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/loss", th.stack(loss_values).mean().item())

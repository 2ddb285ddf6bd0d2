from typing import ClassVar

import torch as th
from sb3_contrib.common.utils import quantile_huber_loss
from sb3_contrib.qrdqn import QRDQN
from stable_baselines3.common.policies import BasePolicy

from sb3_seer.common.priorities import PrioritizedReplayBufferSamples
from sb3_seer.common.q_learning import WeightedUpdates
from sb3_seer.common.seer import SEERMixin
from sb3_seer.qrdqn.policies import CnnPolicy, MlpPolicy, MultiInputPolicy


class SEERQRDQN(SEERMixin, WeightedUpdates, QRDQN):
    """
    Quantile Regression DQN with Stored Embeddings for Efficient Reinforcement Learning (SEER).

    Paper: https://arxiv.org/abs/2103.02886 (Algorithm 1; there with Rainbow).

    All parameters of sb3-contrib's :class:`~sb3_contrib.qrdqn.QRDQN`, with the same defaults and meaning, and the parameters
    of :class:`~sb3_seer.common.seer.SEERMixin`. The updates are QRDQN's own: with ``freeze_after=None`` and no augmentation
    its weights are bit-identical to QRDQN's. With a prioritised replay buffer, each transition's loss counts by its
    weight, and is its priority: see :class:`~sb3_seer.common.q_learning.WeightedUpdates`.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }

    def _losses(self, batch: PrioritizedReplayBufferSamples) -> tuple[th.Tensor, th.Tensor]:
        discounts = batch.discounts if batch.discounts is not None else self.gamma
        with th.no_grad():
            next_quantiles = self.quantile_net_target(batch.next_observations)  # [batch_size, n_quantiles, n_actions]
            next_actions = next_quantiles.mean(dim=1, keepdim=True).argmax(dim=2, keepdim=True)  # [batch_size, 1, 1]
            next_quantiles = th.take_along_dim(next_quantiles, next_actions, dim=2).squeeze(dim=2)
            target_quantiles = batch.rewards + (1 - batch.dones) * discounts * next_quantiles  # [batch_size, n_quantiles]
        quantiles = self.quantile_net(batch.observations)
        quantiles = th.take_along_dim(quantiles, batch.actions[..., None].long(), dim=2).squeeze(dim=2)
        # The loss is a mean over the batch: each transition is a batch of one
        losses = th.vmap(quantile_huber_loss)(quantiles.unsqueeze(1), target_quantiles.unsqueeze(1))
        return losses, losses

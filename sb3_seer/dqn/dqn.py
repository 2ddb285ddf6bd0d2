from typing import ClassVar

import torch as th
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.dqn import DQN
from torch.nn import functional as F

from sb3_seer.common.priorities import PrioritizedReplayBufferSamples
from sb3_seer.common.q_learning import WeightedUpdates
from sb3_seer.common.seer import SEERMixin
from sb3_seer.dqn.policies import CnnPolicy, MlpPolicy, MultiInputPolicy


class SEERDQN(SEERMixin, WeightedUpdates, DQN):
    """
    Deep Q-Network (DQN) with Stored Embeddings for Efficient Reinforcement Learning (SEER).

    Paper: https://arxiv.org/abs/2103.02886 (Algorithm 1; there with Rainbow).

    All parameters of SB3's :class:`~stable_baselines3.dqn.DQN`, with the same defaults and meaning, and the parameters
    of :class:`~sb3_seer.common.seer.SEERMixin`. The updates are DQN's own: with ``freeze_after=None`` and no augmentation
    its weights are bit-identical to DQN's. With a prioritised replay buffer, each transition's loss counts by its
    weight, and its TD error is its priority: see :class:`~sb3_seer.common.q_learning.WeightedUpdates`.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }

    def _losses(self, batch: PrioritizedReplayBufferSamples) -> tuple[th.Tensor, th.Tensor]:
        discounts = batch.discounts if batch.discounts is not None else self.gamma
        with th.no_grad():
            next_q_values = self.q_net_target(batch.next_observations).max(dim=1, keepdim=True).values  # [batch_size, 1]
            target_q_values = batch.rewards + (1 - batch.dones) * discounts * next_q_values
        q_values = self.q_net(batch.observations).gather(dim=1, index=batch.actions.long())  # [batch_size, 1]
        losses = F.smooth_l1_loss(q_values, target_q_values, reduction="none")
        return losses.squeeze(dim=1), (target_q_values - q_values).abs().squeeze(dim=1)

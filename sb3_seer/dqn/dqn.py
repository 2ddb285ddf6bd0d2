from typing import ClassVar, TypeVar

from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.dqn import DQN

from sb3_seer.common.seer import SEERMixin
from sb3_seer.dqn.policies import CnnPolicy, MlpPolicy, MultiInputPolicy

SelfSEERDQN = TypeVar("SelfSEERDQN", bound="SEERDQN")


class SEERDQN(SEERMixin, DQN):
    """
    Deep Q-Network (DQN) with Stored Embeddings for Efficient Reinforcement Learning (SEER).

    Paper: https://arxiv.org/abs/2103.02886 (Algorithm 1; there with Rainbow).

    All parameters of SB3's :class:`~stable_baselines3.dqn.DQN`, with the same defaults and meaning, and those of
    :class:`~sb3_seer.common.seer.SEERMixin`. The updates are DQN's own: with ``freeze_after=None`` and no augmentation
    the weights end the same to the last bit.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }

    def learn(
        self: SelfSEERDQN,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "SEERDQN",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfSEERDQN:
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

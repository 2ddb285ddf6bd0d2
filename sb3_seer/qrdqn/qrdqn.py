from typing import ClassVar, TypeVar

from sb3_contrib.qrdqn import QRDQN
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import MaybeCallback

from sb3_seer.common.seer import SEERMixin
from sb3_seer.qrdqn.policies import CnnPolicy, MlpPolicy, MultiInputPolicy

SelfSEERQRDQN = TypeVar("SelfSEERQRDQN", bound="SEERQRDQN")


class SEERQRDQN(SEERMixin, QRDQN):
    """
    Quantile Regression DQN with Stored Embeddings for Efficient Reinforcement Learning (SEER).

    Paper: https://arxiv.org/abs/2103.02886 (Algorithm 1; there with Rainbow).

    All parameters of sb3-contrib's :class:`~sb3_contrib.qrdqn.QRDQN`, with the same defaults and meaning, and those of
    :class:`~sb3_seer.common.seer.SEERMixin`. The updates are QRDQN's own: with ``freeze_after=None`` and no augmentation
    the weights end the same to the last bit.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }

    def learn(
        self: SelfSEERQRDQN,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "SEERQRDQN",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfSEERQRDQN:
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

from stable_baselines3.dqn.policies import CnnPolicy as SB3CnnPolicy
from stable_baselines3.dqn.policies import DQNPolicy, MlpPolicy, QNetwork
from stable_baselines3.dqn.policies import MultiInputPolicy as SB3MultiInputPolicy

from sb3_seer.common.policies import LatentNetwork
from sb3_seer.common.q_learning import SEERQPolicy

__all__ = ["CnnPolicy", "MlpPolicy", "MultiInputPolicy"]


class LatentQNetwork(LatentNetwork, QNetwork):
    """Q-network that takes images or latents."""


class SEERDQNPolicy(SEERQPolicy, DQNPolicy):
    """Policy of ``SEERDQN``. Parameters as SB3's ``DQNPolicy``, and ``SEERPolicy``."""

    network_class = LatentQNetwork


class CnnPolicy(SEERDQNPolicy, SB3CnnPolicy):
    """Policy of ``SEERDQN`` for images."""


class MultiInputPolicy(SEERDQNPolicy, SB3MultiInputPolicy):
    """Policy of ``SEERDQN`` for ``Dict`` observations with images."""

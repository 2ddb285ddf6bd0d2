from stable_baselines3.dqn.policies import CnnPolicy as SB3CnnPolicy
from stable_baselines3.dqn.policies import MlpPolicy
from stable_baselines3.dqn.policies import MultiInputPolicy as SB3MultiInputPolicy

from sb3_seer.common.policies import SEERPolicy

__all__ = ["CnnPolicy", "MlpPolicy", "MultiInputPolicy"]


class CnnPolicy(SEERPolicy, SB3CnnPolicy):
    """Policy of ``SEERDQN`` for images. Parameters as SB3's policy, and ``SEERPolicy``."""


class MultiInputPolicy(SEERPolicy, SB3MultiInputPolicy):
    """Policy of ``SEERDQN`` for ``Dict`` observations with images. Parameters as SB3's policy, and ``SEERPolicy``."""

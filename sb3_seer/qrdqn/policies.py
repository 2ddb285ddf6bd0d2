from sb3_contrib.qrdqn.policies import CnnPolicy as SB3CnnPolicy
from sb3_contrib.qrdqn.policies import MlpPolicy
from sb3_contrib.qrdqn.policies import MultiInputPolicy as SB3MultiInputPolicy

from sb3_seer.common.policies import SEERPolicy

__all__ = ["CnnPolicy", "MlpPolicy", "MultiInputPolicy"]


class CnnPolicy(SEERPolicy, SB3CnnPolicy):
    """Policy of ``SEERQRDQN`` for images. Parameters as sb3-contrib's policy, and ``SEERPolicy``."""


class MultiInputPolicy(SEERPolicy, SB3MultiInputPolicy):
    """Policy of ``SEERQRDQN`` for ``Dict`` observations. Parameters as sb3-contrib's policy, and ``SEERPolicy``."""

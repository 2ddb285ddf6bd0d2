from sb3_seer.common.policies import SEERPolicy
from sb3_seer.rainbow.policies import CnnPolicy as RainbowCnnPolicy
from sb3_seer.rainbow.policies import MlpPolicy
from sb3_seer.rainbow.policies import MultiInputPolicy as RainbowMultiInputPolicy

__all__ = ["CnnPolicy", "MlpPolicy", "MultiInputPolicy"]


class CnnPolicy(SEERPolicy, RainbowCnnPolicy):
    """Policy of ``SEERRainbow`` for images. Parameters as Rainbow's policy, and ``SEERPolicy``."""


class MultiInputPolicy(SEERPolicy, RainbowMultiInputPolicy):
    """Policy of ``SEERRainbow`` for ``Dict`` observations with images. Parameters as Rainbow's policy, and ``SEERPolicy``."""

from sb3_seer.common.policies import LatentNetwork
from sb3_seer.common.q_learning import SEERQPolicy
from sb3_seer.rainbow.policies import CnnPolicy as RainbowCnnPolicy
from sb3_seer.rainbow.policies import MlpPolicy, RainbowNetwork, RainbowPolicy
from sb3_seer.rainbow.policies import MultiInputPolicy as RainbowMultiInputPolicy

__all__ = ["CnnPolicy", "MlpPolicy", "MultiInputPolicy"]


class LatentRainbowNetwork(LatentNetwork, RainbowNetwork):
    """Rainbow network that takes images or latents."""


class SEERRainbowPolicy(SEERQPolicy, RainbowPolicy):
    """Policy of ``SEERRainbow``. Parameters as ``RainbowPolicy``, and ``SEERPolicy``."""

    network_class = LatentRainbowNetwork


class CnnPolicy(SEERRainbowPolicy, RainbowCnnPolicy):
    """Policy of ``SEERRainbow`` for images."""


class MultiInputPolicy(SEERRainbowPolicy, RainbowMultiInputPolicy):
    """Policy of ``SEERRainbow`` for ``Dict`` observations with images."""

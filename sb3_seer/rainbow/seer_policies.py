from stable_baselines3.common.type_aliases import Schedule

from sb3_seer.common.policies import LatentNetwork, SEERPolicy
from sb3_seer.rainbow.policies import CnnPolicy as RainbowCnnPolicy
from sb3_seer.rainbow.policies import MlpPolicy, RainbowNetwork, RainbowPolicy
from sb3_seer.rainbow.policies import MultiInputPolicy as RainbowMultiInputPolicy

__all__ = ["CnnPolicy", "MlpPolicy", "MultiInputPolicy"]


class LatentRainbowNetwork(LatentNetwork, RainbowNetwork):
    """Rainbow network that takes images or latents."""


class SEERRainbowPolicy(SEERPolicy, RainbowPolicy):
    """Policy of ``SEERRainbow``. Parameters as ``RainbowPolicy``, and ``SEERPolicy``."""

    q_net: LatentRainbowNetwork
    q_net_target: LatentRainbowNetwork

    def _build(self, lr_schedule: Schedule) -> None:
        self.net_args["observation_space"] = self.image_space
        super()._build(lr_schedule)

    def make_q_net(self) -> LatentRainbowNetwork:
        return LatentRainbowNetwork(**self._update_features_extractor(self.net_args)).to(self.device)

    @property
    def encoder_networks(self) -> list[LatentNetwork]:
        return [self.q_net]

    @property
    def target_networks(self) -> list[LatentNetwork]:
        return [self.q_net_target]


class CnnPolicy(SEERRainbowPolicy, RainbowCnnPolicy):
    """Policy of ``SEERRainbow`` for images."""


class MultiInputPolicy(SEERRainbowPolicy, RainbowMultiInputPolicy):
    """Policy of ``SEERRainbow`` for ``Dict`` observations with images."""

from sb3_contrib.qrdqn.policies import CnnPolicy as SB3CnnPolicy
from sb3_contrib.qrdqn.policies import MlpPolicy, QRDQNPolicy, QuantileNetwork
from sb3_contrib.qrdqn.policies import MultiInputPolicy as SB3MultiInputPolicy
from stable_baselines3.common.type_aliases import Schedule

from sb3_seer.common.policies import LatentNetwork, SEERPolicy

__all__ = ["CnnPolicy", "MlpPolicy", "MultiInputPolicy"]


class LatentQuantileNetwork(LatentNetwork, QuantileNetwork):
    """Quantile network that takes images or latents."""


class SEERQRDQNPolicy(SEERPolicy, QRDQNPolicy):
    """Policy of ``SEERQRDQN``. Parameters as sb3-contrib's ``QRDQNPolicy``, and ``SEERPolicy``."""

    quantile_net: LatentQuantileNetwork
    quantile_net_target: LatentQuantileNetwork

    def _build(self, lr_schedule: Schedule) -> None:
        self.net_args["observation_space"] = self.image_space
        super()._build(lr_schedule)

    def make_quantile_net(self) -> LatentQuantileNetwork:
        return LatentQuantileNetwork(**self._update_features_extractor(self.net_args)).to(self.device)

    @property
    def encoder_networks(self) -> list[LatentNetwork]:
        return [self.quantile_net]

    @property
    def target_networks(self) -> list[LatentNetwork]:
        return [self.quantile_net_target]


class CnnPolicy(SEERQRDQNPolicy, SB3CnnPolicy):
    """Policy of ``SEERQRDQN`` for images."""


class MultiInputPolicy(SEERQRDQNPolicy, SB3MultiInputPolicy):
    """Policy of ``SEERQRDQN`` for ``Dict`` observations with images."""

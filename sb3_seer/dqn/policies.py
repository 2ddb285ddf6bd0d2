from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.dqn.policies import CnnPolicy as SB3CnnPolicy
from stable_baselines3.dqn.policies import DQNPolicy, MlpPolicy, QNetwork
from stable_baselines3.dqn.policies import MultiInputPolicy as SB3MultiInputPolicy

from sb3_seer.common.policies import LatentNetwork, SEERPolicy

__all__ = ["CnnPolicy", "MlpPolicy", "MultiInputPolicy"]


class LatentQNetwork(LatentNetwork, QNetwork):
    """Q-network that takes images or latents."""


class SEERDQNPolicy(SEERPolicy, DQNPolicy):
    """Policy of ``SEERDQN``. Parameters as SB3's ``DQNPolicy``, and ``SEERPolicy``."""

    q_net: LatentQNetwork
    q_net_target: LatentQNetwork

    def _build(self, lr_schedule: Schedule) -> None:
        self.net_args["observation_space"] = self.image_space
        super()._build(lr_schedule)

    def make_q_net(self) -> LatentQNetwork:
        return LatentQNetwork(**self._update_features_extractor(self.net_args)).to(self.device)

    @property
    def encoder_networks(self) -> list[LatentNetwork]:
        return [self.q_net]

    @property
    def target_networks(self) -> list[LatentNetwork]:
        return [self.q_net_target]


class CnnPolicy(SEERDQNPolicy, SB3CnnPolicy):
    """Policy of ``SEERDQN`` for images."""


class MultiInputPolicy(SEERDQNPolicy, SB3MultiInputPolicy):
    """Policy of ``SEERDQN`` for ``Dict`` observations with images."""

from sb3_contrib.qrdqn.policies import CnnPolicy as SB3CnnPolicy
from sb3_contrib.qrdqn.policies import MlpPolicy, QRDQNPolicy, QuantileNetwork
from sb3_contrib.qrdqn.policies import MultiInputPolicy as SB3MultiInputPolicy

from sb3_seer.common.policies import LatentNetwork
from sb3_seer.common.q_learning import SEERQPolicy

__all__ = ["CnnPolicy", "MlpPolicy", "MultiInputPolicy"]


class LatentQuantileNetwork(LatentNetwork, QuantileNetwork):
    """Quantile network that takes images or latents."""


class SEERQRDQNPolicy(SEERQPolicy, QRDQNPolicy):
    """Policy of ``SEERQRDQN``. Parameters as sb3-contrib's ``QRDQNPolicy``, and ``SEERPolicy``."""

    network_class = LatentQuantileNetwork
    network_name = "quantile_net"
    make_quantile_net = SEERQPolicy.make_q_net


class CnnPolicy(SEERQRDQNPolicy, SB3CnnPolicy):
    """Policy of ``SEERQRDQN`` for images."""


class MultiInputPolicy(SEERQRDQNPolicy, SB3MultiInputPolicy):
    """Policy of ``SEERQRDQN`` for ``Dict`` observations with images."""

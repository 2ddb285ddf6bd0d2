from stable_baselines3.td3.policies import CnnPolicy as SB3CnnPolicy
from stable_baselines3.td3.policies import MlpPolicy, TD3Policy
from stable_baselines3.td3.policies import MultiInputPolicy as SB3MultiInputPolicy

from sb3_seer.common.actor_critic import SEERActorCriticPolicy

__all__ = ["CnnPolicy", "MlpPolicy", "MultiInputPolicy"]


class SEERTD3Policy(SEERActorCriticPolicy, TD3Policy):
    """
    Policy of ``SEERTD3``. Parameters as SB3's ``TD3Policy`` and
    :class:`~sb3_seer.common.actor_critic.SEERActorCriticPolicy`.
    """

    only_targets_see_next = True


class CnnPolicy(SEERTD3Policy, SB3CnnPolicy):
    """Policy of ``SEERTD3`` for images: see :class:`SEERTD3Policy`."""


class MultiInputPolicy(SEERTD3Policy, SB3MultiInputPolicy):
    """Policy of ``SEERTD3`` for ``Dict`` observations with images: see :class:`SEERTD3Policy`."""

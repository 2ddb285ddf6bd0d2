from sb3_contrib.tqc.policies import CnnPolicy as SB3CnnPolicy
from sb3_contrib.tqc.policies import MlpPolicy
from sb3_contrib.tqc.policies import MultiInputPolicy as SB3MultiInputPolicy

from sb3_seer.common.actor_critic import SEERActorCriticPolicy

__all__ = ["CnnPolicy", "MlpPolicy", "MultiInputPolicy"]


class CnnPolicy(SEERActorCriticPolicy, SB3CnnPolicy):
    """
    Policy of ``SEERTQC`` for images. Parameters as sb3-contrib's policy, and
    :class:`~sb3_seer.common.actor_critic.SEERActorCriticPolicy`.
    """


class MultiInputPolicy(SEERActorCriticPolicy, SB3MultiInputPolicy):
    """
    Policy of ``SEERTQC`` for ``Dict`` observations with images. Parameters as sb3-contrib's policy, and
    :class:`~sb3_seer.common.actor_critic.SEERActorCriticPolicy`.
    """

from typing import ClassVar

from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.td3 import TD3

from sb3_seer.common.flops import Passes
from sb3_seer.common.seer import SEERMixin
from sb3_seer.td3.policies import CnnPolicy, MlpPolicy, MultiInputPolicy


class SEERTD3(SEERMixin, TD3):
    """
    Twin Delayed DDPG (TD3) with Stored Embeddings for Efficient Reinforcement Learning (SEER).

    Paper: https://arxiv.org/abs/2103.02886 (Algorithm 1; there with SAC).

    All parameters of SB3's :class:`~stable_baselines3.td3.TD3`, with the same defaults and meaning, and the parameters
    of :class:`~sb3_seer.common.seer.SEERMixin`. The updates are TD3's own, on the networks of
    :class:`~sb3_seer.common.actor_critic.SEERActorCriticPolicy`: actor and critic share their convolutions, which the critic's
    loss trains. With ``policy_kwargs=dict(tie_convolutions=False)``, ``freeze_after=None`` and no augmentation its weights
    are bit-identical to TD3's.

    With n-step returns, a random shift, exploration noise that falls over a schedule, ``PixelEncoder(tanh=True)`` and
    ``ortho_init`` it follows DrQ-v2 (https://arxiv.org/abs/2107.09645): see ``hyperparams/td3_seer.yml``.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }

    @property
    def flops_passes(self) -> Passes:
        """
        Encoders: of the observations, and of the next ones by the targets. Heads: with a delay of 2, right within about 10 %.
        """
        if getattr(self.policy, "tie_convolutions", False):
            return Passes(2, 1)
        # Each network encodes for itself, the actor and the critic once more in the actor's loss
        return Passes(2, 1, encoder_forward=1 + 2 / self.policy_delay, encoder_backward=1 / self.policy_delay)

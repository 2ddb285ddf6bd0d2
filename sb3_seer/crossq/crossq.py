from typing import ClassVar

from gymnasium import spaces
from sb3_contrib.crossq import CrossQ
from stable_baselines3.common.policies import BasePolicy

from sb3_seer.common.flops import Passes
from sb3_seer.common.seer import SEERMixin
from sb3_seer.crossq.policies import CnnPolicy, MlpPolicy, MultiInputPolicy


class SEERCrossQ(SEERMixin, CrossQ):
    """
    CrossQ with Stored Embeddings for Efficient Reinforcement Learning (SEER).

    Paper: https://arxiv.org/abs/2103.02886 (Algorithm 1; there with SAC).

    All parameters of sb3-contrib's :class:`~sb3_contrib.crossq.CrossQ`, with the same defaults and meaning, and the parameters
    of :class:`~sb3_seer.common.seer.SEERMixin`. The updates are CrossQ's own, on the networks of
    :class:`~sb3_seer.common.actor_critic.SEERActorCriticPolicy`: actor and critic share their convolutions, which the critic's
    loss trains. With ``policy_kwargs=dict(tie_convolutions=False)``, ``freeze_after=None`` and no augmentation its weights
    are bit-identical to CrossQ's.

    CrossQ has no target networks: the critic sees observations and next observations in one batch. With tied convolutions,
    the gradient that batch normalisation sends to the next observations ends at their latents.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }

    def _set_up_without_encoder(self, why_not: str) -> None:
        if isinstance(self.observation_space, spaces.Dict):  # CrossQ has no policy for them
            raise ValueError(f"With Dict observations SEERCrossQ needs an encoder to freeze, got none {why_not}")
        super()._set_up_without_encoder(why_not)

    @property
    def flops_passes(self) -> Passes:
        """
        The critic sees observations and next ones at once, forward and backward. Heads: with a delay of 3, right within about
        15 %, whether the actor is as wide as the critics or much narrower.
        """
        if getattr(self.policy, "tie_convolutions", False):
            return Passes(2, 2, encoder_backward=-1)  # back through the observations alone
        # The actor encodes the next observations; in its loss, actor and critic encode the observations once more
        return Passes(2, 2, encoder_forward=1 + 2 / self.policy_delay, encoder_backward=2 / self.policy_delay)

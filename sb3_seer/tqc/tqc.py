from typing import ClassVar

from sb3_contrib.tqc import TQC
from stable_baselines3.common.policies import BasePolicy

from sb3_seer.common.flops import Passes
from sb3_seer.common.seer import SEERMixin
from sb3_seer.tqc.policies import CnnPolicy, MlpPolicy, MultiInputPolicy


class SEERTQC(SEERMixin, TQC):
    """
    Truncated Quantile Critics (TQC) with Stored Embeddings for Efficient Reinforcement Learning (SEER).

    Paper: https://arxiv.org/abs/2103.02886 (Algorithm 1; there with SAC).

    All parameters of sb3-contrib's :class:`~sb3_contrib.tqc.TQC`, with the same defaults and meaning, and the parameters
    of :class:`~sb3_seer.common.seer.SEERMixin`. The updates are TQC's own, on the networks of
    :class:`~sb3_seer.common.actor_critic.SEERActorCriticPolicy`: actor and critic share their convolutions, which the critic's
    loss trains. With ``policy_kwargs=dict(tie_convolutions=False)``, ``freeze_after=None`` and no augmentation its weights
    are bit-identical to TQC's.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }

    @property
    def flops_passes(self) -> Passes:
        """
        Of the observations, and of the next ones for the actor and for the target. The critic goes back in both losses: its
        heads, and without tied convolutions its encoder.
        """
        if getattr(self.policy, "tie_convolutions", False):
            return Passes(3, 2, encoder_backward=-1)  # the critic's loss alone goes back through the convolutions
        # Each network encodes for itself. A shared encoder is trained by the actor's loss alone
        return Passes(3, 2, encoder_forward=2, encoder_backward=-1 if self.policy.share_features_extractor else 1)

from typing import Any, ClassVar

from stable_baselines3.common.policies import BasePolicy
from torch import nn

from sb3_seer.common.replay import LatentReplayBuffer
from sb3_seer.common.seer import SEERMixin
from sb3_seer.rainbow.rainbow import Rainbow
from sb3_seer.rainbow.seer_policies import CnnPolicy, MlpPolicy, MultiInputPolicy


class SEERRainbow(SEERMixin, Rainbow):
    """
    Rainbow with Stored Embeddings for Efficient Reinforcement Learning (SEER).

    Paper: https://arxiv.org/abs/2103.02886 (Algorithm 1).

    All parameters of :class:`~sb3_seer.rainbow.rainbow.Rainbow`, with the same defaults and meaning, and the
    parameters of :class:`~sb3_seer.common.seer.SEERMixin`. The updates are Rainbow's own: with ``freeze_after=None`` and no
    augmentation its weights are bit-identical to Rainbow's.

    Differences from the released code: at the freeze the whole target network, not only its convolutions, becomes
    equal to the online one (as the released code does for control); the replay buffer grows at once, in chronological
    order; the first observation of an episode is stored as the agent saw it.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }

    def _make_replay_buffer(self, augmentation: nn.Module | None, **overrides: Any) -> LatentReplayBuffer:
        kwargs = {**self._priority_kwargs(LatentReplayBuffer), **self.replay_buffer_kwargs, **overrides}
        return super()._make_replay_buffer(augmentation, **kwargs)

from typing import Any

from gymnasium import spaces
from sb3_contrib.crossq.policies import CrossQPolicy, MlpPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, NatureCNN

from sb3_seer.common.actor_critic import SEERActorCriticPolicy

__all__ = ["CnnPolicy", "MlpPolicy", "MultiInputPolicy"]


class CnnPolicy(SEERActorCriticPolicy, CrossQPolicy):
    """
    Policy of ``SEERCrossQ`` for images. Parameters as sb3-contrib's ``CrossQPolicy``, which has none for images, and
    :class:`~sb3_seer.common.actor_critic.SEERActorCriticPolicy`.

    :param features_extractor_class: features extractor to use
    """

    def __init__(self, *args: Any, features_extractor_class: type[BaseFeaturesExtractor] = NatureCNN, **kwargs: Any) -> None:
        super().__init__(*args, features_extractor_class=features_extractor_class, **kwargs)


class MultiInputPolicy(SEERActorCriticPolicy, CrossQPolicy):
    """
    Policy of ``SEERCrossQ`` for ``Dict`` observations with images. Parameters as sb3-contrib's ``CrossQPolicy``, which takes
    no ``Dict``, and :class:`~sb3_seer.common.actor_critic.SEERActorCriticPolicy`.

    :param features_extractor_class: features extractor to use
    :raises ValueError: without tied convolutions: CrossQ concatenates observations, which cannot be dicts of images
    """

    def __init__(
        self,
        observation_space: spaces.Dict,
        *args: Any,
        features_extractor_class: type[BaseFeaturesExtractor] = CombinedExtractor,
        tie_convolutions: bool = True,
        **kwargs: Any,
    ) -> None:
        if not tie_convolutions:
            raise ValueError("`tie_convolutions` must be True with SEERCrossQ and Dict observations, got False")
        super().__init__(observation_space, *args, features_extractor_class=features_extractor_class, **kwargs)

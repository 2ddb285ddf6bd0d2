from typing import Any

import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.sac.policies import CnnPolicy as SB3CnnPolicy
from stable_baselines3.sac.policies import MlpPolicy
from stable_baselines3.sac.policies import MultiInputPolicy as SB3MultiInputPolicy

from sb3_seer.common.extractors import SplitExtractor, split
from sb3_seer.common.policies import LatentNetwork
from sb3_seer.sac.policies import SEERSACPolicy, split_parameters

__all__ = ["CnnPolicy", "MlpPolicy", "MultiInputPolicy"]

# Index of the features extractor's parameter group in the optimizers of actor and critic
EXTRACTOR_GROUP = 1


class SEERCURLPolicy(SEERSACPolicy):
    """
    Policy of ``SEERCURL``: the policy of ``SEERSAC``, with a parameter group of their own for the features extractors, and
    with the features that the contrastive loss compares.
    """

    def _parameter_groups(self, network: LatentNetwork) -> list[dict[str, Any]]:
        return [dict(params=part) for part in split_parameters(network)]

    def contrastive_features(self, critic: Any, images: PyTorchObs) -> th.Tensor:
        """
        :param critic: the critic, or the target critic
        :param images: augmented images, shape ``(batch_size, channels, height, width)``; of ``Dict`` observations, by key
        :return: features of the images alone, shape ``(batch_size, n_image_features)``: in a contrastive loss, the other keys
            of a ``Dict`` would tell an observation from all others at once
        """
        (latents,) = self._encode(images, [critic])
        return self._image_features(critic, latents)

    @property
    def n_image_features(self) -> int:
        """numbers in the ``contrastive_features`` of an observation"""
        _, latent_dim = self.latent_shape
        with th.no_grad():
            return self._image_features(self.critic_target, th.zeros(1, latent_dim, device=self.device)).shape[1]

    @staticmethod
    def _image_features(critic: Any, latents: th.Tensor) -> th.Tensor:
        extractor = split(critic.features_extractor)
        return extractor.head(latents) if isinstance(extractor, SplitExtractor) else latents


class CnnPolicy(SEERCURLPolicy, SB3CnnPolicy):
    """Policy of ``SEERCURL`` for images: see :class:`SEERCURLPolicy`."""


class MultiInputPolicy(SEERCURLPolicy, SB3MultiInputPolicy):
    """Policy of ``SEERCURL`` for ``Dict`` observations with images: see :class:`SEERCURLPolicy`."""

import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.sac.policies import CnnPolicy as SB3CnnPolicy
from stable_baselines3.sac.policies import MlpPolicy
from stable_baselines3.sac.policies import MultiInputPolicy as SB3MultiInputPolicy
from torch import nn

from sb3_seer.common.extractors import SplitExtractor, split
from sb3_seer.common.policies import LatentNetwork
from sb3_seer.sac.policies import LatentCritic, SEERSACPolicy

__all__ = ["CnnPolicy", "MlpPolicy", "MultiInputPolicy"]

# Of the actor's and of the critic's optimizer: the parameter group with a learning rate of its own
EXTRACTOR_GROUP = 1


def split_parameters(network: LatentNetwork) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """
    :param network: an actor or a critic
    :return: its parameters that are not its features extractor's, and those that are; a frozen encoder's are left out
    """
    extractor_parameters = set(network.features_extractor.parameters())
    parameters = list(network.parameters())
    return (
        [parameter for parameter in parameters if parameter not in extractor_parameters],
        [parameter for parameter in parameters if parameter in extractor_parameters],
    )


class SEERCURLPolicy(SEERSACPolicy):
    """
    Policy of ``SEERCURL``: that of ``SEERSAC``, whose optimizers know the features extractors from the rest, and which
    says what a contrastive loss compares.
    """

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        for network in (self.actor, self.critic):
            trained = {parameter for group in network.optimizer.param_groups for parameter in group["params"]}
            groups = [
                dict(params=[parameter for parameter in part if parameter in trained]) for part in split_parameters(network)
            ]
            network.optimizer = self.optimizer_class(groups, lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    def contrastive_features(self, critic: LatentCritic, images: PyTorchObs) -> th.Tensor:
        """
        :param critic: the critic, or the target critic
        :param images: augmented images, shape ``(batch_size, channels, height, width)``; of ``Dict`` observations, by key
        :return: what the head of its features extractor makes of the images alone, shape ``(batch_size, n_features)``:
            other keys would tell an observation from all others at once
        """
        return self._contrastive_head(critic, self._encode(images, [critic]).values[:, 0])

    @property
    def n_contrastive_features(self) -> int:
        """numbers in the ``contrastive_features`` of an image"""
        latents = th.zeros(1, self.latent_shape[1], device=self.device)
        with th.no_grad():
            return self._contrastive_head(self.critic_target, latents).shape[1]

    @staticmethod
    def _contrastive_head(critic: LatentCritic, latents: th.Tensor) -> th.Tensor:
        extractor = split(critic.features_extractor)
        return extractor.head(latents) if isinstance(extractor, SplitExtractor) else latents


class CnnPolicy(SEERCURLPolicy, SB3CnnPolicy):
    """Policy of ``SEERCURL`` for images: see :class:`SEERCURLPolicy`."""


class MultiInputPolicy(SEERCURLPolicy, SB3MultiInputPolicy):
    """Policy of ``SEERCURL`` for ``Dict`` observations with images: see :class:`SEERCURLPolicy`."""

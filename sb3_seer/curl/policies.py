import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.sac.policies import CnnPolicy as SB3CnnPolicy
from stable_baselines3.sac.policies import MlpPolicy
from stable_baselines3.sac.policies import MultiInputPolicy as SB3MultiInputPolicy

from sb3_seer.sac.policies import LatentCritic, SEERSACPolicy, split_parameters

__all__ = ["CnnPolicy", "MlpPolicy", "MultiInputPolicy"]

# Index of the features extractor's parameter group in the optimizers of actor and critic
EXTRACTOR_GROUP = 1


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
        :return: see ``image_features()``, shape ``(batch_size, n_features)``
        """
        return self.image_features(critic, self._encode(images, [critic]))


class CnnPolicy(SEERCURLPolicy, SB3CnnPolicy):
    """Policy of ``SEERCURL`` for images: see :class:`SEERCURLPolicy`."""


class MultiInputPolicy(SEERCURLPolicy, SB3MultiInputPolicy):
    """Policy of ``SEERCURL`` for ``Dict`` observations with images: see :class:`SEERCURLPolicy`."""

from typing import Any

import torch as th
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.sac.policies import Actor, MlpPolicy, SACPolicy
from stable_baselines3.sac.policies import CnnPolicy as SB3CnnPolicy
from stable_baselines3.sac.policies import MultiInputPolicy as SB3MultiInputPolicy
from torch import nn

from sb3_seer.common.extractors import SplitExtractor
from sb3_seer.common.policies import LatentNetwork, SEERPolicy
from sb3_seer.common.type_aliases import Latents

__all__ = ["CnnPolicy", "MlpPolicy", "MultiInputPolicy"]


class LatentCritic(LatentNetwork, ContinuousCritic):
    """Q-networks that take images or latents."""


class LatentActor(LatentNetwork, Actor):
    """Actor that takes images or latents. Its loss trains what is its own, never what it has from the critic."""

    def extract_features(self, obs: PyTorchObs | Latents, features_extractor: BaseFeaturesExtractor) -> th.Tensor:
        if isinstance(obs, Latents) and self.latent_index == LatentCritic.latent_index:
            obs = obs.detach()
        features = super().extract_features(obs, features_extractor)
        return features.detach() if self.shares_extractor else features

    shares_extractor = False


class SEERSACPolicy(SEERPolicy, SACPolicy):
    """
    Policy of ``SEERSAC``. Parameters as SB3's ``SACPolicy``, and ``SEERPolicy``.

    The critic's loss trains the encoder, the actor learns from what that puts out (SAC-AE, DrQ, CURL). In SB3
    the actor's loss trains a shared features extractor, and separate ones run the convolutions five times
    in a gradient step instead of three.

    :param share_features_extractor: If False, the actor shares the critic's convolutions and has a projection
        and a head of its own, as in the paper (N = 2 latents if there is a projection). If True, it shares all of
        the critic's extractor (N = 1). An extractor that is no ``SplitExtractor`` is always shared: nothing tells
        its convolutions from the rest. Convolutions that come after the freeze (``freeze_at``) are shared as well, so the
        actor's loss never trains one; they run once for each network, and N = 1.
    :param optimizer_kwargs: as in SB3; Adam is fused unless they say otherwise: the same updates in one pass over the weights
    """

    actor: LatentActor
    critic: LatentCritic
    critic_target: LatentCritic

    def _build(self, lr_schedule: Schedule) -> None:
        if self.optimizer_class in (th.optim.Adam, th.optim.AdamW) and "foreach" not in self.optimizer_kwargs:
            self.optimizer_kwargs = {"fused": True, **self.optimizer_kwargs}
        for kwargs in (self.actor_kwargs, self.critic_kwargs):
            kwargs["observation_space"] = self.image_space

        self.critic = self.make_critic()
        self.critic_target = self.make_critic()
        self.critic_target.load_state_dict(self.critic.state_dict())
        self.critic_target.set_training_mode(False)

        extractor = self.critic.features_extractor
        if isinstance(extractor, SplitExtractor) and not self.share_features_extractor:
            own_extractor = self.make_features_extractor()
            assert isinstance(own_extractor, SplitExtractor)
            own_extractor.share_convolutions(extractor)
            self.actor = self.make_actor(own_extractor)
            has_projection = any(True for _ in extractor.projection.parameters())
            self.actor.latent_index = int(has_projection)
        else:
            self.actor = self.make_actor(extractor)
            self.actor.shares_extractor = True

        optimizer_kwargs: dict[str, Any] = dict(lr=lr_schedule(1), **self.optimizer_kwargs)
        self.critic.optimizer = self.optimizer_class(self.critic.parameters(), **optimizer_kwargs)
        self.actor.optimizer = self.optimizer_class(self.actor_parameters(), **optimizer_kwargs)

    def actor_parameters(self) -> list[nn.Parameter]:
        """:return: what the actor's loss trains: all of the actor that learns and is not the critic's"""
        critic_parameters = set(self.critic.parameters())
        return [parameter for parameter in self.actor.parameters() if parameter not in critic_parameters]

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> LatentActor:
        return LatentActor(**self._update_features_extractor(self.actor_kwargs, features_extractor)).to(self.device)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> LatentCritic:
        kwargs = self._update_features_extractor(self.critic_kwargs, features_extractor)
        # In SB3 this flag keeps the critic's loss from training the extractor: the opposite of what is done here
        return LatentCritic(**{**kwargs, "share_features_extractor": False}).to(self.device)

    @property
    def encoder_networks(self) -> list[LatentNetwork]:
        return [self.critic, self.actor][: self.actor.latent_index + 1]

    @property
    def target_networks(self) -> list[LatentNetwork]:
        return [self.critic_target]

    def encode_batch(self, observations: PyTorchObs | Latents, next_observations: PyTorchObs | Latents) -> "EncodedBatch":
        """
        Encode a batch for a gradient step, each image once for each set of convolutions. Latents stay as they are.

        :param observations: augmented images, a dict with some, or latents
        :param next_observations: likewise
        :return: latents of the observations, for the critic with the graph that trains the encoder; and of the next
            observations, without a graph, for the actor and for the target critic
        """
        if isinstance(observations, Latents) or isinstance(next_observations, Latents):
            assert isinstance(observations, Latents) and isinstance(next_observations, Latents)
            return observations, next_observations, next_observations
        latents = self._encode(observations, self.encoder_networks, detach_after_first=True)
        with th.no_grad():
            # In one call, so that the images become floats once
            both = self._encode(next_observations, [*self.encoder_networks, *self.target_networks])
        n = len(self.encoder_networks)
        return latents, Latents(both.values[:, :n], both.vector_obs), Latents(both.values[:, n:], both.vector_obs)


class CnnPolicy(SEERSACPolicy, SB3CnnPolicy):
    """Policy of ``SEERSAC`` for images: see :class:`SEERSACPolicy`."""


class MultiInputPolicy(SEERSACPolicy, SB3MultiInputPolicy):
    """Policy of ``SEERSAC`` for ``Dict`` observations with images: see :class:`SEERSACPolicy`."""


EncodedBatch = tuple[Latents, Latents, Latents]

from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.sac.policies import Actor, MlpPolicy, SACPolicy
from stable_baselines3.sac.policies import CnnPolicy as SB3CnnPolicy
from stable_baselines3.sac.policies import MultiInputPolicy as SB3MultiInputPolicy
from torch import nn

from sb3_seer.common.extractors import SplitExtractor, split
from sb3_seer.common.policies import LatentNetwork, SEERPolicy
from sb3_seer.common.type_aliases import Latents
from sb3_seer.common.warn import warn

__all__ = ["CnnPolicy", "MlpPolicy", "MultiInputPolicy"]


EncodedBatch = tuple[Latents, Latents, Latents]


class LatentCritic(LatentNetwork, ContinuousCritic):
    """Q-networks that take images or latents."""


class LatentActor(LatentNetwork, Actor):
    """
    Actor that takes images or latents. Its loss trains its own weights, never those that it shares with the critic.

    :param log_std_bounds: see :class:`SEERSACPolicy`
    """

    shares_extractor = False

    def __init__(self, *args: Any, log_std_bounds: tuple[float, float] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.log_std_bounds = log_std_bounds

    def extract_features(self, obs: PyTorchObs | Latents, features_extractor: BaseFeaturesExtractor) -> th.Tensor:
        if isinstance(obs, Latents) and self.latent_index == LatentCritic.latent_index:
            obs = obs.detach()
        features = super().extract_features(obs, features_extractor)
        return features.detach() if self.shares_extractor else features

    def get_action_dist_params(self, obs: PyTorchObs) -> tuple[th.Tensor, th.Tensor, dict[str, th.Tensor]]:
        """
        :param obs: images or latents
        :return: mean and log standard deviation of the actions before the tanh, both of shape ``(batch_size, action_dim)``,
            and optional keyword arguments
        """
        if self.log_std_bounds is None:
            return super().get_action_dist_params(obs)
        latent_pi = self.latent_pi(self.extract_features(obs, self.features_extractor))
        low, high = self.log_std_bounds
        log_std = th.tanh(self.log_std(latent_pi))  # type: ignore[operator]  # a layer, as gSDE is refused
        log_std = low + 0.5 * (high - low) * (log_std + 1.0)
        return self.mu(latent_pi), log_std, {}


class SEERSACPolicy(SEERPolicy, SACPolicy):
    """
    Policy of ``SEERSAC``. Parameters as SB3's ``SACPolicy`` and ``SEERPolicy``, and those listed here.

    The critic's loss trains the encoder, and the actor learns from its latents (SAC-AE, CURL, DrQ). In SB3
    the actor's loss trains a shared features extractor, and separate ones run the convolutions five times
    in a gradient step instead of three.

    :param share_features_extractor: If False, the actor shares the critic's convolutions and has a projection
        and a head of its own, as in the paper (N = 2 latents if there is a projection). If True, it shares all of
        the critic's extractor (N = 1). Only a ``SplitExtractor`` tells its convolutions from the rest: any other is always
        shared (a warning says so if False was asked for). Convolutions after the freeze (``freeze_at``) are shared as well,
        so the actor's loss never trains one; they run once for each network, and N = 1. None: False where that is possible
    :param ortho_init: orthogonal weights and zero biases for the linear layers of actor and critics (CURL, DrQ:
        https://arxiv.org/abs/2004.13649, appendix), in place of PyTorch's default
    :param log_std_bounds: squash the actor's log standard deviation into this range by a tanh ((-10, 2) in SAC-AE, CURL and
        DrQ). None: clamp it into [-20, 2], as SB3 does
    :param optimizer_kwargs: as in SB3; Adam is fused unless they say otherwise: the same updates in one pass over the weights
    :raises ValueError: for ``log_std_bounds`` that are not two increasing numbers, or together with gSDE
    """

    actor: LatentActor
    critic: LatentCritic
    critic_target: LatentCritic

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        *args: Any,
        share_features_extractor: bool | None = None,
        ortho_init: bool = False,
        log_std_bounds: tuple[float, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if log_std_bounds is not None:
            low, high = log_std_bounds
            if not low < high:
                raise ValueError(f"`log_std_bounds` must be two increasing numbers, got {log_std_bounds!r}")
            if kwargs.get("use_sde"):
                raise ValueError(f"`log_std_bounds` must be None with use_sde=True, got {log_std_bounds!r}")
        self.ortho_init = ortho_init
        self.log_std_bounds = log_std_bounds
        self._asked_for_own_extractor = share_features_extractor is False
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            *args,
            share_features_extractor=bool(share_features_extractor),
            **kwargs,
        )

    def _build(self, lr_schedule: Schedule) -> None:
        if self.optimizer_class in (th.optim.Adam, th.optim.AdamW) and "foreach" not in self.optimizer_kwargs:
            self.optimizer_kwargs = {"fused": True, **self.optimizer_kwargs}
        for kwargs in (self.actor_kwargs, self.critic_kwargs):
            kwargs["observation_space"] = self.image_space

        self.critic = self.make_critic()
        if self.ortho_init:
            nn.ModuleList(self.critic.q_networks).apply(_init_orthogonal)
        self.critic_target = self.make_critic()
        self.critic_target.load_state_dict(self.critic.state_dict())
        self.critic_target.set_training_mode(False)

        extractor = self.critic.features_extractor
        if isinstance(extractor, SplitExtractor) and not self.share_features_extractor:
            own_extractor = self.make_features_extractor()
            assert isinstance(own_extractor, SplitExtractor)
            own_extractor.share_convolutions(extractor)
            self.actor = self.make_actor(own_extractor)
            has_projection = len(list(extractor.projection.parameters())) > 0
            self.actor.latent_index = int(has_projection)
        else:
            self.actor = self.make_actor(extractor)
            self.actor.shares_extractor = True
            if self._asked_for_own_extractor:
                warn(
                    f"share_features_extractor=False has no effect with {type(extractor).__name__}, which actor and critic "
                    "share: only a SplitExtractor tells the convolutions from the rest"
                )

        if self.ortho_init:
            for module in (self.actor.latent_pi, self.actor.mu, self.actor.log_std):
                if isinstance(module, nn.Module):  # with gSDE, log_std is a matrix
                    module.apply(_init_orthogonal)

        optimizer_kwargs: dict[str, Any] = dict(lr=lr_schedule(1), **self.optimizer_kwargs)
        self.critic.optimizer = self.optimizer_class(self.critic.parameters(), **optimizer_kwargs)
        self.actor.optimizer = self.optimizer_class(self.actor_parameters(), **optimizer_kwargs)

    def actor_parameters(self) -> list[nn.Parameter]:
        """:return: the parameters of the actor that it does not share with the critic"""
        critic_parameters = set(self.critic.parameters())
        return [parameter for parameter in self.actor.parameters() if parameter not in critic_parameters]

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> LatentActor:
        kwargs = self._update_features_extractor(self.actor_kwargs, features_extractor)
        return LatentActor(**kwargs, log_std_bounds=self.log_std_bounds).to(self.device)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> LatentCritic:
        kwargs = self._update_features_extractor(self.critic_kwargs, features_extractor)
        # In SB3 this flag keeps the critic's loss from training the extractor: the opposite of what is done here
        return LatentCritic(**{**kwargs, "share_features_extractor": False}).to(self.device)

    @property
    def encoder_networks(self) -> list[LatentNetwork]:
        return [self.critic] if self.actor.latent_index == 0 else [self.critic, self.actor]

    @property
    def target_networks(self) -> list[LatentNetwork]:
        return [self.critic_target]

    def encode_batch(self, observations: PyTorchObs | Latents, next_observations: PyTorchObs | Latents) -> EncodedBatch:
        """
        Encode a batch for a gradient step, each image once for each set of convolutions. Latents stay as they are.

        :param observations: augmented images, a dict with some, or latents
        :param next_observations: as ``observations``
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

    def image_features(self, critic: LatentCritic, latents: Latents) -> th.Tensor:
        """
        :param critic: the critic, or the target critic
        :param latents: shape ``(batch_size, N, L)``, its own first
        :return: features of the images alone, shape ``(batch_size, n_features)``: in a contrastive loss, the other keys of a
            ``Dict`` would tell an observation from all others at once
        """
        extractor = split(critic.features_extractor)
        values = latents.values[:, LatentCritic.latent_index]
        return extractor.head(values) if isinstance(extractor, SplitExtractor) else values

    @property
    def n_image_features(self) -> int:
        """numbers in the ``image_features`` of an observation"""
        latents = Latents(th.zeros(1, *self.latent_shape, device=self.device))
        with th.no_grad():
            return self.image_features(self.critic_target, latents).shape[1]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        parameters = super()._get_constructor_parameters()
        return {**parameters, "ortho_init": self.ortho_init, "log_std_bounds": self.log_std_bounds}


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


def _init_orthogonal(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.orthogonal_(module.weight)
        nn.init.zeros_(module.bias)


class CnnPolicy(SEERSACPolicy, SB3CnnPolicy):
    """Policy of ``SEERSAC`` for images: see :class:`SEERSACPolicy`."""


class MultiInputPolicy(SEERSACPolicy, SB3MultiInputPolicy):
    """Policy of ``SEERSAC`` for ``Dict`` observations with images: see :class:`SEERSACPolicy`."""

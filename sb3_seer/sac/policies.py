from typing import Any

import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.sac.policies import Actor, MlpPolicy, SACPolicy
from stable_baselines3.sac.policies import CnnPolicy as SB3CnnPolicy
from stable_baselines3.sac.policies import MultiInputPolicy as SB3MultiInputPolicy
from torch import nn

from sb3_seer.common.actor_critic import LatentActor, SEERActorCriticPolicy
from sb3_seer.common.policies import LatentNetwork

__all__ = ["CnnPolicy", "MlpPolicy", "MultiInputPolicy"]


class SEERSACActor(LatentActor, Actor):
    """
    SAC's actor, which takes images or latents.

    :cvar log_std_bounds: see :class:`SEERSACPolicy`
    """

    log_std_bounds: tuple[float, float] | None = None

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


class SEERSACPolicy(SEERActorCriticPolicy, SACPolicy):
    """
    Policy of ``SEERSAC``. Parameters as SB3's ``SACPolicy`` and
    :class:`~sb3_seer.common.actor_critic.SEERActorCriticPolicy`, and those listed here.

    :param log_std_bounds: squash the actor's log standard deviation into this range by a tanh ((-10, 2) in SAC-AE, CURL and
        DrQ). None: clamp it into [-20, 2], as SB3 does
    :raises ValueError: for ``log_std_bounds`` that are not two increasing numbers, or together with gSDE; without tied
        convolutions
    """

    def __init__(self, *args: Any, log_std_bounds: tuple[float, float] | None = None, **kwargs: Any) -> None:
        if log_std_bounds is not None:
            low, high = log_std_bounds
            if not low < high:
                raise ValueError(f"`log_std_bounds` must be two increasing numbers, got {log_std_bounds!r}")
            if kwargs.get("use_sde"):
                raise ValueError(f"`log_std_bounds` must be None with use_sde=True, got {log_std_bounds!r}")
        if not kwargs.get("tie_convolutions", True):
            raise ValueError("`tie_convolutions` must be True with SEERSAC and SEERCURL, got False")
        self.log_std_bounds = log_std_bounds
        super().__init__(*args, **kwargs)
        self.actor.log_std_bounds = log_std_bounds

    def _latent_mixin(self, name: str) -> type[LatentNetwork]:
        return SEERSACActor if name == "actor" else super()._latent_mixin(name)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        parameters = super()._get_constructor_parameters()
        return {**parameters, "log_std_bounds": self.log_std_bounds}


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


class CnnPolicy(SEERSACPolicy, SB3CnnPolicy):
    """Policy of ``SEERSAC`` for images: see :class:`SEERSACPolicy`."""


class MultiInputPolicy(SEERSACPolicy, SB3MultiInputPolicy):
    """Policy of ``SEERSAC`` for ``Dict`` observations with images: see :class:`SEERSACPolicy`."""

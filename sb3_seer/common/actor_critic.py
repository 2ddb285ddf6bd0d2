"""
What the policies of all actor-critic algorithms share: actor and critic have convolutions in common.

With tied convolutions, which weights a loss trains, and where its gradient ends:

===============  ===========================  =================================================================
loss             trains                       ends
===============  ===========================  =================================================================
the critic's     trunk, its projection, head  (``encode_batch`` gives the critic latents with their graph)
the actor's      its projection, head         at the trunk (``_encode``), or at latents that are the critic's
                                              (``LatentActor``); at convolutions in the head (``freeze_at``)
its critics      nothing                      at the latents (``LatentCritic``)
next values      nothing                      no graph (``encode_batch``)
===============  ===========================  =================================================================
"""

from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule

from sb3_seer.common.extractors import SplitExtractor
from sb3_seer.common.observations import separate
from sb3_seer.common.policies import LatentNetwork, SEERPolicy
from sb3_seer.common.type_aliases import Latents
from sb3_seer.common.utils import warn


class LatentCritic(LatentNetwork):
    """Mixin for a critic that takes images or latents. The actor's loss does not train its encoder."""

    def forward(self, obs: PyTorchObs | Latents, actions: th.Tensor) -> Any:
        """
        :param obs: images or latents
        :param actions: with a graph in the actor's loss, without one in the critic's
        :return: as the SB3 class
        """
        if isinstance(obs, Latents) and actions.requires_grad:
            obs = obs.detach()
        return super().forward(obs, actions)


class LatentActor(LatentNetwork):
    """Mixin for an actor that takes images or latents. Its loss does not train what it shares with the critic."""

    shares_extractor = False

    def extract_features(self, obs: PyTorchObs | Latents, features_extractor: BaseFeaturesExtractor) -> th.Tensor:
        if isinstance(obs, Latents) and self.latent_index == 0:  # the critic's
            obs = obs.detach()
        features = super().extract_features(obs, features_extractor)
        return features.detach() if self.shares_extractor else features


class SEERActorCriticPolicy(SEERPolicy):
    """
    Mixin for a policy with an ``actor``, a ``critic``, and their target networks if the algorithm has some. Parameters as
    the SB3 class and :class:`~sb3_seer.common.policies.SEERPolicy`, and those listed here.

    The critic's loss trains the encoder, and the actor learns from its latents (SAC-AE, CURL, DrQ, DrQ-v2). In SB3 the
    actor's loss trains a shared features extractor, and separate ones encode a batch once for each network that sees it.

    Here a batch is encoded before its gradient step, once for each set of convolutions: the actor learns from latents
    computed before the critic's step, and no gradient passes through the encoding of the next observations.

    :param tie_convolutions: False for the networks and gradients of the SB3 class (N = 2 latents, or 1 if they share their
        features extractor)
    :param share_features_extractor: If False, the actor shares the critic's convolutions and has a projection
        and a head of its own, as in the paper (N = 2 latents if there is a projection). If True, it shares all of
        the critic's extractor (N = 1). Only a ``SplitExtractor`` tells its convolutions from the rest: any other is always
        shared (a warning says so if False was asked for). Convolutions after the freeze (``freeze_at``) are shared as well,
        so the actor's loss never trains one; they run once for each network, and N = 1. None: False where that is possible
    :param ortho_init: orthogonal weights and zero biases for the linear layers of actor and critic (CURL, DrQ-v2, DrQ:
        https://arxiv.org/abs/2004.13649, appendix), in place of PyTorch's default
    :param optimizer_kwargs: as in SB3; with tied convolutions Adam is fused unless they say otherwise: the same updates in
        one pass over the weights
    :raises ValueError: if the SB3 class has other networks
    """

    actor: Any
    critic: Any

    only_targets_see_next: ClassVar[bool] = False
    """Whether target networks alone see the next observations."""

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        *args: Any,
        tie_convolutions: bool = True,
        share_features_extractor: bool | None = None,
        ortho_init: bool = False,
        **kwargs: Any,
    ) -> None:
        self.tie_convolutions = tie_convolutions
        self.ortho_init = ortho_init
        self._asked_to_share = share_features_extractor
        kwargs["share_features_extractor"] = bool(share_features_extractor)
        super().__init__(observation_space, action_space, lr_schedule, *args, **kwargs)

    # ---- the networks ----

    def _latent_mixin(self, name: str) -> type[LatentNetwork]:
        return {"actor": LatentActor, "critic": LatentCritic}.get(name.removesuffix("_target"), LatentNetwork)

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        names = {name for name, network in self.named_children() if isinstance(network, LatentNetwork)}
        if unknown := names - {"actor", "critic", "actor_target", "critic_target"}:
            raise ValueError(f"The networks of a policy must be actor, critic and their targets, got {', '.join(unknown)}")
        for suffix in ("", "_target"):
            actor, critic = (getattr(self, name + suffix, None) for name in ("actor", "critic"))
            if actor is None or critic is None:  # SAC has no target actor, CrossQ no targets
                continue
            if self.tie_convolutions:
                self._tie(actor, critic)
            elif actor.features_extractor is not critic.features_extractor:
                actor.latent_index = 1
        if self.ortho_init:
            for network in (self.actor, self.critic):
                for name, module in network.named_children():
                    if name != "features_extractor":
                        module.apply(ActorCriticPolicy.init_weights)
        self.copy_to_targets()
        if self.tie_convolutions:
            self._make_optimizers(lr_schedule)

    def _tie(self, actor: Any, critic: Any) -> None:
        """Give an actor the convolutions of a critic, or all of its features extractor."""
        extractor = critic.features_extractor
        # In SB3 this flag keeps the critic's loss from training the extractor: the opposite of what is done here
        critic.share_features_extractor = False
        if isinstance(extractor, SplitExtractor) and not self.share_features_extractor:
            actor.features_extractor.share_convolutions(extractor)
            has_projection = len(list(extractor.projection.parameters())) > 0
            actor.latent_index = int(has_projection)
        else:
            actor.features_extractor = extractor
            actor.shares_extractor = True
            if self._asked_to_share is False and actor is self.actor:
                warn(
                    f"share_features_extractor=False has no effect with {type(extractor).__name__}, which actor and critic "
                    "share: only a SplitExtractor tells the convolutions from the rest"
                )
        actor.tied_parameters = frozenset(critic.parameters()).intersection(actor.parameters())

    def _make_optimizers(self, lr_schedule: Schedule) -> None:
        if self.optimizer_class in (th.optim.Adam, th.optim.AdamW) and "foreach" not in self.optimizer_kwargs:
            self.optimizer_kwargs = {"fused": True, **self.optimizer_kwargs}
        for network in (self.critic, self.actor):
            kwargs: dict[str, Any] = dict(lr=lr_schedule(1), **self.optimizer_kwargs)
            network.optimizer = self.optimizer_class(self._parameter_groups(network), **kwargs)

    def _parameter_groups(self, network: LatentNetwork) -> list[dict[str, Any]]:
        """:return: what the optimizer of the actor or the critic is made of"""
        return [dict(params=list(network.parameters()))]

    @property
    def encoder_networks(self) -> list[LatentNetwork]:
        return [self.critic, self.actor] if self.actor.latent_index == 1 else [self.critic]

    @property
    def target_networks(self) -> list[LatentNetwork]:
        names = ("critic_target", "actor_target") if self.actor.latent_index == 1 else ("critic_target",)
        targets = [getattr(self, name, None) for name in names]
        return [target for target in targets if target is not None]

    # ---- a gradient step ----

    def encode_batch(self, observations: PyTorchObs | Latents, next_observations: PyTorchObs | Latents) -> tuple[Any, Any]:
        """
        Encode a batch for a gradient step, each image once for each set of convolutions.

        :param observations: augmented images, a dict with some, or latents
        :param next_observations: as ``observations``
        :return: latents of the observations, for the online networks, with the graph that trains the encoder; and of the
            next observations, without a graph. Latents stay as they are, and without tied convolutions images do
        """
        if not self.tie_convolutions or isinstance(observations, Latents) or isinstance(next_observations, Latents):
            return observations, next_observations
        latents = self._encode(observations, self.encoder_networks, detach_after_first=True)
        online = [] if self.only_targets_see_next else self.encoder_networks
        with th.no_grad():
            # In one call, so that the images become floats once
            next_latents = self._encode(next_observations, [*online, *self.target_networks])
        (_, vector_obs), (_, next_vector_obs) = (
            separate(batch, self.image_space) for batch in (observations, next_observations)
        )
        n = len(online)
        return (
            Latents(tuple(latents), vector_obs, by_target=()),
            Latents(tuple(next_latents[:n]), next_vector_obs, by_target=tuple(next_latents[n:])),
        )

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            **super()._get_constructor_parameters(),
            "tie_convolutions": self.tie_convolutions,
            "share_features_extractor": self._asked_to_share,
            "ortho_init": self.ortho_init,
        }

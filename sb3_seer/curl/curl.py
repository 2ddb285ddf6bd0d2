from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import MaybeCallback, Schedule
from stable_baselines3.common.utils import FloatSchedule, update_learning_rate
from torch import nn
from torch.nn import functional as F

from sb3_seer.common.policies import polyak_update
from sb3_seer.common.replay import LatentReplayBuffer
from sb3_seer.curl.policies import (
    EXTRACTOR_GROUP,
    CnnPolicy,
    MlpPolicy,
    MultiInputPolicy,
    SEERCURLPolicy,
    split_parameters,
)
from sb3_seer.sac import SEERSAC

SelfSEERCURL = TypeVar("SelfSEERCURL", bound="SEERCURL")


def contrastive_loss(anchors: th.Tensor, keys: th.Tensor, weight: th.Tensor) -> th.Tensor:
    """
    The InfoNCE loss with bilinear similarities (CURL, section 4.3): each anchor is to be told which of the keys is that
    of its own observation. The logits are ``anchors[i] @ weight @ keys[j]``, and the label of anchor i is i.

    :param anchors: features of the observations, shape ``(batch_size, n_features)``
    :param keys: features of the same observations, otherwise augmented, same shape
    :param weight: the bilinear form W, shape ``(n_features, n_features)``
    :return: the mean cross-entropy, a scalar
    """
    batch_size, n_features = anchors.shape
    # Other shapes would be broadcast, or be no pairs, without a word
    assert keys.shape == (batch_size, n_features), f"anchors are {tuple(anchors.shape)}, keys {tuple(keys.shape)}"
    assert weight.shape == (n_features, n_features), f"features are {n_features}, the weight is {tuple(weight.shape)}"
    logits = anchors @ weight @ keys.T  # (batch_size, batch_size)
    # The row maximum, that the released code takes off the logits, cross_entropy takes off by itself
    return F.cross_entropy(logits, th.arange(batch_size, device=logits.device))


class SEERCURL(SEERSAC):
    """
    CURL, contrastive learning on top of SAC, with Stored Embeddings for Efficient Reinforcement Learning (SEER).

    Papers: CURL https://arxiv.org/abs/2004.04136; SEER https://arxiv.org/abs/2103.02886 (section 5.1; appendix, Table 4).

    While the encoder learns, one more loss trains the critic's features extractor: from two augmentations of each
    observation of a batch, one (the anchor) seen by the critic, the other (the key) by the target critic, whose features
    extractor follows with a rate of its own (``encoder_tau``), it has to tell which belong together. The anchor is what
    the critic learns from, the key is augmented independently. The loss ends with the freeze: from then on this is
    ``SEERSAC``. With ``freeze_after=None`` it is CURL. With ``MlpPolicy`` it is SB3's SAC, with the two defaults below.

    As in the released code of SEER, which gave the results of the paper:

    * an update is a step of the critic, one of the actor (every second time), one of the target (likewise), and one on
      the contrastive loss, for which the anchors are encoded anew,
    * the contrastive loss takes two steps with one gradient: one of the critic's optimizer, with the moments that the
      critic's loss shares (features extractor only), and one of its own optimizer (features extractor and W). So an update
      takes three Adam steps on the critic's encoder. CURL has two contrastive steps as well,
    * features extractors, the contrastive loss and the entropy coefficient have learning rates of their own.

    Differences from it:

    * those of ``SEERSAC``: the actor learns from features computed before the critic's step; the entropy coefficient has
      the loss of SB3's SAC, in its logarithm (Adam hardly tells the two apart); after the freeze, the head of a features
      extractor (the layer normalisation of ``PixelEncoder``) goes on learning, and its target follows at ``encoder_tau``,
    * updates are counted over all of the training, from the first, for ``target_update_interval`` too (SB3 counts that anew
      each time it trains),
    * a random crop may be at the last offset, too; the default augmentation is ``"random_shift"``, which suits images of
      all sizes. The papers': ``augmentation="random_crop"`` to 84 of 100 pixels,
    * at ``Dict`` observations the contrastive loss sees the images alone.

    All parameters of :class:`~sb3_seer.sac.sac.SEERSAC`, with the same defaults and meaning but for those listed here:

    :param args: as for ``SEERSAC``
    :param augmentation: as for ``SEERSAC``, None only without the contrastive loss
    :param ent_coef: as for SB3's SAC. The default starts at the papers' 0.1, as its learning rate is small
    :param target_update_interval: gradient steps for one update of the target
    :param actor_update_freq: gradient steps for one of the actor and the entropy coefficient
    :param cpc_update_freq: gradient steps for one of the contrastive loss, None for never
    :param encoder_tau: how far the target critic's features extractor moves in an update, from 0 to 1 (``tau`` is
        that of its Q-networks)
    :param encoder_learning_rate: of features extractors, the actor's and the critic's; a number, or a function
        of the progress remaining (from 1 to 0). ``learning_rate`` is that of the other layers
    :param cpc_learning_rate: of the contrastive loss's own optimizer, likewise
    :param ent_coef_learning_rate: of the entropy coefficient, likewise
    :param ent_coef_betas: Adam's betas for the entropy coefficient
    :param kwargs: as for ``SEERSAC``
    :raises ValueError: for a parameter outside of what is said here
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }

    def __init__(
        self,
        *args: Any,
        augmentation: str | nn.Module | None = "random_shift",
        ent_coef: str | float = "auto_0.1",
        target_update_interval: int = 2,
        actor_update_freq: int = 2,
        cpc_update_freq: int | None = 1,
        encoder_tau: float = 0.05,
        encoder_learning_rate: float | Schedule = 1e-3,
        cpc_learning_rate: float | Schedule = 1e-3,
        ent_coef_learning_rate: float | Schedule = 1e-4,
        ent_coef_betas: tuple[float, float] = (0.5, 0.999),
        **kwargs: Any,
    ) -> None:
        self.actor_update_freq = actor_update_freq
        self.cpc_update_freq = cpc_update_freq
        self.encoder_tau = encoder_tau
        self.encoder_learning_rate = encoder_learning_rate
        self.cpc_learning_rate = cpc_learning_rate
        self.ent_coef_learning_rate = ent_coef_learning_rate
        self.ent_coef_betas = ent_coef_betas
        # Only with images
        self.bilinear: nn.Linear | None = None
        self.cpc_optimizer: th.optim.Optimizer | None = None
        super().__init__(
            *args, augmentation=augmentation, ent_coef=ent_coef, target_update_interval=target_update_interval, **kwargs
        )

    def _check_arguments(self) -> None:
        super()._check_arguments()
        for name in ("target_update_interval", "actor_update_freq", "cpc_update_freq"):
            value = getattr(self, name)
            if name == "cpc_update_freq" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                allowed = "None (never) and integers from 1" if name == "cpc_update_freq" else "integers from 1"
                raise ValueError(f"{name}: {value!r} was given, allowed are {allowed}")
        if not 0.0 <= self.encoder_tau <= 1.0:
            raise ValueError(f"encoder_tau: {self.encoder_tau!r} was given, allowed are numbers from 0 to 1")
        if self.augmentation is None and self.cpc_update_freq is not None:
            raise ValueError(
                "augmentation: None was given, and the contrastive loss compares two augmentations of an observation: allowed "
                'are "random_crop", "random_shift" and a module, or None together with cpc_update_freq=None (no such loss)'
            )

    def _setup_lr_schedule(self) -> None:
        super()._setup_lr_schedule()
        self.encoder_lr_schedule = FloatSchedule(self.encoder_learning_rate)
        self.cpc_lr_schedule = FloatSchedule(self.cpc_learning_rate)
        self.ent_coef_lr_schedule = FloatSchedule(self.ent_coef_learning_rate)

    def _make_replay_buffer(self, augmentation: nn.Module | None, **overrides: Any) -> LatentReplayBuffer:
        return super()._make_replay_buffer(augmentation, sample_positives=self.cpc_update_freq is not None, **overrides)

    def _setup_model(self) -> None:
        super()._setup_model()
        if not isinstance(self.policy, SEERCURLPolicy):
            return
        if self.ent_coef_optimizer is not None and self.log_ent_coef is not None:
            beta1, beta2 = self.ent_coef_betas
            self.ent_coef_optimizer = th.optim.Adam([self.log_ent_coef], lr=self.ent_coef_lr_schedule(1), betas=(beta1, beta2))
        # W of the similarities, a module so that it is saved and loaded like the networks
        n_features = self.policy.n_contrastive_features
        self.bilinear = nn.Linear(n_features, n_features, bias=False, device=self.device)
        nn.init.uniform_(self.bilinear.weight)
        self.cpc_optimizer = self.policy.optimizer_class(
            [*self.critic.features_extractor.parameters(), self.bilinear.weight],
            lr=self.cpc_lr_schedule(1),  # type: ignore[call-arg]
            **self.policy.optimizer_kwargs,
        )

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, saved_pytorch_variables = super()._get_torch_save_params()
        if self.bilinear is not None:
            state_dicts = [*state_dicts, "bilinear", "cpc_optimizer"]
        return state_dicts, saved_pytorch_variables

    def _update_learning_rate(self, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer) -> None:
        super()._update_learning_rate(optimizers)
        if self.cpc_optimizer is None:
            return
        progress_remaining = self._current_progress_remaining
        for optimizer in (self.actor.optimizer, self.critic.optimizer):
            optimizer.param_groups[EXTRACTOR_GROUP]["lr"] = self.encoder_lr_schedule(progress_remaining)
        update_learning_rate(self.cpc_optimizer, self.cpc_lr_schedule(progress_remaining))
        if self.ent_coef_optimizer is not None:
            update_learning_rate(self.ent_coef_optimizer, self.ent_coef_lr_schedule(progress_remaining))

    def _is_due(self, frequency: int, gradient_step: int) -> bool:
        # Not anew by each train(): with a gradient step at a time, every update would be due
        return (self._n_updates + gradient_step) % frequency == 0

    def _update_target(self) -> None:
        q_networks, extractor = split_parameters(self.policy.critic)
        target_q_networks, target_extractor = split_parameters(self.policy.critic_target)
        polyak_update(q_networks, target_q_networks, self.tau)
        polyak_update(extractor, target_extractor, self.encoder_tau)

    def _update_encoder(self, batch: Any, gradient_step: int, logs: dict[str, list[th.Tensor]]) -> None:
        if self.encoder_frozen or self.cpc_update_freq is None or not self._is_due(self.cpc_update_freq, gradient_step):
            return
        assert isinstance(self.policy, SEERCURLPolicy) and self.bilinear is not None and self.cpc_optimizer is not None
        # Once more, because the critic's step has moved the encoder
        anchors = self.policy.contrastive_features(self.policy.critic, batch.observations)
        with th.no_grad():
            keys = self.policy.contrastive_features(self.policy.critic_target, batch.positives)
        cpc_loss = contrastive_loss(anchors, keys, self.bilinear.weight)
        # Of the critic's parameters, those without a gradient, its Q-networks, are not stepped
        self.critic.optimizer.zero_grad()
        self.cpc_optimizer.zero_grad()
        cpc_loss.backward()
        self.critic.optimizer.step()
        self.cpc_optimizer.step()
        logs["cpc_loss"].append(cpc_loss.detach())

    def learn(
        self: SelfSEERCURL,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "SEERCURL",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfSEERCURL:
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

from typing import Any, ClassVar

import torch as th
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import FloatSchedule, update_learning_rate
from torch import nn
from torch.nn import functional as F

from sb3_seer.common.flops import Passes
from sb3_seer.common.observations import map_parts
from sb3_seer.common.replay import LatentReplayBuffer
from sb3_seer.common.utils import check_learning_rate, check_positive_int
from sb3_seer.curl.policies import (
    EXTRACTOR_GROUP,
    CnnPolicy,
    MlpPolicy,
    MultiInputPolicy,
    SEERCURLPolicy,
)
from sb3_seer.sac import SEERSAC


def contrastive_loss(anchors: th.Tensor, keys: th.Tensor, weight: th.Tensor) -> th.Tensor:
    """
    The InfoNCE loss with bilinear similarities (CURL, https://arxiv.org/abs/2004.04136, section 4.3): for each anchor, find
    its own key among the keys of the batch. The logits are ``anchors[i] @ weight @ keys[j]``, and the label of anchor i is i.

    :param anchors: shape ``(batch_size, n_features)``
    :param keys: same shape, ``keys[i]`` belongs to ``anchors[i]``
    :param weight: the bilinear form W, shape ``(n_features, n_features)``
    :return: the mean cross-entropy, a scalar
    """
    batch_size, n_features = anchors.shape
    # A wrong shape would broadcast silently
    assert keys.shape == (batch_size, n_features), f"anchors are {tuple(anchors.shape)}, keys {tuple(keys.shape)}"
    assert weight.shape == (n_features, n_features), f"features are {n_features}, the weight is {tuple(weight.shape)}"
    logits = anchors @ weight @ keys.T  # (batch_size, batch_size)
    return F.cross_entropy(logits, th.arange(batch_size, device=logits.device))


class SEERCURL(SEERSAC):
    """
    CURL, contrastive learning on top of SAC, with Stored Embeddings for Efficient Reinforcement Learning (SEER).

    Papers: CURL https://arxiv.org/abs/2004.04136; SEER https://arxiv.org/abs/2103.02886 (section 5.1; appendix, Table 4).

    While the encoder learns, one more loss trains the critic's features extractor. Each observation of a batch is augmented
    twice, independently: the critic encodes the first copy (the anchor, from which the critic also learns), the target critic
    the second (the key). The features must tell which anchor and key belong together. The features extractor of the target
    critic follows at ``encoder_tau``. The loss ends with the freeze: from then on this is
    ``SEERSAC``. With ``freeze_after=None`` it is CURL. With ``MlpPolicy`` it is SB3's SAC, with the defaults of
    ``ent_coef`` and ``target_update_interval`` below.

    As in the released code of SEER, which gave the results of the paper:

    * an update is a step of the critic, in every second one also of the actor and of the target, and one on
      the contrastive loss, for which the anchors are encoded again,
    * the contrastive loss takes two steps with one gradient: one of the critic's optimizer, with the moments that the
      critic's loss shares (features extractor only), and one of its own optimizer (features extractor and W). So an update
      takes three Adam steps on the critic's encoder. CURL has two contrastive steps as well,
    * features extractors, the contrastive loss and the entropy coefficient each have a learning rate.

    Differences from it:

    * as in ``SEERSAC``, the actor learns from features computed before the critic's step; the entropy coefficient has
      the loss of SB3's SAC, in its logarithm (Adam hardly tells the two apart); after the freeze, the head of a features
      extractor (the layer normalisation of ``PixelEncoder``) goes on learning, and its target follows at ``encoder_tau``,
    * updates are counted over all of the training, for ``target_update_interval`` too (SB3 counts from zero whenever it
      trains),
    * a random crop may be at the last offset, too; the default augmentation is ``"random_shift"``, which suits images of
      all sizes. The papers': ``augmentation="random_crop"`` to 84 of 100 pixels,
    * at ``Dict`` observations the contrastive loss sees the images alone.

    All parameters of :class:`~sb3_seer.sac.sac.SEERSAC`. Actor and target are updated every second gradient step, and
    ``encoder_tau``, ``ent_coef_learning_rate`` and ``ent_coef_betas`` default to the values of the paper's Table 4:

    :param args: as for ``SEERSAC``
    :param augmentation: as for ``SEERSAC``, None only without the contrastive loss
    :param ent_coef: as for SB3's SAC. The default starts at the papers' 0.1, as its learning rate is small
    :param cpc_update_freq: gradient steps per update with the contrastive loss, None for never
    :param encoder_learning_rate: of features extractors, the actor's and the critic's; a number, or a function
        of the progress remaining (from 1 to 0). ``learning_rate`` is that of the other layers
    :param cpc_learning_rate: of the contrastive loss's own optimizer; a number or a function
    :param kwargs: as for ``SEERSAC``
    :raises ValueError: for an invalid parameter
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
        encoder_tau: float | None = 0.05,
        encoder_learning_rate: float | Schedule = 1e-3,
        cpc_learning_rate: float | Schedule = 1e-3,
        ent_coef_learning_rate: float | Schedule | None = 1e-4,
        ent_coef_betas: tuple[float, float] = (0.5, 0.999),
        **kwargs: Any,
    ) -> None:
        self.cpc_update_freq = cpc_update_freq
        self.encoder_learning_rate = encoder_learning_rate
        self.cpc_learning_rate = cpc_learning_rate
        # Only with images
        self.bilinear: nn.Linear | None = None
        self.cpc_optimizer: th.optim.Optimizer | None = None
        super().__init__(
            *args,
            augmentation=augmentation,
            ent_coef=ent_coef,
            target_update_interval=target_update_interval,
            actor_update_freq=actor_update_freq,
            encoder_tau=encoder_tau,
            ent_coef_learning_rate=ent_coef_learning_rate,
            ent_coef_betas=ent_coef_betas,
            **kwargs,
        )

    def _check_arguments(self) -> None:
        super()._check_arguments()
        check_positive_int("cpc_update_freq", self.cpc_update_freq, None)
        for name in ("encoder_learning_rate", "cpc_learning_rate"):
            check_learning_rate(name, getattr(self, name))
        if not issubclass(self.policy_class, SEERCURLPolicy):
            raise ValueError(f"`policy` must be a policy of sb3_seer.curl, got {self.policy_class}")
        if self.augmentation is None and self.cpc_update_freq is not None:
            raise ValueError(
                "`augmentation` must not be None with a contrastive loss, which compares two augmentations of an observation. "
                "cpc_update_freq=None turns that loss off"
            )

    def _setup_lr_schedule(self) -> None:
        super()._setup_lr_schedule()
        self.encoder_lr_schedule = FloatSchedule(self.encoder_learning_rate)
        self.cpc_lr_schedule = FloatSchedule(self.cpc_learning_rate)

    def _make_replay_buffer(self, augmentation: nn.Module | None, **overrides: Any) -> LatentReplayBuffer:
        return super()._make_replay_buffer(augmentation, sample_positives=self.cpc_update_freq is not None, **overrides)

    def _setup_model(self) -> None:
        super()._setup_model()
        if not isinstance(self.policy, SEERCURLPolicy):
            return
        # W of the similarities, a module so that it is saved and loaded like the networks
        n_features = self.policy.n_image_features
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

    def _is_target_due(self, gradient_step: int) -> bool:
        return self._is_due(self.target_update_interval)

    @property
    def flops_passes(self) -> Passes | None:
        """
        Those of ``SEERSAC``, and for the contrastive loss two more forward passes of the encoder and one backward. (The
        released code encodes the observations once more for the actor, in every second update.) For the heads, where the
        actor learns in every second step, they are a fifth too many with one view, and two fifths with two.
        """
        passes = super().flops_passes
        if passes is None or self.cpc_update_freq is None:
            return passes
        return passes._replace(encoder_forward=2 / self.cpc_update_freq, encoder_backward=1 / self.cpc_update_freq)

    def _update_encoder(self, batch: Any, logs: dict[str, list[th.Tensor]]) -> None:
        if self.encoder_frozen or self.cpc_update_freq is None or not self._is_due(self.cpc_update_freq):
            return
        assert isinstance(self.policy, SEERCURLPolicy) and self.bilinear is not None and self.cpc_optimizer is not None
        # The critic's step has moved the encoder: encode again
        # One view only: another view of the same observation would be a false negative
        observations, positives = (
            map_parts(lambda images: images[: len(images) // self.n_views], images)
            for images in (batch.observations, batch.positives)
        )
        anchors = self.policy.contrastive_features(self.policy.critic, observations)
        with th.no_grad():
            keys = self.policy.contrastive_features(self.policy.critic_target, positives)
        cpc_loss = contrastive_loss(anchors, keys, self.bilinear.weight)
        # Of the critic's parameters, those without a gradient, its Q-networks, are not stepped
        self.critic.optimizer.zero_grad()
        self.cpc_optimizer.zero_grad()
        cpc_loss.backward()
        self.critic.optimizer.step()
        self.cpc_optimizer.step()
        logs["cpc_loss"].append(cpc_loss.detach())

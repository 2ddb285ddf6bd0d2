from collections import defaultdict
from typing import Any, ClassVar

import numpy as np
import torch as th
from stable_baselines3.common.policies import BasePolicy, ContinuousCritic
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import FloatSchedule, polyak_update, update_learning_rate
from stable_baselines3.sac import SAC
from torch.nn import functional as F

from sb3_seer.common.flops import Passes
from sb3_seer.common.priorities import is_prioritized
from sb3_seer.common.seer import SEERMixin
from sb3_seer.common.type_aliases import Latents
from sb3_seer.common.utils import check_learning_rate, check_number, check_positive_int
from sb3_seer.sac.policies import CnnPolicy, MlpPolicy, MultiInputPolicy, SEERSACPolicy, split_parameters


class SEERSAC(SEERMixin, SAC):
    """
    Soft Actor-Critic with Stored Embeddings for Efficient Reinforcement Learning (SEER).

    Paper: https://arxiv.org/abs/2103.02886 (Algorithm 1; control: section 5.1, without the contrastive loss of CURL).

    All parameters of SB3's :class:`~stable_baselines3.sac.SAC`, with the same defaults and meaning, and of
    :class:`~sb3_seer.common.seer.SEERMixin`. With images (``CnnPolicy``, ``MultiInputPolicy``) it differs from SB3's SAC
    in this:

    * the convolutions are shared, and the critic's loss trains them: see :class:`~sb3_seer.sac.policies.SEERSACPolicy`,
    * each batch is encoded once for each gradient step, so the actor learns from features computed before
      the critic's step, and its loss computes no gradient for the critics,
    * with a prioritised replay buffer, the critics' squared errors count by the weights of the transitions, and the
      priority of one is the mean of the critics' absolute errors.

    With ``MlpPolicy`` it is SB3's SAC: a warning says that the parameters below have no effect then.

    :param args: as for SB3's SAC and ``SEERMixin``
    :param n_views: views of each sampled transition, augmented independently. The targets are averaged over the views
        of the next observation, the critic's loss over the views of the observation, as in DrQ
        (https://arxiv.org/abs/2004.13649, equations 1 to 3, with K = M = ``n_views``); the actor learns from one. In the
        latents stage they are ``n_views`` of the K stored copies
    :param actor_update_freq: gradient steps per update of the actor and the entropy coefficient, counted over all of the
        training (CURL and DrQ: 2)
    :param encoder_tau: Polyak coefficient of the target critic's features extractor, between 0 and 1 (CURL: 0.05).
        None: ``tau``, as for the Q-networks
    :param ent_coef_learning_rate: of the entropy coefficient, if it is learned; a number, or a function of the progress
        remaining (from 1 to 0). None: ``learning_rate``
    :param ent_coef_betas: Adam's betas for the entropy coefficient (CURL: (0.5, 0.999))
    :param kwargs: as for SB3's SAC and ``SEERMixin``
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
        n_views: int = 1,
        actor_update_freq: int = 1,
        encoder_tau: float | None = None,
        ent_coef_learning_rate: float | Schedule | None = None,
        ent_coef_betas: tuple[float, float] = (0.9, 0.999),
        **kwargs: Any,
    ) -> None:
        self.n_views = n_views
        self.actor_update_freq = actor_update_freq
        self.encoder_tau = encoder_tau
        self.ent_coef_learning_rate = ent_coef_learning_rate
        self.ent_coef_betas = ent_coef_betas
        super().__init__(*args, **kwargs)

    def _check_arguments(self) -> None:
        super()._check_arguments()
        for name in ("n_views", "actor_update_freq", "target_update_interval"):
            check_positive_int(name, getattr(self, name))
        if self.n_views > self.n_augmentations:
            raise ValueError(
                f"`n_views` must be <= n_augmentations={self.n_augmentations}, got {self.n_views}: "
                "the views are different augmented copies"
            )
        if self.encoder_tau is not None:
            check_number("encoder_tau", self.encoder_tau, 0, 1)
        if self.ent_coef_learning_rate is not None:
            check_learning_rate("ent_coef_learning_rate", self.ent_coef_learning_rate)
        if np.shape(self.ent_coef_betas) != (2,):
            raise ValueError(f"`ent_coef_betas` must be two numbers, got {self.ent_coef_betas!r}")
        for beta in self.ent_coef_betas:
            check_number("ent_coef_betas", beta, 0, 1)

    def _setup_lr_schedule(self) -> None:
        super()._setup_lr_schedule()
        rate = self.ent_coef_learning_rate
        self.ent_coef_lr_schedule = self.lr_schedule if rate is None else FloatSchedule(rate)

    def _setup_model(self) -> None:
        super()._setup_model()
        if self.ent_coef_optimizer is not None and isinstance(self.policy, SEERSACPolicy):
            beta1, beta2 = self.ent_coef_betas
            assert self.log_ent_coef is not None
            self.ent_coef_optimizer = th.optim.Adam([self.log_ent_coef], lr=self.ent_coef_lr_schedule(1), betas=(beta1, beta2))

    @property
    def uses_priorities(self) -> bool:
        """whether the updates weight transitions and set priorities"""
        return isinstance(self.policy, SEERSACPolicy)

    @property
    def flops_passes(self) -> Passes | None:
        """
        Per view, F = 3 and B = 1. The encoder has three forward passes: the observations, and the next observations for the
        actor and for the target. The actor's head has two, each critic's head three. All have one backward pass, the critics
        one more for the gradient of the actions. So for the heads, F = 3 and B = 1 are within 10% with one view. With two they
        are a fifth too many, as the actor learns from one of them.
        """
        return Passes(3 * self.n_views, self.n_views) if isinstance(self.policy, SEERSACPolicy) else None

    def _update_learning_rate(self, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer) -> None:
        super()._update_learning_rate(optimizers)
        if self.ent_coef_optimizer is None or not isinstance(self.policy, SEERSACPolicy):
            return
        if self.ent_coef_learning_rate is not None:
            update_learning_rate(self.ent_coef_optimizer, self.ent_coef_lr_schedule(self._current_progress_remaining))
        # load() may have changed them after the state of the optimizer was saved
        self.ent_coef_optimizer.param_groups[0]["betas"] = tuple(self.ent_coef_betas)

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        if not isinstance(self.policy, SEERSACPolicy):
            super().train(gradient_steps, batch_size)
            return
        replay_buffer: Any = self.replay_buffer
        prioritized = is_prioritized(replay_buffer)
        self.policy.set_training_mode(True)
        optimizers = [self.actor.optimizer, self.critic.optimizer]
        if self.ent_coef_optimizer is not None:
            optimizers.append(self.ent_coef_optimizer)
        self._update_learning_rate(optimizers)

        # A subclass of the buffer may override sample() without n_views
        views = dict(n_views=self.n_views) if self.n_views > 1 else {}
        # Read at the end: each .item() would make the host wait for the device
        logs: dict[str, list[th.Tensor]] = defaultdict(list)
        for gradient_step in range(gradient_steps):
            # Every field has a row for each view: (n_views * batch_size, ...)
            batch = replay_buffer.sample(batch_size, env=self._vec_normalize_env, **views)
            discounts = batch.discounts if batch.discounts is not None else self.gamma
            weights = batch.weights if prioritized else 1.0
            latents, next_latents = self.policy.encode_batch(batch.observations, batch.next_observations)

            if self.use_sde:
                self.actor.reset_noise()
            ent_coef = self._ent_coef()
            logs["ent_coef"].append(ent_coef.mean())
            if update_actor := self._is_due(self.actor_update_freq):
                latents_pi = latents.first(batch_size)  # one view is enough for the actor, as in DrQ's code
                actions_pi, log_prob = self.actor.action_log_prob(latents_pi)
                self._update_ent_coef(log_prob, logs)

            with th.no_grad():
                # Soft value of the next observation, the smallest of the target critics': (n_views * batch_size, 1)
                next_actions, next_log_prob = self.actor.action_log_prob(next_latents)
                next_q_values = self._min_q_value(self.critic_target, next_latents, next_actions)
                next_values = next_q_values - ent_coef * next_log_prob.reshape(-1, 1)
                if self.n_views > 1:  # their mean for every view of a transition, DrQ equation 1
                    next_values = next_values.reshape(self.n_views, batch_size, 1).mean(dim=0).repeat(self.n_views, 1)
                target_q_values = batch.rewards + (1 - batch.dones) * discounts * next_values

            current_q_values = self.critic(latents, batch.actions)
            critic_loss = 0.5 * sum(
                (weights * F.mse_loss(current_q, target_q_values, reduction="none")).mean() for current_q in current_q_values
            )
            assert isinstance(critic_loss, th.Tensor)
            logs["critic_loss"].append(critic_loss.detach())
            self.critic.optimizer.zero_grad()
            critic_loss.backward()
            self.critic.optimizer.step()

            if update_actor:
                q_values_pi = self._min_q_value(self.critic, latents_pi, actions_pi)
                actor_loss = (ent_coef * log_prob.reshape(-1, 1) - q_values_pi).mean()
                self.actor.optimizer.zero_grad()
                # Without the gradient of the critics, which no optimizer would use
                actor_loss.backward(inputs=[p for p in self.actor.parameters() if p.requires_grad])
                self.actor.optimizer.step()
                logs["actor_loss"].append(actor_loss.detach())

            if self._is_target_due(gradient_step):
                self._update_target()
                # Copy running stats, see https://github.com/DLR-RM/stable-baselines3/issues/996
                polyak_update(self.batch_norm_stats, self.batch_norm_stats_target, 1.0)
            self._update_encoder(batch, logs)

            if prioritized:
                errors = (target_q_values - th.cat(current_q_values, dim=1)).abs().mean(dim=1)  # [n_views * batch_size]
                errors = errors.detach().reshape(self.n_views, batch_size).mean(dim=0)
                replay_buffer.update_priorities(batch.indices[:batch_size], errors.cpu().numpy())
            self._n_updates += 1

        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        for name, values in logs.items():
            self.logger.record(f"train/{name}", th.stack(values).mean().item())

    def _is_due(self, frequency: int) -> bool:
        """Whether this gradient step has an update that comes once in ``frequency``, counted over all of the training."""
        return self._n_updates % frequency == 0

    def _is_target_due(self, gradient_step: int) -> bool:
        """:return: whether the target is updated after this gradient step of ``train()``, counted from zero as in SB3"""
        return gradient_step % self.target_update_interval == 0

    def _ent_coef(self) -> th.Tensor:
        """:return: the entropy coefficient, without a graph"""
        if self.ent_coef_optimizer is None or self.log_ent_coef is None:
            return self.ent_coef_tensor
        return th.exp(self.log_ent_coef.detach())

    def _update_ent_coef(self, log_prob: th.Tensor, logs: dict[str, list[th.Tensor]]) -> None:
        """One step on the entropy coefficient, if it is learned, with the loss of SB3's SAC."""
        if self.ent_coef_optimizer is None or self.log_ent_coef is None:
            return
        assert isinstance(self.target_entropy, float)
        ent_coef_loss = -(self.log_ent_coef * (log_prob + self.target_entropy).detach()).mean()
        self.ent_coef_optimizer.zero_grad()
        ent_coef_loss.backward()
        self.ent_coef_optimizer.step()
        logs["ent_coef_loss"].append(ent_coef_loss.detach())

    def _update_target(self) -> None:
        """Move the target critic towards the critic."""
        q_networks, extractor = split_parameters(self.policy.critic)
        target_q_networks, target_extractor = split_parameters(self.policy.critic_target)
        polyak_update(q_networks, target_q_networks, self.tau)
        polyak_update(extractor, target_extractor, self.tau if self.encoder_tau is None else self.encoder_tau)

    def _update_encoder(self, batch: Any, logs: dict[str, list[th.Tensor]]) -> None:
        """The end of a gradient step, for a subclass with another loss that trains the encoder."""

    @staticmethod
    def _min_q_value(critic: ContinuousCritic, latents: Latents, actions: th.Tensor) -> th.Tensor:
        """:return: the smallest of the critics' values of the actions, shape ``(batch_size, 1)``"""
        return th.cat(critic(latents, actions), dim=1).min(dim=1, keepdim=True).values

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, ClassVar, TypeVar

import torch as th
from stable_baselines3.common.policies import BasePolicy, ContinuousCritic
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.sac import SAC
from torch import nn
from torch.nn import functional as F

from sb3_seer.common.policies import polyak_update
from sb3_seer.common.priorities import is_prioritized
from sb3_seer.common.seer import SEERMixin
from sb3_seer.common.type_aliases import Latents
from sb3_seer.sac.policies import CnnPolicy, MlpPolicy, MultiInputPolicy, SEERSACPolicy

SelfSEERSAC = TypeVar("SelfSEERSAC", bound="SEERSAC")


class SEERSAC(SEERMixin, SAC):
    """
    Soft Actor-Critic with Stored Embeddings for Efficient Reinforcement Learning (SEER).

    Paper: https://arxiv.org/abs/2103.02886 (Algorithm 1; control: section 5.1, without the contrastive loss of CURL).

    All parameters of SB3's :class:`~stable_baselines3.sac.SAC`, with the same defaults and meaning, and those of
    :class:`~sb3_seer.common.seer.SEERMixin`. With images (``CnnPolicy``, ``MultiInputPolicy``) it differs from SB3's SAC
    in this:

    * the convolutions are shared, and the critic's loss trains them: see :class:`~sb3_seer.sac.policies.SEERSACPolicy`,
    * each batch is encoded once for each gradient step, so the actor learns from features computed before
      the critic's step, and its loss computes no gradient for the critics,
    * with a prioritised replay buffer, the critics' squared errors count by the weights of the transitions, and the
      priority of one is the mean of the critics' absolute errors.

    With ``MlpPolicy`` it is SB3's SAC.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    actor_update_freq = 1  # gradient steps for one of the actor and the entropy coefficient

    def _setup_model(self) -> None:
        super()._setup_model()
        if is_prioritized(self.replay_buffer) and not isinstance(self.policy, SEERSACPolicy):
            raise ValueError(
                f"replay_buffer_class: {type(self.replay_buffer).__name__} was given, and without images SB3's SAC trains, "
                "which knows no priorities: allowed are SB3's replay buffers and None"
            )

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """
        Sample the replay buffer and do the updates (gradient descent and update target networks).

        :param gradient_steps: number of gradient steps
        :param batch_size: transitions in a batch
        """
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

        # Read at the end: each .item() would make the host wait for the device
        logs: dict[str, list[th.Tensor]] = defaultdict(list)
        for gradient_step in range(gradient_steps):
            batch = replay_buffer.sample(batch_size, env=self._vec_normalize_env)
            discounts = batch.discounts if batch.discounts is not None else self.gamma
            weights = batch.weights if prioritized else 1.0
            latents, next_latents, target_latents = self.policy.encode_batch(batch.observations, batch.next_observations)

            if self.use_sde:
                self.actor.reset_noise()
            ent_coef = self._ent_coef()
            logs["ent_coef"].append(ent_coef.mean())
            if update_actor := self._is_due(self.actor_update_freq, gradient_step):
                actions_pi, log_prob = self.actor.action_log_prob(latents)  # type: ignore[arg-type]
                self._update_ent_coef(log_prob, logs)

            with th.no_grad():
                # Soft value of the next observation, the smallest of the target critics': (batch_size, 1)
                next_actions, next_log_prob = self.actor.action_log_prob(next_latents)  # type: ignore[arg-type]
                next_q_values = self._min_q_value(self.critic_target, target_latents, next_actions)
                next_values = next_q_values - ent_coef * next_log_prob.reshape(-1, 1)
                target_q_values = batch.rewards + (1 - batch.dones) * discounts * next_values

            current_q_values = self.critic(latents, batch.actions)
            critic_loss = 0.5 * sum(
                (weights * F.mse_loss(current_q, target_q_values, reduction="none")).mean() for current_q in current_q_values
            )
            assert isinstance(critic_loss, th.Tensor)
            # Each loss computes the gradient of its own parameters only: here of the critics and the encoder...
            self.critic.optimizer.zero_grad()
            critic_loss.backward(inputs=_learning(self.critic.parameters()))
            self.critic.optimizer.step()

            if update_actor:
                q_values_pi = self._min_q_value(self.critic, latents.detach(), actions_pi)
                actor_loss = (ent_coef * log_prob.reshape(-1, 1) - q_values_pi).mean()
                self.actor.optimizer.zero_grad()
                # ... and here of what the actor does not have from the critic
                actor_loss.backward(inputs=_learning(self.policy.actor_parameters()))
                self.actor.optimizer.step()
                logs["actor_loss"].append(actor_loss.detach())

            if self._is_due(self.target_update_interval, gradient_step):
                self._update_target()
                # Copy running stats, see https://github.com/DLR-RM/stable-baselines3/issues/996
                polyak_update(self.batch_norm_stats, self.batch_norm_stats_target, 1.0)
            self._update_encoder(batch, gradient_step, logs)

            if prioritized:
                errors = (target_q_values - th.cat(current_q_values, dim=1)).abs().mean(dim=1)  # [batch_size]
                replay_buffer.update_priorities(batch.indices, errors.detach().cpu().numpy())

            logs["critic_loss"].append(critic_loss.detach())

        self._n_updates += gradient_steps
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        for name, values in logs.items():
            self.logger.record(f"train/{name}", th.stack(values).mean().item())

    def _is_due(self, frequency: int, gradient_step: int) -> bool:
        """
        :param frequency: gradient steps for one update
        :param gradient_step: number of gradient steps since ``train()`` was called
        :return: whether this gradient step has that update; counted anew by each ``train()``, as in SB3
        """
        return gradient_step % frequency == 0

    def _ent_coef(self) -> th.Tensor:
        """:return: the entropy coefficient, without a graph"""
        return self.ent_coef_tensor if self.log_ent_coef is None else th.exp(self.log_ent_coef.detach())

    def _update_ent_coef(self, log_prob: th.Tensor, logs: dict[str, list[th.Tensor]]) -> None:
        """
        One step on the entropy coefficient, if it is learned (the loss is that of SB3's SAC).

        :param log_prob: of the actor's actions, shape ``(batch_size,)``
        :param logs: where to note the loss
        """
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
        polyak_update(self.critic.parameters(), self.critic_target.parameters(), self.tau)

    def _update_encoder(self, batch: Any, gradient_step: int, logs: dict[str, list[th.Tensor]]) -> None:
        """
        The end of a gradient step, for an algorithm with another loss that trains the encoder. This one has none.

        :param batch: what was sampled
        :param gradient_step: number of gradient steps since ``train()`` was called
        :param logs: where to note the loss
        """

    @staticmethod
    def _min_q_value(critic: ContinuousCritic, latents: Latents, actions: th.Tensor) -> th.Tensor:
        """:return: the smallest of the critics' values of the actions, shape ``(batch_size, 1)``"""
        return th.cat(critic(latents, actions), dim=1).min(dim=1, keepdim=True).values

    def learn(
        self: SelfSEERSAC,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "SEERSAC",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfSEERSAC:
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)


def _learning(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """:return: those that the user has not fixed"""
    return [parameter for parameter in parameters if parameter.requires_grad]

"""
An algorithm of your own becomes a SEER one: DDPG with a critic that is penalised for large values, and its SEER class.

    python examples/own_algorithm.py [--total-timesteps 600]

With RL Zoo, and the settings of DrQ-v2:

    python examples/own_algorithm.py --algo my_ddpg_seer --env CarRacing-v3 -conf td3_seer.yml
"""

import argparse
import sys
from typing import Any

import gymnasium as gym
import torch as th
from stable_baselines3 import TD3
from stable_baselines3.common.utils import polyak_update
from stable_baselines3.td3.policies import CnnPolicy as TD3CnnPolicy
from torch.nn import functional as F

import zoo_integration
from sb3_seer.common.actor_critic import SEERActorCriticPolicy
from sb3_seer.common.seer import SEERMixin

# ---- what you have: any off-policy algorithm, and its policy ----


class MyDDPG(TD3):
    """DDPG whose values are pulled towards zero."""

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        self.policy.set_training_mode(True)
        self._update_learning_rate([self.actor.optimizer, self.critic.optimizer])
        for _ in range(gradient_steps):
            batch: Any = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)  # type: ignore[union-attr]
            with th.no_grad():
                next_actions = self.actor_target(batch.next_observations)
                next_values = self.critic_target(batch.next_observations, next_actions)[0]
                discounts = batch.discounts if batch.discounts is not None else self.gamma  # of n-step returns
                targets = batch.rewards + (1 - batch.dones) * discounts * next_values
            values = self.critic(batch.observations, batch.actions)[0]
            critic_loss = F.mse_loss(values, targets) + 1e-3 * values.square().mean()
            self.critic.optimizer.zero_grad()
            critic_loss.backward()
            self.critic.optimizer.step()

            actor_loss = -self.critic(batch.observations, self.actor(batch.observations))[0].mean()
            self.actor.optimizer.zero_grad()
            actor_loss.backward()
            self.actor.optimizer.step()
            polyak_update(self.critic.parameters(), self.critic_target.parameters(), self.tau)
            polyak_update(self.actor.parameters(), self.actor_target.parameters(), self.tau)
        self._n_updates += gradient_steps


# ---- what it takes ----


class CnnPolicy(SEERActorCriticPolicy, TD3CnnPolicy):
    """Policy of ``MySEERDDPG`` for images."""

    only_targets_see_next = True


class MySEERDDPG(SEERMixin, MyDDPG):
    """``MyDDPG`` that freezes its encoder."""

    policy_aliases = {"CnnPolicy": CnnPolicy}  # noqa: RUF012


if __name__ == "__main__":
    if "--algo" in sys.argv:
        from rl_zoo3.train import train

        zoo_integration.register_algorithm("my_ddpg_seer", MySEERDDPG, base="td3")
        train()
    else:
        parser = argparse.ArgumentParser()
        parser.add_argument("--total-timesteps", type=int, default=600)
        n_steps = parser.parse_args().total_timesteps
        settings = dict(buffer_size=1_000, learning_starts=n_steps // 4, freeze_after=n_steps // 2, batch_size=16)
        model = MySEERDDPG("CnnPolicy", gym.make("CarRacing-v3"), verbose=1, **settings)
        model.learn(n_steps)
        print(f"{model.replay_buffer.stage}: {model.replay_buffer.size()} transitions")

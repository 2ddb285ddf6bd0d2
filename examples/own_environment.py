"""
An agent on an environment of your own: catch what falls, from images of 50x50 pixels. A minute or two on one core.

    python examples/own_environment.py [--total-timesteps 10000]
"""

import argparse
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_seer import SEERDQN, DataEfficientCNN


class Catch(gym.Env):
    """
    Balls fall in one of five columns, ten of them in an episode. Each that the paddle catches is worth 1.

    An observation is an image of shape ``(50, 50, 1)``, uint8: SB3 takes channels last as well as channels first. The places
    of ball and paddle are in ``info``, too: ``analyse_run.py`` asks whether they can be read from the latents.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    n_cells, cell, n_balls = 5, 10, 10

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.observation_space = spaces.Box(0, 255, (self.n_cells * self.cell, self.n_cells * self.cell, 1), np.uint8)
        self.action_space = spaces.Discrete(3)  # left, stay, right

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.paddle, self.n_fallen = self.n_cells // 2, 0
        self._drop()
        return self._image(), self._places()

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.paddle = int(np.clip(self.paddle + action - 1, 0, self.n_cells - 1))
        self.row += 1
        reward = 0.0
        if self.row == self.n_cells - 1:
            reward = float(self.column == self.paddle)
            self.n_fallen += 1
            self._drop()
        return self._image(), reward, self.n_fallen == self.n_balls, False, self._places()

    def render(self) -> np.ndarray:
        return self._image().repeat(8, axis=0).repeat(8, axis=1).repeat(3, axis=2)

    def _drop(self) -> None:
        self.row, self.column = 0, int(self.np_random.integers(self.n_cells))

    def _places(self) -> dict[str, Any]:
        return {"column": self.column, "row": self.row, "paddle": self.paddle}

    def _image(self) -> np.ndarray:
        cells = np.zeros((self.n_cells, self.n_cells, 1), np.uint8)
        cells[self.row, self.column] = 255
        cells[-1, self.paddle] = 128
        return cells.repeat(self.cell, axis=0).repeat(self.cell, axis=1)


# For RL Zoo: --env Catch-v0 --gym-packages own_environment
gym.register("Catch-v0", "own_environment:Catch")


def make_model(total_timesteps: int, **kwargs: Any) -> SEERDQN:
    """
    :param total_timesteps: steps of the training
    :param kwargs: other parameters of the agent
    :return: an agent for ``Catch``
    """
    defaults: dict[str, Any] = dict(
        learning_rate=1e-3,
        buffer_size=max(total_timesteps // 3, 100),  # transitions while images are stored: all of them until the freeze
        learning_starts=min(500, total_timesteps // 10),
        freeze_after=0.3,
        gamma=0.9,
        train_freq=1,
        target_update_interval=200,
        exploration_fraction=0.2,
        policy_kwargs=dict(features_extractor_class=DataEfficientCNN, net_arch=[128]),
        seed=0,
    )
    return SEERDQN("CnnPolicy", Catch(), **{**defaults, **kwargs})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--total-timesteps", type=int, default=10_000)
    args = parser.parse_args()

    model = make_model(args.total_timesteps, verbose=1)
    env = Monitor(Catch())
    before, _ = evaluate_policy(model, env, n_eval_episodes=20)
    model.learn(args.total_timesteps, log_interval=50)
    after, _ = evaluate_policy(model, env, n_eval_episodes=20)
    print(f"caught of 10 balls: {before:.1f} before the training, {after:.1f} after it")
    print(f"encoder frozen: {model.encoder_frozen}; the buffer holds up to {model.replay_buffer.buffer_size:,} transitions")


if __name__ == "__main__":
    main()

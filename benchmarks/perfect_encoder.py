"""
How well SEERSAC would learn from a perfect encoder: latents are the true state of a task, with noise if asked for.

    python -m benchmarks.perfect_encoder [--noise 0.1] [--view 1.66] [--steps 5000] [--seed 0]
    python -m benchmarks.perfect_encoder --task reacher-easy --steps 10000 --episodes 30

The first takes about 40 seconds. The images are black but for the bytes of the state, which the encoder reads. All else is
as with images: the encoder is frozen from the first step, and latents are stored, sampled and acted on as usual.
"""

import argparse
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from torch import nn

import sb3_seer.envs
from benchmarks.common import frozen_agent, learn_and_evaluate
from sb3_seer import SplitExtractor

# Action repeat (SEER's appendix, table 4), and the standard deviations of the state, roughly
TASKS = {
    # Position, cosine and sine of the angle, velocity, angular velocity
    "cartpole-swingup": (8, np.array([0.87, 0.7, 0.7, 1.3, 2.5])),
    # Cosines and sines of two angles, the vector to the target, angular velocities
    "reacher-easy": (4, np.array([0.7, 0.7, 0.7, 0.7, 0.15, 0.15, 1.5, 1.5])),
}
LATENT_DIM = 50


class StateInImage(gym.ObservationWrapper):
    """
    Black images of 36x36 pixels that hold the state, scaled to float32, in their first bytes.

    :param env: a task of dm_control
    :param scale: of the state
    :param view: the state is all zeros where the cart is further than this from the middle of the rail
    """

    def __init__(self, env: gym.Env, scale: np.ndarray, view: float) -> None:
        super().__init__(env)
        self.scale, self.view = scale, view
        self.observation_space = spaces.Box(0, 255, (1, 36, 36), np.uint8)

    def observation(self, observation: Any) -> np.ndarray:
        """:return: shape ``(1, 36, 36)``"""
        if "to_target" in observation:  # angles of the reacher may be several turns
            angles = observation["position"]
            parts = [np.cos(angles), np.sin(angles), observation["to_target"], observation["velocity"]]
        else:
            parts = [np.ravel(part) for part in observation.values()]
        state = np.concatenate(parts)
        image = np.zeros(self.observation_space.shape or (), dtype=np.uint8)
        if abs(state[0]) <= self.view:
            data = np.frombuffer((state / self.scale).astype(np.float32).tobytes(), dtype=np.uint8)
            image[0, 0, : len(data)] = data
        return image


class ReadState(nn.Module):
    """
    Reads the state from an image, and maps it to a latent by a fixed random matrix.

    :param state_dim: numbers in the state
    :param noise: added to the state, in its standard deviations
    """

    lift: th.Tensor

    def __init__(self, state_dim: int, noise: float) -> None:
        super().__init__()
        self.n_bytes, self.noise = 4 * state_dim, noise
        self.register_buffer("lift", th.randn(state_dim, LATENT_DIM, generator=th.Generator().manual_seed(1)))

    def forward(self, images: th.Tensor) -> th.Tensor:
        """:return: shape ``(batch_size, 50)``"""
        pixels = (images[:, 0, 0, : self.n_bytes] * 255.0).round().to(th.uint8)
        state = pixels.contiguous().view(th.float32)  # (batch_size, state_dim)
        return (state + self.noise * th.randn_like(state)) @ self.lift


class StateExtractor(SplitExtractor):
    """The encoder is ``ReadState``, the head a layer normalisation as in ``PixelEncoder``."""

    def __init__(self, observation_space: spaces.Box, state_dim: int, noise: float) -> None:
        super().__init__(observation_space, LATENT_DIM)
        self.trunk = ReadState(state_dim, noise)
        self.projection = nn.Identity()
        self.head = nn.LayerNorm(LATENT_DIM)


def make_env(task: str, view: float) -> gym.Env:
    """:return: the task with the papers' action repeat"""
    repeat, scale = TASKS[task]
    env = sb3_seer.envs.ActionRepeat(gym.make(f"dm_control/{task}-v0"), repeat=repeat)
    return Monitor(StateInImage(env, scale, view))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(TASKS), default="cartpole-swingup")
    parser.add_argument("--noise", type=float, default=0.0, help="noise of the latents, in standard deviations of the state")
    parser.add_argument("--view", type=float, default=np.inf, help="the cart is not seen further from the middle")
    parser.add_argument("--steps", type=int, default=5000, help="of the agent")
    parser.add_argument("--episodes", type=int, default=5, help="of an evaluation, one after each quarter of the steps")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    if args.view < np.inf and args.task != "cartpole-swingup":
        parser.error(f"--view is of cartpole-swingup, got {args.task}")
    kwargs = dict(state_dim=len(TASKS[args.task][1]), noise=args.noise)
    extractor = dict(features_extractor_class=StateExtractor, features_extractor_kwargs=kwargs)
    model = frozen_agent(make_env(args.task, args.view), args.steps, args.seed, **extractor)
    learn_and_evaluate(model, lambda: make_env(args.task, args.view), args.steps, args.episodes)


if __name__ == "__main__":
    main()

"""
How well SEERSAC would learn from a perfect encoder: latents are the true state of cartpole-swingup, with noise if asked for.

    python -m benchmarks.perfect_encoder [--noise 0.1] [--view 1.66] [--steps 5000] [--seed 0]

About 40 seconds. The images are black but for the bytes of the state, which the encoder reads. All else is as with images:
the encoder is frozen from the first step, and latents are stored, sampled and acted on as usual.
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

# Standard deviations of position, cosine and sine of the angle, velocity and angular velocity, roughly
SCALE = np.array([0.87, 0.7, 0.7, 1.3, 2.5])
N_BYTES = SCALE.size * 4
LATENT_DIM = 50


class StateInImage(gym.ObservationWrapper):
    """
    Black images of 36x36 pixels that hold the state, scaled to float32, in their first bytes.

    :param env: cartpole of dm_control
    :param view: the state is all zeros where the cart is further than this from the middle of the rail
    """

    def __init__(self, env: gym.Env, view: float) -> None:
        super().__init__(env)
        self.view = view
        self.observation_space = spaces.Box(0, 255, (1, 36, 36), np.uint8)

    def observation(self, observation: Any) -> np.ndarray:
        """:return: shape ``(1, 36, 36)``"""
        state = np.concatenate([np.ravel(part) for part in observation.values()])
        image = np.zeros(self.observation_space.shape or (), dtype=np.uint8)
        if abs(state[0]) <= self.view:
            image[0, 0, :N_BYTES] = np.frombuffer((state / SCALE).astype(np.float32).tobytes(), dtype=np.uint8)
        return image


class ReadState(nn.Module):
    """
    Reads the state from an image, and maps it to a latent by a fixed random matrix.

    :param noise: added to the state, in its standard deviations
    """

    lift: th.Tensor

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.noise = noise
        self.register_buffer("lift", th.randn(SCALE.size, LATENT_DIM, generator=th.Generator().manual_seed(1)))

    def forward(self, images: th.Tensor) -> th.Tensor:
        """:return: shape ``(batch_size, 50)``"""
        pixels = (images[:, 0, 0, :N_BYTES] * 255.0).round().to(th.uint8)
        state = pixels.contiguous().view(th.float32)  # (batch_size, 5)
        return (state + self.noise * th.randn_like(state)) @ self.lift


class StateExtractor(SplitExtractor):
    """The encoder is ``ReadState``, the head a layer normalisation as in ``PixelEncoder``."""

    def __init__(self, observation_space: spaces.Box, noise: float) -> None:
        super().__init__(observation_space, LATENT_DIM)
        self.trunk = ReadState(noise)
        self.projection = nn.Identity()
        self.head = nn.LayerNorm(LATENT_DIM)


def make_env(view: float) -> gym.Env:
    """:return: cartpole-swingup with the papers' action repeat"""
    env = sb3_seer.envs.ActionRepeat(gym.make("dm_control/cartpole-swingup-v0"), repeat=8)
    return Monitor(StateInImage(env, view))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", type=float, default=0.0, help="noise of the latents, in standard deviations of the state")
    parser.add_argument("--view", type=float, default=np.inf, help="the cart is not seen further from the middle than this")
    parser.add_argument("--steps", type=int, default=5000, help="of the agent, 8 of the environment each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    extractor = dict(features_extractor_class=StateExtractor, features_extractor_kwargs=dict(noise=args.noise))
    model = frozen_agent(make_env(args.view), args.steps, args.seed, **extractor)
    learn_and_evaluate(model, lambda: make_env(args.view), args.steps)


if __name__ == "__main__":
    main()

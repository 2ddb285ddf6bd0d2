"""What the tests share: environments of a few pixels, learned in seconds, and agents for them."""

import copy
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib import TQC, CrossQ
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.logger import configure
from torch import nn

from sb3_seer import (
    SEERCURL,
    SEERDQN,
    SEERQRDQN,
    SEERSAC,
    SEERTD3,
    SEERTQC,
    SEERCrossQ,
    SEERRainbow,
    SplitExtractor,
)
from sb3_seer.common.type_aliases import Latents


class LightEnv(gym.Env):
    """
    One of four lamps is lit: the action that names it earns 1, and then another may be lit.
    An episode of 10 steps is worth 2.5 to a random agent and 10 to one that sees.

    :param terminates: whether an episode ends with a termination or with a truncation
    :param size: height and width of the image, in pixels
    """

    def __init__(self, terminates: bool = False, size: int = 16, length: int = 10) -> None:
        self.observation_space = spaces.Box(0, 255, (1, size, size), np.uint8)
        self.action_space: spaces.Space = spaces.Discrete(4)
        self.terminates, self.size, self.length = terminates, size, length

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.t = 0
        return self._next_observation(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        reward = self._reward(action)
        self.t += 1
        done = self.t == self.length
        return self._next_observation(), reward, done and self.terminates, done and not self.terminates, {}

    def _next_observation(self) -> np.ndarray:
        self.lamp = int(self.np_random.integers(4))
        return self._draw(self.lamp)

    def _draw(self, lamp: int) -> np.ndarray:
        # A little noise, so that no two observations are alike
        image = self.np_random.integers(0, 32, self.observation_space.shape, dtype=np.uint8)
        half = self.size // 2
        row, column = divmod(lamp, 2)
        image[0, row * half : (row + 1) * half, column * half : (column + 1) * half] += 200
        return image

    def _reward(self, action: Any) -> float:
        return float(action == self.lamp)


class DialEnv(LightEnv):
    """The same with a continuous action: its two signs name the lamp, and each right one earns up to one half."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.action_space = spaces.Box(-1, 1, (2,), np.float32)

    def _reward(self, action: Any) -> float:
        wanted = np.array(divmod(self.lamp, 2)) * 2 - 1
        return float(np.clip(action * wanted, -1, 1).mean())


class PuckEnv(gym.Env):
    """
    A puck slides on a rail without friction; the action pushes it. Each of the 50 steps earns up to 1 for being near the
    middle, where it stays only if it brakes in time. SB3's SAC earns 47 from position and velocity, and 14 from the
    position alone. The image shows the position.
    """

    def __init__(self) -> None:
        self.observation_space = spaces.Box(0, 255, (1, 12, 48), np.uint8)
        self.action_space = spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.t = 0
        self.position, self.velocity = self.np_random.uniform(-0.8, 0.8), self.np_random.uniform(-0.1, 0.1)
        return self._draw(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.t += 1
        self.velocity = float(np.clip(self.velocity + 0.04 * float(action[0]), -0.25, 0.25))
        self.position += self.velocity
        if abs(self.position) > 1:  # it bounces back
            self.position, self.velocity = float(np.sign(self.position)), -self.velocity
        return self._draw(), float(np.exp(-((self.position / 0.15) ** 2))), False, self.t == 50, {}

    def _draw(self) -> np.ndarray:
        image = np.zeros(self.observation_space.shape, np.uint8)
        column = (self.position + 1) / 2 * 43 + 2
        # Its edges are grey, so that less than a pixel can be seen
        image[0, 4:8] = 255 * np.clip(2.5 - np.abs(np.arange(48) - column), 0, 1)
        return image


class TinyEncoder(SplitExtractor):
    """A PixelEncoder for a few pixels: one convolution, a projection and a normalisation."""

    def __init__(self, observation_space: spaces.Box, latent_dim: int = 8) -> None:
        super().__init__(observation_space, latent_dim)
        channels, height, width = observation_space.shape
        self.trunk = nn.Sequential(nn.Conv2d(channels, 8, 4, stride=4), nn.ReLU(), nn.Flatten())
        self.projection = nn.Linear(8 * (height // 4) * (width // 4), latent_dim)
        self.head = nn.LayerNorm(latent_dim)


class PuckEncoder(SplitExtractor):
    """Two convolutions for the images of a PuckEnv."""

    def __init__(self, observation_space: spaces.Box, latent_dim: int = 16) -> None:
        super().__init__(observation_space, latent_dim)
        n_channels = observation_space.shape[0]
        convolutions = [nn.Conv2d(n_channels, 16, 3, stride=2), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2), nn.ReLU()]
        self.trunk = nn.Sequential(*convolutions, nn.Flatten())
        self.projection = nn.Linear(16 * 2 * 11, latent_dim)
        self.head = nn.LayerNorm(latent_dim)


ALGORITHMS = [SEERSAC, SEERCURL, SEERTD3, SEERTQC, SEERCrossQ, SEERQRDQN, SEERDQN, SEERRainbow]


def is_continuous(algorithm: type) -> bool:
    """:return: whether it has an actor, and continuous actions"""
    return issubclass(algorithm, SAC | TD3 | TQC | CrossQ)


def make_model(algorithm: type, extractor: type | None = TinyEncoder, **kwargs: Any):
    env = kwargs.pop("env", None) or (DialEnv if is_continuous(algorithm) else LightEnv)(size=kwargs.pop("size", 16))
    policy_kwargs: dict[str, Any] = dict(net_arch=[16], **kwargs.pop("policy_kwargs", {}))
    if extractor is not None:
        policy_kwargs["features_extractor_class"] = extractor
    defaults: dict[str, Any] = dict(buffer_size=200, learning_starts=10, batch_size=8, train_freq=1, seed=0, device="cpu")
    if not is_continuous(algorithm):
        defaults["target_update_interval"] = 7
    if algorithm is SEERCURL and kwargs.get("augmentation", "") is None:
        # The contrastive loss needs an augmentation
        defaults["cpc_update_freq"] = None
    return algorithm("CnnPolicy", env, policy_kwargs=policy_kwargs, **{**defaults, **kwargs})


def make_puck_model(env: Any, **kwargs: Any) -> SEERSAC:
    """The settings of ``hyperparams/sac_seer.yml`` in small, for a PuckEnv with two stacked frames."""
    policy_kwargs: dict[str, Any] = dict(features_extractor_class=PuckEncoder, net_arch=[64, 64])
    policy_kwargs.update(ortho_init=True, log_std_bounds=(-10, 2))
    defaults: dict[str, Any] = dict(
        augmentation="random_shift", augmentation_kwargs=dict(pad=1), n_augmentations=2, n_views=2, learning_rate=1e-3,
        batch_size=64, gamma=0.9, tau=0.02, ent_coef="auto_0.1", policy_kwargs=policy_kwargs, seed=0, device="cpu",
    )  # fmt: skip
    return SEERSAC("CnnPolicy", env, **{**defaults, **kwargs})


def encoder_state(model) -> dict[str, th.Tensor]:
    """All weights of all encoders, the targets' too."""
    return {
        name: value.clone()
        for name, value in model.policy.state_dict().items()
        if ".trunk." in name or ".projection." in name or ".cnn." in name or "extractor.linear." in name
    }


def assert_same(state: dict[str, th.Tensor], other: dict[str, th.Tensor]) -> None:
    assert state.keys() == other.keys() and state
    for name, value in state.items():
        assert th.equal(value, other[name]), name


def train_on(model, gradient_steps: int = 10) -> dict[str, th.Tensor]:
    """:return: weights after some more gradient steps with known random numbers"""
    np.random.seed(1)
    th.manual_seed(1)
    model.set_logger(configure(None, []))
    model.train(gradient_steps=gradient_steps, batch_size=16)
    return copy.deepcopy(model.policy.state_dict())


def check_latents_stand_for_images(make: Callable[[], Any], rtol: float = 1e-4, atol: float = 1e-6) -> None:
    """
    Invariant 4: training from latents equals training from images through the frozen encoder.

    :param make: the same trained model, twice, before its freeze
    """
    weights = []
    for from_latents in (False, True):
        model = make()
        images = copy.deepcopy(model.replay_buffer)
        model.freeze_encoder()
        frozen = copy.deepcopy(model.policy.state_dict())
        if not from_latents:
            model.replay_buffer = images
        assert isinstance(model.replay_buffer.sample(4).observations, Latents) == from_latents
        weights.append(train_on(model, gradient_steps=20))
        assert any(not th.equal(weights[-1][name], value) for name, value in frozen.items())
    for name, value in weights[0].items():
        th.testing.assert_close(weights[1][name], value, rtol=rtol, atol=atol)

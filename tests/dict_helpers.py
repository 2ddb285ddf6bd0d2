"""Environments, encoders and agents for ``Dict`` observations with images and other keys."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import CombinedExtractor
from torch import nn

from sb3_seer import SplitExtractor
from tests.helpers import DialEnv, LightEnv, is_continuous

IMAGES, OTHERS = ("image", "map"), ("flags", "level", "vector")


class SwitchEnv(gym.Wrapper):
    """
    The lamps of an environment in an image, beside keys of other kinds. The first number of the vector is a switch:
    positive, it turns the actions around, so that 0 means lamp 3 (or each sign the other one).

    :param env: a ``LightEnv`` or ``DialEnv``
    :param boxes: whether the other keys are boxes only
    :param dtype: of the vector
    """

    def __init__(self, env: LightEnv, boxes: bool = False, dtype: str = "float64") -> None:
        super().__init__(env)
        keys: dict[str, spaces.Space] = dict(
            image=env.observation_space,
            map=spaces.Box(0, 255, (2, env.size + 4, env.size + 4), np.uint8),
            vector=spaces.Box(-1, 1, (2,), np.dtype(dtype).type),
        )
        if not boxes:
            keys.update(level=spaces.Discrete(3), flags=spaces.MultiBinary(4))
        self.observation_space = spaces.Dict(keys)

    def reset(self, **kwargs: Any) -> tuple[dict[str, Any], dict]:
        image, info = self.env.reset(**kwargs)
        return self._observation(image), info

    def step(self, action: Any) -> tuple[dict[str, Any], Any, bool, bool, dict]:
        if self.switch > 0:
            action = 3 - action if isinstance(self.action_space, spaces.Discrete) else -action
        image, *rest = self.env.step(action)
        return self._observation(image), *rest

    def _observation(self, image: np.ndarray) -> dict[str, Any]:
        rng = self.unwrapped.np_random
        self.switch, number = rng.choice([-0.7, -0.5, 0.5, 0.7]), rng.uniform(-1, 1)
        parts = dict(
            image=image,
            map=rng.integers(0, 256, self.observation_space["map"].shape, dtype=np.uint8),
            vector=np.array([self.switch, number], dtype=self.observation_space["vector"].dtype),
            level=rng.integers(3),
            flags=rng.integers(2, size=4, dtype=np.int8),
        )
        return {key: part for key, part in parts.items() if key in self.observation_space.spaces}


class PerImage(nn.ModuleDict):
    """A module for each image, their outputs side by side."""

    def forward(self, images: dict[str, th.Tensor]) -> th.Tensor:
        return th.cat([module(images[key]) for key, module in self.items()], dim=1)


class TinyDictEncoder(SplitExtractor):
    """A convolution for each image, one projection of both; the other keys join behind the normalisation."""

    def __init__(self, observation_space: spaces.Dict, latent_dim: int = 8) -> None:
        images = {key: observation_space[key] for key in IMAGES}
        n_others = sum(spaces.flatdim(observation_space[key]) for key in OTHERS)
        super().__init__(observation_space, latent_dim, features_dim=latent_dim + n_others)
        convolutions = {
            key: nn.Sequential(nn.Conv2d(box.shape[0], 8, 4, stride=4), nn.ReLU(), nn.Flatten()) for key, box in images.items()
        }
        self.trunk = PerImage(convolutions)
        n_outputs = sum(8 * (box.shape[1] // 4) * (box.shape[2] // 4) for box in images.values())
        self.projection = nn.Linear(n_outputs, latent_dim)
        self.head = nn.LayerNorm(latent_dim)

    def features(self, latents: th.Tensor, others: dict[str, th.Tensor]) -> th.Tensor:
        return th.cat([self.head(latents), *(others[key].flatten(1) for key in OTHERS)], dim=1)


# An extractor, and pixels enough for it
SPLIT, COMBINED = pytest.param(TinyDictEncoder, 16, id="split"), pytest.param(CombinedExtractor, 36, id="combined")
EXTRACTORS = pytest.mark.parametrize("extractor, size", [SPLIT, COMBINED])


def make_env(algorithm: type, size: int = 16, **kwargs: Any) -> SwitchEnv:
    return SwitchEnv((DialEnv if is_continuous(algorithm) else LightEnv)(size=size), **kwargs)


def make_model(algorithm: type, extractor: type = TinyDictEncoder, size: int = 16, env: Any = None, **kwargs: Any) -> Any:
    policy_kwargs: dict[str, Any] = dict(net_arch=[16], features_extractor_class=extractor, **kwargs.pop("policy_kwargs", {}))
    if issubclass(extractor, CombinedExtractor):
        policy_kwargs["features_extractor_kwargs"] = dict(cnn_output_dim=8)
    defaults: dict[str, Any] = dict(buffer_size=200, learning_starts=10, batch_size=8, train_freq=1, seed=0, device="cpu")
    if not is_continuous(algorithm):
        defaults.update(target_update_interval=7, tau=0.3)
    env = make_env(algorithm, size) if env is None else env
    return algorithm("MultiInputPolicy", env, policy_kwargs=policy_kwargs, **{**defaults, **kwargs})

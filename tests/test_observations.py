"""Which parts of an observation are images, and how many frames they stack."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.wrappers import FrameStackObservation
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecMonitor

from sb3_seer.common.observations import ObservationLayout, find_n_stack, stack_axis
from tests.helpers import LightEnv


class Grey(gym.ObservationWrapper):
    """Images without a channel, which a stack of frames becomes."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.observation_space = spaces.Box(0, 255, env.observation_space.shape[1:], np.uint8)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return observation[0]


class CardGame(LightEnv):
    """An environment with a stack of cards, and images that do not stack anything."""

    stack_size = 2

    def __init__(self) -> None:
        super().__init__()
        self.observation_space = spaces.Box(0, 255, (2, 16, 16), np.uint8)


@pytest.mark.parametrize(
    "make_env, n_stack",
    [
        (lambda: DummyVecEnv([LightEnv]), 1),
        (lambda: VecMonitor(VecFrameStack(DummyVecEnv([LightEnv]), 3, channels_order="first")), 3),
        (lambda: DummyVecEnv([lambda: FrameStackObservation(Grey(LightEnv()), 4)] * 2), 4),
        (lambda: DummyVecEnv([CardGame]), 1),
    ],
)
def test_stacked_frames_are_found_in_the_wrappers(make_env, n_stack):
    assert find_n_stack(make_env()) == n_stack


@pytest.mark.parametrize(
    "shape, dtype, axis",
    [
        ((9, 20, 20), "uint8", 0),
        ((10, 21, 21), "uint8", None),  # SB3 has channels first in images of bytes
        ((9, 20, 20), "float32", 0),
        ((20, 20, 9), "float32", 2),
        ((1, 20, 60), "float32", 2),  # floats with channels first, stacked by default along the last axis
        ((10, 20, 20), "float32", None),
    ],
)
def test_the_axis_of_frames(shape, dtype, axis):
    assert stack_axis(spaces.Box(0, 255, shape, np.dtype(dtype).type), 3) == axis


@pytest.mark.parametrize("as_dict", [False, True])
def test_images_are_cut_into_frames_and_back(as_dict):
    rng = np.random.default_rng(0)
    parts = dict(first=rng.integers(0, 256, (4, 6, 5, 5), dtype=np.uint8), last=rng.random((4, 7, 5, 6), dtype=np.float32))
    boxes = {key: spaces.Box(0, 255, part.shape[1:], part.dtype.type) for key, part in parts.items()}
    layout = ObservationLayout(spaces.Dict(boxes) if as_dict else boxes["first"], n_stack=3, n_envs=4)
    observations = parts if as_dict else parts["first"]
    frames = layout.to_frames(layout.check("obs", observations))
    assert frames.shape == (4, 3, layout.frame_bytes)
    images = layout.to_images(frames)
    for key in parts if as_dict else ("",):
        np.testing.assert_array_equal(images[key] if as_dict else images, parts[key or "first"])
    # The newest frame: the last channels of either axis
    newest = parts["first"][:, 4:].reshape(4, -1)
    np.testing.assert_array_equal(frames[:, 2, : newest.shape[1]], newest)
    if as_dict:
        np.testing.assert_array_equal(
            frames[:, 2, newest.shape[1] :].copy().view(np.float32), parts["last"][..., 4:].reshape(4, -1)
        )

"""The DeepMind control suite: its ids and its pixels."""

import os
import sys
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.core import ActType


def register_dm_control() -> None:
    """
    Register the environments of dm_control with gymnasium, as ``dm_control/cartpole-swingup-v0``: ``import shimmy`` does it.

    Without a screen, dm_control is told to draw through EGL, unless ``MUJOCO_GL`` is set. It looks once, when it is imported.

    :raises ImportError: if dm_control or shimmy is not installed
    """
    has_screen = sys.platform != "linux" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
    if not has_screen and "dm_control" not in sys.modules:
        os.environ.setdefault("MUJOCO_GL", "egl")
    # What they import adds filters for the warnings of the whole process
    with warnings.catch_warnings():
        import shimmy  # noqa: F401


class DMControlPixels(gym.ObservationWrapper[np.ndarray, ActType, Any], gym.utils.RecordConstructorArgs):
    """
    What a camera of dm_control sees, in place of the state: uint8 images of shape ``(height, width, 3)``.

    The images come from the physics, not from ``env.render()``: they do not depend on the environment's
    ``render_mode``, which RL Zoo sets as it needs, and a video keeps the size that it has without this wrapper.
    An image is rendered once a step of this wrapper: inside it, ``ActionRepeat`` renders nothing.

    :param env: an environment of dm_control, as registered by shimmy
    :param height: pixels; the default is the papers' (they crop it to 84)
    :param width: pixels
    :param camera_id: number or name of the camera
    :param shadows: whether to draw shadows, as in the published benchmarks. On a CPU an image without them takes a quarter of
        the time (cartpole, 50x50 pixels: 3 ms for 13)
    :raises ValueError: if the environment is not one of dm_control
    """

    def __init__(
        self, env: gym.Env, height: int = 100, width: int = 100, camera_id: int | str = 0, shadows: bool = True
    ) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, height=height, width=width, camera_id=camera_id, shadows=shadows)
        super().__init__(env)
        if not hasattr(env.unwrapped, "physics"):
            raise ValueError(f"`env` must be an environment of dm_control, got {env}")
        self.render_kwargs: dict[str, Any] = dict(height=height, width=width, camera_id=camera_id)
        if not shadows:
            self.render_kwargs["render_flag_overrides"] = dict(shadow=False)
        self.observation_space = spaces.Box(0, 255, (height, width, 3), np.uint8)

    def observation(self, observation: Any) -> np.ndarray:
        """
        :param observation: the state, which is not used
        :return: an image
        """
        # Not kept: some environments build new physics for each episode
        physics = self.env.unwrapped.physics  # type: ignore[attr-defined]
        return np.ascontiguousarray(physics.render(**self.render_kwargs))

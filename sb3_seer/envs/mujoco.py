"""The pixels of gymnasium's MuJoCo environments."""

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.core import ActType


class MujocoPixels(gym.ObservationWrapper[np.ndarray, ActType, Any], gym.utils.RecordConstructorArgs):
    """
    What a camera of MuJoCo sees, in place of the state: uint8 images of shape ``(height, width, 3)``.

    Unlike gymnasium's ``AddRenderObservation`` it does not depend on the environment's ``render_mode``, which RL Zoo sets as
    it needs. An image is rendered once a step of this wrapper: inside it, ``ActionRepeat`` renders nothing.

    :param env: an environment with ``model`` and ``data``: gymnasium's, and others that extend ``MujocoEnv``
    :param height: pixels
    :param width: pixels
    :param camera: number or name of a camera of the model; or attributes of a free one, such as ``distance``, ``azimuth``,
        ``elevation`` (degrees) and ``lookat`` (a point); what is not given is MuJoCo's default, from the size of the model
    :raises ValueError: if the environment is not one of MuJoCo
    """

    def __init__(
        self, env: gym.Env, height: int = 84, width: int = 84, camera: int | str | Mapping[str, Any] | None = None
    ) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, height=height, width=width, camera=camera)
        super().__init__(env)
        if not hasattr(env.unwrapped, "model") or not hasattr(env.unwrapped, "data"):
            raise ValueError(f"`env` must be a MuJoCo environment of gymnasium, got {env}")
        self.camera = camera
        self.observation_space = spaces.Box(0, 255, (height, width, 3), np.uint8)
        self._renderer: Any = None
        self._camera: Any = camera

    def observation(self, observation: Any) -> np.ndarray:
        """
        :param observation: the state, which is not used
        :return: an image
        """
        import mujoco  # in an extra

        simulation: Any = self.env.unwrapped
        if self._renderer is None:
            height, width, _ = self.observation_space.shape  # type: ignore[misc]
            self._renderer = mujoco.Renderer(simulation.model, height, width)
            if not isinstance(self.camera, int | str):
                self._camera = mujoco.MjvCamera()
                mujoco.mjv_defaultFreeCamera(simulation.model, self._camera)
                for name, value in (self.camera or {}).items():
                    setattr(self._camera, name, value)
        if hasattr(simulation, "_render_callback"):  # gymnasium-robotics moves the mark of a goal there when it renders
            simulation._render_callback()
        self._renderer.update_scene(simulation.data, self._camera)
        return self._renderer.render().copy()

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        super().close()

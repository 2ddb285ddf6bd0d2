from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.core import ActType, ObsType
from stable_baselines3.common.preprocessing import is_image_space_channels_first

from sb3_seer.common.utils import check_positive_int


class ActionRepeat(gym.Wrapper[ObsType, ActType, ObsType, ActType], gym.utils.RecordConstructorArgs):
    """
    Take each action several times, and sum the rewards. An episode that ends in the middle of it ends there.

    Unlike SB3's ``MaxAndSkipEnv`` it returns the last observation as it is, whatever its type. gymnasium has the same wrapper
    since 1.3, as ``RepeatAction``.

    :param env: environment to wrap
    :param repeat: how often to take each action
    :raises ValueError: if ``repeat`` is not an integer >= 1
    """

    def __init__(self, env: gym.Env[ObsType, ActType], repeat: int) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, repeat=repeat)
        super().__init__(env)
        check_positive_int("repeat", repeat)
        self.repeat = repeat

    def step(self, action: ActType) -> tuple[ObsType, SupportsFloat, bool, bool, dict[str, Any]]:
        total_reward = 0.0
        for _ in range(self.repeat):
            observation, reward, terminated, truncated, info = self.env.step(action)
            total_reward += float(reward)
            if terminated or truncated:
                break
        return observation, total_reward, terminated, truncated, info


class ResizeImages(gym.ObservationWrapper[Any, ActType, Any], gym.utils.RecordConstructorArgs):
    """
    Resize images by averaging over areas. Unlike gymnasium's ``ResizeObservation`` it takes ``Dict`` observations, of which
    it resizes the images (each ``Box`` of bytes with 3 dimensions, channels last) and leaves the other keys.

    :param env: environment to wrap
    :param height: pixels
    :param width: pixels
    :param grayscale: whether to average the channels
    :raises ValueError: if there is no image, or one with its channels first
    """

    def __init__(self, env: gym.Env, height: int, width: int, grayscale: bool = False) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, height=height, width=width, grayscale=grayscale)
        super().__init__(env)
        self.height, self.width, self.grayscale = height, width, grayscale
        space = env.observation_space
        if isinstance(space, spaces.Dict):
            self.keys = [key for key, box in space.items() if self._is_image(box)]
            images = {key: self._resized(space[key]) for key in self.keys}
            self.observation_space = spaces.Dict({**space.spaces, **images})
        else:
            self.keys = [""] if self._is_image(space) else []
            self.observation_space = self._resized(space) if self.keys else space
        if not self.keys:
            raise ValueError(f"`env` must have images, got observations of {space}")

    @staticmethod
    def _is_image(space: spaces.Space) -> bool:
        return isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) == 3

    def _resized(self, box: Any) -> spaces.Box:
        if is_image_space_channels_first(box):
            raise ValueError(f"Images of `env` must have their channels last, got {box}")
        return spaces.Box(0, 255, (self.height, self.width, 1 if self.grayscale else box.shape[2]), np.uint8)

    def observation(self, observation: Any) -> Any:
        """
        :param observation: an image, or images and other keys
        :return: the same with resized images
        """
        if not isinstance(observation, dict):
            return self._resize(observation)
        return {**observation, **{key: self._resize(observation[key]) for key in self.keys}}

    def _resize(self, image: np.ndarray) -> np.ndarray:
        import cv2  # in the extras

        if self.grayscale:
            image = image.mean(axis=2, keepdims=True).round().astype(np.uint8)
        # OpenCV 5 resizes up to 4 channels at a time
        size = (self.width, self.height)
        return np.stack([cv2.resize(channel, size, interpolation=cv2.INTER_AREA) for channel in cv2.split(image)], axis=-1)

"""Which parts of an observation are images, and how a stack of frames is cut into bytes."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import FrameStackObservation
from stable_baselines3.common.preprocessing import get_obs_shape, is_image_space
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecNormalize, unwrap_vec_wrapper

from sb3_seer.common.type_aliases import Observations


def image_spaces(space: spaces.Space) -> dict[str, spaces.Box]:
    """
    :param space: an observation space
    :return: its images (each ``Box`` of 3 dimensions) by key, under the key ``""`` if it is not a ``Dict``
    """
    parts = space.spaces if isinstance(space, spaces.Dict) else {"": space}
    return {key: part for key, part in parts.items() if isinstance(part, spaces.Box) and len(part.shape) == 3}


def map_parts(function: Callable[..., Any], *observations: Any) -> Any:
    """
    :param function: of arrays or tensors
    :param observations: arrays or tensors, or dicts with the same keys
    :return: the function's result; for dicts, its result for each key
    """
    if isinstance(observations[0], dict):
        return {key: function(*(part[key] for part in observations)) for key in observations[0]}
    return function(*observations)


def separate(observations: Any, space: spaces.Space) -> tuple[Any, dict[str, Any]]:
    """
    :param observations: images, or a dict with some
    :param space: of the observations
    :return: the images, by key if there are keys; and the other keys. Both in the order of the space, which is not always
        the order in which an environment returns them
    """
    if not isinstance(observations, dict):
        return observations, {}
    assert isinstance(space, spaces.Dict)
    parts = {key: observations[key] for key in space.spaces if key in observations}
    keys = image_spaces(space)
    images = {key: part for key, part in parts.items() if key in keys}
    return images, {key: part for key, part in parts.items() if key not in keys}


def crop_to_middle(images: Any, size: Sequence[int]) -> Any:
    """
    :param images: array or tensor of shape ``(..., H, W)``
    :param size: (height, width) of the output, in pixels
    :return: a view of shape ``(..., *size)``
    """
    height, width = size
    top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
    return images[..., top : top + height, left : left + width]


def center_crop(observations: Any, space: spaces.Space) -> Any:
    """
    :param observations: batch of images, or a dict with some (any keys of the space)
    :param space: of the cropped images
    :return: the same, with larger images cropped to their middle
    """
    if not isinstance(observations, dict):
        return crop_to_middle(observations, space.shape[-2:])  # type: ignore[index]
    images = image_spaces(space)
    return {key: crop_to_middle(part, images[key].shape[-2:]) if key in images else part for key, part in observations.items()}


def stack_axis(box: spaces.Box, n_stack: int) -> int | None:
    """
    :param box: space of an image
    :param n_stack: frames in it
    :return: the axis along which they are stacked, None if ``n_stack`` divides neither the first nor the last axis. SB3
        puts the channels of images of bytes first. It leaves others, such as depth as floats, as they are, and
        ``VecFrameStack`` stacks these along the last axis by default: of both axes, the shorter one is tried first
    """
    axes = (0, 2) if is_image_space(box) or box.shape[0] <= box.shape[2] else (2, 0)
    return next((axis for axis in axes[: 1 if is_image_space(box) else 2] if box.shape[axis] % n_stack == 0), None)


def check_images_are_not_normalized(env: VecNormalize | None, images: Mapping[str, spaces.Box]) -> None:
    """
    :param env: the ``VecNormalize`` of the algorithm, if there is one
    :param images: spaces of the images that its replay buffer stores, by key
    :raises ValueError: if it normalises them: they are stored, and augmented, as bytes
    """
    if env is None or not env.norm_obs or not set(images) & set(env.norm_obs_keys or images):
        return
    if isinstance(env.observation_space, spaces.Dict):
        names = ", ".join(map(repr, images))
        raise ValueError(f"`norm_obs_keys` of VecNormalize must not have the images {names}, got {env.norm_obs_keys}")
    raise ValueError("`norm_obs` of VecNormalize must be False with images, got True")


def find_n_stack(env: VecEnv) -> int:
    """
    :param env: environment of the algorithm, with images whose channels come first (or a ``Dict`` with some)
    :return: the number of frames that its wrappers stack, 1 if they do not
    """
    frame_stack = unwrap_vec_wrapper(env, VecFrameStack)
    n_stack = 1 if frame_stack is None else frame_stack.stacked_obs.n_stack
    # A VecEnv that runs its environments elsewhere need not know their wrappers
    with contextlib.suppress(NotImplementedError, AttributeError, TypeError):
        if n_stack == 1 and all(env.env_is_wrapped(FrameStackObservation)):
            n_stack = env.get_attr("stack_size")[0]
    images = image_spaces(env.observation_space).values()
    return n_stack if all(stack_axis(box, n_stack) is not None for box in images) else 1


class ObservationLayout:
    """
    Checks observations, and cuts their images into frames of bytes: channels first, all images of an observation side by side.

    :param space: a ``Box`` of images, or a ``Dict`` with at least one
    :param n_stack: frames stacked in each image, the newest last
    :param n_envs: observations in a batch that is checked
    :raises ValueError: if the space has no image, or an axis of frames is not a multiple of ``n_stack``
    """

    def __init__(self, space: spaces.Space, n_stack: int, n_envs: int):
        self.is_dict = isinstance(space, spaces.Dict)
        self.n_stack, self.n_envs = n_stack, n_envs
        self.images = image_spaces(space)
        if not self.images:
            raise ValueError(f"`observation_space` must be a Box of images (3 dimensions) or a Dict with some, got {space}")
        parts = space.spaces if isinstance(space, spaces.Dict) else {"": space}
        self.vectors = {key: part for key, part in parts.items() if key not in self.images}
        self.shapes: dict[str, tuple[int, ...]] = {key: get_obs_shape(part) for key, part in parts.items()}  # type: ignore[misc]
        # Vectors of float64 are stored as float32, which is what a network makes of them
        self.dtypes = {
            key: np.dtype(np.float32 if key in self.vectors and part.dtype == np.float64 else part.dtype)
            for key, part in parts.items()
        }
        self.axes: dict[str, int] = {}
        for key, box in self.images.items():
            axis = stack_axis(box, n_stack)
            if axis is None:
                raise ValueError(f"`n_stack` must divide the channels of an image of shape {box.shape}, got {n_stack}")
            self.axes[key] = axis
        # By key, which bytes of a frame are of that image
        self.bytes_of: dict[str, slice] = {}
        self.frame_bytes = 0
        for key, box in self.images.items():
            start = self.frame_bytes
            self.frame_bytes += math.prod(box.shape) * box.dtype.itemsize // n_stack
            self.bytes_of[key] = slice(start, self.frame_bytes)

    def check(self, name: str, observations: Observations) -> dict[str, np.ndarray]:
        """
        :param name: of the observations, for the message
        :param observations: one for each env
        :return: the same by key (``""`` if they are not a ``Dict``), each of shape ``(n_envs, *shape)``
        :raises ValueError: if the shape is another
        """
        parts = {}
        for key, shape in self.shapes.items():
            part = np.asarray(observations[key] if self.is_dict else observations, dtype=self.dtypes[key])
            if shape == (1,):
                part = part.reshape(-1, 1)  # numbers of a Discrete space have no shape of their own
            elif part.shape == shape and self.n_envs == 1:
                part = part[None]
            if part.shape != (self.n_envs, *shape):
                of_key = f" of key {key!r}" if self.is_dict else ""
                raise ValueError(f"`{name}`{of_key} must have shape {(self.n_envs, *shape)}, got {part.shape}")
            parts[key] = part
        return parts

    def images_of(self, parts: dict[str, np.ndarray]) -> Observations:
        """
        :param parts: observations by key
        :return: their images, by key if the space is a ``Dict``
        """
        return {key: parts[key] for key in self.images} if self.is_dict else parts[""]

    def to_frames(self, parts: dict[str, np.ndarray]) -> np.ndarray:
        """
        :param parts: batch of observations by key
        :return: bytes of their images, shape ``(batch_size, n_stack, frame_bytes)``; maybe a view of them
        """
        frames = []
        for key, axis in self.axes.items():
            images = parts[key]
            if axis > 0:  # (batch_size, height, width, n_stack, channels) -> (batch_size, n_stack, height, width, channels)
                images = np.moveaxis(images.reshape(*images.shape[:3], self.n_stack, -1), 3, 1)
            frames.append(np.ascontiguousarray(images).reshape(len(images), self.n_stack, -1).view(np.uint8))
        return frames[0] if len(frames) == 1 else np.concatenate(frames, axis=2)

    def to_images(self, frames: np.ndarray) -> Observations:
        """
        :param frames: shape ``(batch_size, n_stack, frame_bytes)``
        :return: the images that they are, by key if the space is a ``Dict``
        """
        images = {}
        for key, axis in self.axes.items():
            shape, part = self.shapes[key], np.ascontiguousarray(frames[:, :, self.bytes_of[key]]).view(self.dtypes[key])
            if axis > 0:
                part = np.moveaxis(part.reshape(len(part), self.n_stack, *shape[:2], -1), 1, 3)
            images[key] = np.ascontiguousarray(part).reshape(len(part), *shape)
        return images if self.is_dict else images[""]

"""Which parts of an observation are images, and how these lie in memory."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from gymnasium import spaces

from sb3_seer.common.augmentations import CenterCrop
from sb3_seer.common.type_aliases import Observations


def is_image(space: spaces.Space) -> bool:
    """
    :param space: an observation space, or that of one key of it
    :return: whether it is encoded: a ``Box`` of 3 dimensions
    """
    return isinstance(space, spaces.Box) and len(space.shape) == 3


def image_spaces(space: spaces.Space) -> dict[str, spaces.Box]:
    """
    :param space: an observation space
    :return: its images by key, under the key ``""`` if it is no ``Dict``
    """
    parts = space.spaces if isinstance(space, spaces.Dict) else {"": space}
    return {key: part for key, part in parts.items() if is_image(part)}  # type: ignore[misc]


def map_parts(function: Callable[..., Any], *observations: Any) -> Any:
    """
    :param function: of arrays or tensors
    :param observations: arrays or tensors, or dicts with the same keys
    :return: what the function makes of them; of dicts, what it makes of each key
    """
    if isinstance(observations[0], dict):
        return {key: function(*(part[key] for part in observations)) for key in observations[0]}
    return function(*observations)


def separate(observations: Any, space: spaces.Space) -> tuple[Any, dict[str, Any]]:
    """
    :param observations: images, or a dict with some
    :param space: of the observations
    :return: the images, by key if there are keys; and all else, by key
    """
    if not isinstance(observations, dict):
        return observations, {}
    keys = image_spaces(space)
    images = {key: part for key, part in observations.items() if key in keys}
    return images, {key: part for key, part in observations.items() if key not in keys}


def center_crop(observations: Any, space: spaces.Space) -> Any:
    """
    :param observations: batch of images, or a dict with some (any keys of the space)
    :param space: where the images are as large as they are to become
    :return: the same, with the middle of images that are larger
    """
    if not isinstance(observations, dict):
        return CenterCrop(space.shape[-2:])(observations)  # type: ignore[index]
    images = image_spaces(space)
    return {key: CenterCrop(images[key].shape[-2:])(part) if key in images else part for key, part in observations.items()}


def sort_bytes(memory: np.ndarray, n_places: int) -> np.ndarray:
    """
    :param memory: what ``ImageLayout.in_memory()`` returned, or one observation of it
    :param n_places: how many places there are to be: 1 for bytes frame by frame, or that of the pixels
    :return: the same observations, sorted like that
    """
    if memory.shape[-2] == n_places:
        return memory
    channels = memory.swapaxes(-1, -2).reshape(*memory.shape[:-2], -1, n_places)
    return np.ascontiguousarray(channels.swapaxes(-1, -2))


@lru_cache(maxsize=2)
def moving(n_places: int, n_bytes: int, n_new: int) -> np.ndarray:
    """:return: which bytes of a stack in memory are those of an older frame, shape ``(n_places * n_bytes - n_new,)``"""
    return np.tile(np.arange(n_bytes) < n_bytes - n_new, n_places)[:-n_new]


def moved_on(stack: np.ndarray, next_stack: bytes, n_new: int) -> bool:
    """
    :param stack: as it lies in memory, shape ``(n_places, n_bytes)``
    :param next_stack: another, sorted like that
    :param n_new: bytes of a frame in a place
    :return: whether the next stack is the first one without its oldest frame, and with a newer one
    """
    # A frame that moves on in the stack moves by as many bytes in memory
    older = stack.ravel()[n_new:]
    if len(stack) == 1:
        return next_stack.startswith(older.data)
    differs = older != np.frombuffer(next_stack, np.uint8, len(older))
    differs &= moving(*stack.shape, n_new)
    return not differs[differs.argmax()]  # faster than any()


class ImageLayout:
    """
    Takes observations apart: into the bytes of their images, frame by frame, and into all else.

    :param observation_space: a ``Box`` of channels-first images, or a ``Dict`` with at least one
    :param n_stack: frames stacked along the channels of each image, the newest last
    """

    def __init__(self, observation_space: spaces.Space, n_stack: int):
        self.is_dict = isinstance(observation_space, spaces.Dict)
        self.n_stack = n_stack
        self.images = image_spaces(observation_space)
        self.others = {key: space for key, space in getattr(observation_space, "spaces", {}).items() if key not in self.images}
        # Of each image: its dtype, the shape of a batch frame by frame, bytes of a frame
        self.dtypes = [np.dtype(box.dtype) for box in self.images.values()]
        self.shapes = [(-1, n_stack, int(np.prod(box.shape)) // n_stack) for box in self.images.values()]
        self.sizes = [int(np.prod(box.shape)) * box.dtype.itemsize // n_stack for box in self.images.values()]
        self.frame_bytes = sum(self.sizes)
        # The key of an image that VecTransposeImage may hand on a view of, if there are no others
        key, box = next(iter(self.images.items()))
        self.single = key if len(self.images) == 1 and box.dtype == np.uint8 else None
        self.place_shape = (-1, 1, self.n_stack * self.frame_bytes)
        self.pixels_shape = (-1, box.shape[1] * box.shape[2], box.shape[0])

    def to_bytes(self, observations: Observations) -> np.ndarray:
        """
        :param observations: one observation, or a batch
        :return: the images' bytes, shape ``(n, n_stack, frame_bytes)``; a view if they are no ``Dict``
        """
        if not isinstance(observations, dict):
            return np.ascontiguousarray(observations, self.dtypes[0]).reshape(self.shapes[0]).view(np.uint8)
        parts = [
            np.ascontiguousarray(observations[key], dtype).reshape(shape).view(np.uint8)
            for key, dtype, shape in zip(self.images, self.dtypes, self.shapes, strict=True)
        ]
        return np.concatenate(parts, axis=2)

    def in_memory(self, observations: Observations) -> np.ndarray:
        """
        :param observations: one observation, or a batch
        :return: the images' bytes as they lie in memory, shape ``(n, n_places, n_bytes)``. Each pixel is a place where the
            channels come last (``VecTransposeImage`` hands on views); otherwise there is one, with all frame by frame
        """
        if self.single is not None:
            images = observations[self.single] if isinstance(observations, dict) else observations
            if images.dtype == np.uint8:
                if images.flags.c_contiguous:
                    return images.reshape(self.place_shape)
                return np.ascontiguousarray(images.swapaxes(-3, -1).swapaxes(-3, -2).reshape(self.pixels_shape))
        return self.to_bytes(observations).reshape(self.place_shape)

    def from_memory(self, memory: np.ndarray) -> Observations:
        """
        :param memory: what ``in_memory()`` returned, or a copy of it
        :return: the images that it is, views of it if they are no ``Dict`` of several; of a ``Dict`` space, by key
        """
        if memory.shape[1] == 1:
            return self.to_images(memory.reshape(len(memory), self.n_stack, -1))
        key, box = next(iter(self.images.items()))
        channels, height, width = box.shape
        images = memory.reshape(-1, height, width, channels).transpose(0, 3, 1, 2)
        return {key: images} if self.is_dict else images

    def to_images(self, frames: np.ndarray) -> Observations:
        """
        :param frames: shape ``(n, n_stack, frame_bytes)``
        :return: the images that they are; of a ``Dict`` space, by key
        """
        if not self.is_dict:
            (box,) = self.images.values()
            return frames.view(box.dtype).reshape(len(frames), *box.shape)
        parts = np.split(frames, np.cumsum(self.sizes)[:-1], axis=2)
        return {
            key: np.ascontiguousarray(part).view(box.dtype).reshape(len(frames), *box.shape)
            for (key, box), part in zip(self.images.items(), parts, strict=True)
        }

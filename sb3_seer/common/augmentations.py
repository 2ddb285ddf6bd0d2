"""Image augmentations: modules that map a batch of images to a batch of images, of the same dtype."""

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from torch import nn
from torch.nn import functional as F

from sb3_seer.common.utils import check_positive_int


def _random_windows(images: th.Tensor, height: int, width: int) -> th.Tensor:
    """
    Cut a window out of each image, the same for all its channels, at a random place; all places are equally likely.

    :param images: shape ``(batch_size, channels, H, W)``
    :return: shape ``(batch_size, channels, height, width)``
    """
    batch_size, _, full_height, full_width = images.shape
    tops = th.randint(full_height - height + 1, (batch_size,), device=images.device)
    lefts = th.randint(full_width - width + 1, (batch_size,), device=images.device)
    if images.device.type == "cpu" and batch_size > 0:
        return _cut_one_by_one(images, tops, lefts, height, width)
    return _cut_at_once(images, tops, lefts, height, width)


def _cut_one_by_one(images: th.Tensor, tops: th.Tensor, lefts: th.Tensor, height: int, width: int) -> th.Tensor:
    """3 to 5 times as fast on a CPU."""
    places = zip(images.split(1), tops.tolist(), lefts.tolist(), strict=True)
    return th.cat([image[..., top : top + height, left : left + width] for image, top, left in places])


def _cut_at_once(images: th.Tensor, tops: th.Tensor, lefts: th.Tensor, height: int, width: int) -> th.Tensor:
    """Does not wait for the device."""
    # A view of all the windows of an image: (batch, channels, n_tops, n_lefts, height, width)
    windows = images.unfold(2, height, 1).unfold(3, width, 1)
    return windows[th.arange(len(images), device=images.device), :, tops, lefts]


class RandomCrop(nn.Module):
    """
    A square cut out at a random place (RAD, CURL; SEER, appendix, Table 4: 84 out of 100 pixels).

    All ``H - size + 1`` offsets are drawn. (The released code of the paper never draws the last one.)

    :param size: height and width of the output, in pixels
    :raises ValueError: if ``size`` is not a positive integer
    """

    def __init__(self, size: int = 84) -> None:
        super().__init__()
        check_positive_int("size", size)
        self.size = size

    def forward(self, images: th.Tensor) -> th.Tensor:
        """
        :param images: shape ``(batch_size, channels, H, W)``, any dtype
        :return: shape ``(batch_size, channels, size, size)``, same dtype
        :raises ValueError: if the images are smaller than the crop
        """
        if self.size > min(images.shape[-2:]):
            raise ValueError(
                f"`size` of a random crop must be <= {min(images.shape[-2:])} for images of "
                f"{images.shape[-2]}x{images.shape[-1]}, got {self.size}. Set augmentation_kwargs=dict(size=...)"
            )
        return _random_windows(images, self.size, self.size)


class RandomShift(nn.Module):
    """
    Each image moved by up to ``pad`` pixels in both directions, its border repeated (DrQ).
    The size of the images stays the same.

    :param pad: largest shift, in pixels
    :raises ValueError: if ``pad`` is not a positive integer
    """

    def __init__(self, pad: int = 4) -> None:
        super().__init__()
        check_positive_int("pad", pad)
        self.pad = pad

    def forward(self, images: th.Tensor) -> th.Tensor:
        """
        :param images: shape ``(batch_size, channels, H, W)``, any dtype
        :return: same shape, same dtype
        """
        height, width = images.shape[-2:]
        return _random_windows(F.pad(images, [self.pad] * 4, mode="replicate"), height, width)


AUGMENTATIONS: dict[str, type[nn.Module]] = {"random_crop": RandomCrop, "random_shift": RandomShift}


def make_augmentation(augmentation: str | nn.Module | None, kwargs: dict[str, Any] | None) -> nn.Module | None:
    """
    :param augmentation: a name of ``AUGMENTATIONS``, a module, or None
    :param kwargs: arguments of the named augmentation
    :return: the module, None for no augmentation
    :raises ValueError: for an unknown name, or arguments that it does not take
    """
    if augmentation is None or isinstance(augmentation, nn.Module):
        if kwargs:
            raise ValueError(f"`augmentation_kwargs` must be None without the name of an augmentation, got {kwargs}")
        return augmentation
    if not isinstance(augmentation, str) or augmentation not in AUGMENTATIONS:
        raise ValueError(f"`augmentation` must be one of {list(AUGMENTATIONS)}, a torch module or None, got {augmentation!r}")
    try:
        return AUGMENTATIONS[augmentation](**(kwargs or {}))
    except TypeError as error:
        raise ValueError(f"`augmentation_kwargs` must be arguments of {augmentation!r}, got {kwargs} ({error})") from error


def augmented_sizes(
    augmentation: nn.Module | None, images: dict[str, spaces.Box], device: th.device
) -> dict[str, tuple[int, int]]:
    """
    Try out an augmentation.

    :param augmentation: module from images to images, or None
    :param images: spaces of the images, by key
    :param device: of the module
    :return: (height, width) of the augmented images, by key, where they are smaller than the images
    :raises ValueError: if it fails, or if they are larger, or have another dtype or number of channels
    """
    sizes: dict[str, tuple[int, int]] = {}
    if augmentation is None:
        return sizes
    for key, box in images.items():
        channels, height, width = box.shape
        batch = th.as_tensor(np.zeros((1, *box.shape), dtype=box.dtype), device=device)
        # Trying it out must not move the random numbers of the training
        with th.random.fork_rng(devices=[device] if device.type == "cuda" else []), th.no_grad():
            try:
                output = augmentation(batch)
            except (RuntimeError, TypeError) as error:
                raise ValueError(
                    f"`augmentation` must map images of shape {tuple(batch.shape)} and dtype {batch.dtype}, got {error!r}"
                ) from error
        if output.dtype != batch.dtype:
            raise ValueError(f"`augmentation` must return images of dtype {batch.dtype}, got {output.dtype}")
        if output.ndim != 4 or output.shape[:2] != (1, channels) or any(np.greater(output.shape[2:], (height, width))):
            raise ValueError(
                f"`augmentation` must return images of shape (batch_size, {channels}, up to {height}, up to {width}), "
                f"got {tuple(output.shape)}"
            )
        if output.shape[2:] != (height, width):
            sizes[key] = output.shape[2], output.shape[3]
    return sizes

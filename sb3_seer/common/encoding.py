"""From images to the latents that are stored."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_seer.common.augmentations import augmented_sizes
from sb3_seer.common.memory import LATENT_DTYPES
from sb3_seer.common.observations import map_parts
from sb3_seer.common.policies import SEERPolicy
from sb3_seer.common.type_aliases import Observations

# The range of each dimension of uint8 latents is widened by this fraction of it at both ends
RANGE_MARGIN = 0.02
# Network inputs in one call of the encoder while the buffer is converted: bounds the peak of memory
MAX_ENCODER_INPUTS = 32


@dataclass
class LatentCodec:
    """
    Turns float32 latents into stored numbers, and back.

    :param dtype: one of ``LATENT_DTYPES``
    :param scale: uint8 only: the step between two neighbouring stored numbers, shape ``(N, L)``
    :param offset: uint8 only: the value of a stored zero, shape ``(N, L)``
    :param encoder_fingerprint: of the encoder whose latents the range was fitted on, None if it was given
    """

    dtype: str
    scale: np.ndarray | None = None
    offset: np.ndarray | None = None
    encoder_fingerprint: str | None = None

    @classmethod
    def fit(cls, latents: np.ndarray) -> "LatentCodec":
        """
        :param latents: latents that the uint8 range must cover, shape ``(batch_size, N, L)``
        :return: a uint8 codec
        """
        low, high = latents.min(axis=0), latents.max(axis=0)  # [N, L]
        # A dimension that never moved in these latents (a dead unit) still gets some room
        span = np.maximum(high - low, 0.01 * (high - low).max(axis=1, keepdims=True))
        span[span == 0.0] = 1.0
        # Latents after a ReLU are never negative, and their zeros stay exact
        margin = RANGE_MARGIN * span
        offset = np.where(low >= 0.0, np.maximum(low - margin, 0.0), low - margin)
        scale = (low + span + margin - offset) / 255.0
        return cls("uint8", scale.astype(np.float32), offset.astype(np.float32))

    def encode(self, latents: np.ndarray) -> tuple[np.ndarray, int]:
        """
        :param latents: float32, shape ``(..., N, L)``
        :return: stored numbers, same shape, and how many of them were clipped
        """
        if self.dtype == "float32":
            return latents, 0
        if self.dtype == "float16":
            low, high = float(np.finfo(np.float16).min), float(np.finfo(np.float16).max)
            codes = latents
        else:
            low, high = 0.0, 255.0
            codes = np.rint((latents - self.offset) / self.scale)
        n_clipped = np.count_nonzero((codes < low) | (codes > high))
        return np.clip(codes, low, high).astype(self.dtype), int(n_clipped)

    def decode(self, stored: th.Tensor) -> th.Tensor:
        """
        :param stored: stored numbers, shape ``(..., N, L)``
        :return: float32 latents, same shape
        """
        latents = stored.float()
        if self.scale is None or self.offset is None:
            return latents
        scale, offset = (th.as_tensor(array, device=stored.device) for array in (self.scale, self.offset))
        return th.addcmul(offset, latents, scale)


def batch_size(observations: Observations) -> int:
    """:return: how many observations these are, which may be by key"""
    return len(next(iter(observations.values())) if isinstance(observations, dict) else observations)


class ObservationEncoder:
    """
    From images to augmented images, to K latents of each image, to stored numbers.

    The policy, which computes the latents, is set later (a buffer is made before it) and is not pickled.

    :param images: spaces of the images, by key
    :param device: PyTorch device of the augmentation
    :param n_augmentations: latents of an image, each from another augmentation (K)
    :param augmentation: maps images of shape ``(batch_size, C, H, W)`` to ``(batch_size, C, h, w)``, same dtype
    :param latent_dtype: of the stored numbers
    :raises ValueError: for an invalid parameter
    """

    def __init__(
        self,
        images: dict[str, spaces.Box],
        device: th.device,
        n_augmentations: int = 1,
        augmentation: nn.Module | None = None,
        latent_dtype: str = "float32",
    ) -> None:
        if n_augmentations > 1 and augmentation is None:
            raise ValueError(f"`n_augmentations` must be 1 without an augmentation, got {n_augmentations}")
        if latent_dtype not in LATENT_DTYPES:
            raise ValueError(f"`latent_dtype` must be one of {', '.join(map(repr, LATENT_DTYPES))}, got {latent_dtype!r}")
        # (height, width) of augmented images, by key, where they differ from the images
        self.image_size = augmented_sizes(augmentation, images, device)
        self.n_augmentations, self.augmentation = n_augmentations, augmentation
        # None until the range of uint8 is known
        self.codec = None if latent_dtype == "uint8" else LatentCodec(latent_dtype)
        self.n_clipped = 0  # numbers clipped so far
        self._policy: SEERPolicy | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_policy": None}

    @property
    def policy(self) -> SEERPolicy:
        """
        what turns images into latents

        :raises RuntimeError: if it was not set, or not since the buffer was loaded
        """
        if self._policy is None:
            raise RuntimeError("The buffer has no encoder (it is never pickled): call set_encoder() first")
        return self._policy

    @policy.setter
    def policy(self, policy: SEERPolicy) -> None:
        self._policy = policy

    def augment(self, images: PyTorchObs, n_views: int = 1) -> PyTorchObs:
        """
        :param images: batch of images; of ``Dict`` observations, by key
        :param n_views: augmented images of each
        :return: augmented images; view v begins at ``v * batch_size``
        """
        if self.augmentation is None:
            return images
        if n_views > 1:
            images = map_parts(lambda part: th.cat([part] * n_views), images)
        with th.no_grad():
            return map_parts(self.augmentation, images)

    def encode(self, observations: Observations, to_act_on: Observations | None = None) -> np.ndarray:
        """
        One call of the encoder.

        :param observations: batch of images; of ``Dict`` observations, by key
        :param to_act_on: the first of them, if the policy acts on these next: it caches their latents
        :return: what to store, shape ``(batch_size, K, N, L)``
        """
        assert self.codec is not None
        images = self._to_tensors(observations)
        inputs = self._inputs(images, self.n_augmentations)
        n_stored = batch_size(observations) * self.n_augmentations
        if to_act_on is not None and self.augmentation is not None:  # acting sees the middle of an image
            inputs = map_parts(lambda *parts: th.cat(parts), inputs, self.policy.center_crop(self._to_tensors(to_act_on)))
        latents = self.policy.encode(inputs)
        if to_act_on is not None:
            acting = latents if self.augmentation is None else latents[n_stored:]
            self.policy.cache_latents(to_act_on, acting[: batch_size(to_act_on)])
        stored, n_clipped = self.codec.encode(latents[:n_stored].cpu().numpy())
        self.n_clipped += n_clipped
        return stored.reshape(-1, self.n_augmentations, *stored.shape[1:])

    def fit_codec(self, batches: Iterable[Observations]) -> None:
        """
        Find the range of uint8 latents.

        :param batches: batches of images; of ``Dict`` observations, by key
        """
        latents = [self.policy.encode(self._inputs(self._to_tensors(images), 1)).cpu().numpy() for images in batches]
        self.codec = LatentCodec.fit(np.concatenate(latents))
        self.codec.encoder_fingerprint = self.policy.encoder_fingerprint()

    def _inputs(self, images: PyTorchObs, n_copies: int) -> PyTorchObs:
        """:return: augmented images for the encoder, the copies of an image one after the other"""
        if self.augmentation is None:
            return self.policy.center_crop(images)
        # A copy even if it is one: an augmentation may work in place
        return self.augment(map_parts(lambda part: part.repeat_interleave(n_copies, dim=0), images))

    def _to_tensors(self, observations: Observations) -> PyTorchObs:
        return map_parts(lambda part: th.as_tensor(part, device=self.policy.device), observations)

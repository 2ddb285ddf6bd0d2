"""From the bytes of images to what the encoder takes, and to the latents that are stored."""

import numpy as np
import torch as th
from stable_baselines3.common.buffers import BaseBuffer
from torch import nn

from sb3_seer.common.augmentations import CenterCrop
from sb3_seer.common.codec import LatentCodec
from sb3_seer.common.type_aliases import LatentEncoder

# Network inputs in one call of the encoder while the buffer is converted: bounds the peak of memory
MAX_ENCODER_INPUTS = 64


class ImageEncoding(BaseBuffer):
    """
    Mixin for a buffer of images: knows the encoder, the augmentation, and how latents are stored.
    Bytes of images have the shape ``(batch_size, n_stack, frame_bytes)``.
    """

    n_stack: int
    n_augmentations: int
    augmentation: nn.Module | None
    codec: LatentCodec | None
    n_clipped = 0  # numbers outside the range of the latents' dtype
    _image_dtype: np.dtype
    _frame_bytes: int
    _encoder: LatentEncoder | None = None
    _latent_shape: tuple[int, int] | None = None

    def set_encoder(self, encoder: LatentEncoder) -> None:
        """
        :param encoder: what turns images into latents; needed before ``to_latents()`` and, after loading,
            before the next ``add()`` of the latents stage
        """
        self._encoder = encoder
        self._latent_shape = encoder.latent_shape

    def _to_bytes(self, images: np.ndarray, n_envs: int | None = None) -> np.ndarray:
        """:return: bytes of the images of every env, shape [n_envs, n_stack, frame_bytes]; a copy only where needed"""
        array = np.ascontiguousarray(images, dtype=self._image_dtype)
        array = array.reshape(n_envs or self.n_envs, *self.obs_shape)
        return array.view(np.uint8).reshape(len(array), self.n_stack, self._frame_bytes)

    def _to_images(self, frames: np.ndarray) -> th.Tensor:
        """:return: the images that these bytes, shape [batch_size, n_stack, frame_bytes], are, on the device"""
        images = frames.view(self._image_dtype).reshape(len(frames), *self.obs_shape)
        return self.to_torch(images, copy=False)

    def _network_inputs(self, frames: np.ndarray, n_copies: int | None = None) -> th.Tensor:
        """:return: n_copies (K) augmented images of each stack of frames, one after the other"""
        images = self._to_images(frames)
        if self.augmentation is None:
            return self._center_crop(images)
        with th.no_grad():
            return self.augmentation(images.repeat_interleave(n_copies or self.n_augmentations, dim=0))

    def _center_crop(self, images: th.Tensor) -> th.Tensor:
        """:return: what the encoder sees of images that are not augmented"""
        return CenterCrop(self._encoder_or_raise().image_shape[1:])(images)

    def _encode(self, frames: np.ndarray) -> np.ndarray:
        """:return: stored latents of stacks of frames, shape [batch_size, K, N, L], a few encoder inputs at a time"""
        latents = [np.zeros((0, *self._known_latent_shape()), dtype=np.float32)]
        step = max(MAX_ENCODER_INPUTS // self.n_augmentations, 1)
        for i in range(0, len(frames), step):
            inputs = self._network_inputs(frames[i : i + step])
            latents.append(self._encoder_or_raise().encode(inputs).cpu().numpy())
        return self._to_stored(np.concatenate(latents).reshape(len(frames), self.n_augmentations, *latents[0].shape[1:]))

    def _to_stored(self, latents: np.ndarray) -> np.ndarray:
        assert self.codec is not None
        stored, n_clipped = self.codec.encode(latents)
        self.n_clipped += n_clipped
        return stored

    def _known_latent_shape(self) -> tuple[int, int]:
        if self._latent_shape is None:
            raise RuntimeError("The shape of a latent is not known yet: call set_encoder() first")
        return self._latent_shape

    def _encoder_or_raise(self) -> LatentEncoder:
        if self._encoder is None:
            raise RuntimeError("The buffer has no encoder (it is never pickled): call set_encoder() first")
        return self._encoder

"""From the bytes of images to what the encoder takes, and to the latents that are stored."""

import numpy as np
import torch as th
from stable_baselines3.common.buffers import BaseBuffer
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_seer.common.augmentations import AUGMENTATIONS
from sb3_seer.common.codec import LatentCodec
from sb3_seer.common.layout import ImageLayout, map_parts, sort_bytes
from sb3_seer.common.storage import LatentStore
from sb3_seer.common.type_aliases import LatentEncoder, Observations

# Network inputs in one call of the encoder while the buffer is converted: bounds the peak of memory
MAX_ENCODER_INPUTS = 32


class ImageEncoding(BaseBuffer):
    """
    Mixin for a buffer of images: knows the encoder, the augmentation, and how latents are stored.
    """

    layout: ImageLayout
    n_augmentations: int
    augmentation: nn.Module | None
    codec: LatentCodec | None
    n_clipped = 0  # numbers outside the range of the latents' dtype
    # The new images to act on and their float32 latents, from the encoder call of the last add()
    acting: tuple[Observations, th.Tensor] | None = None
    _encoder: LatentEncoder | None = None
    _latent_shape: tuple[int, int] | None = None

    def set_encoder(self, encoder: LatentEncoder) -> None:
        """
        :param encoder: what turns images into latents; needed before ``to_latents()`` and, after loading,
            before the next ``add()`` of the latents stage
        """
        self._encoder = encoder
        self._latent_shape = encoder.latent_shape

    # ---- one step ----

    def _encode_step(
        self,
        store: LatentStore,
        obs: np.ndarray,
        next_obs: np.ndarray,
        continues: list[bool],
        resets: dict[int, np.ndarray],
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """
        Encode all that is new in a step, in one call, and keep the latents to act on.

        :param store: where the step is about to be added
        :param obs: the observations as they lie in memory, shape ``(n_envs, n_places, n_bytes)``
        :param next_obs: the next observations, the last ones of an episode where it ended, sorted like that or not
        :param continues: for each env, whether ``obs`` was encoded in the step before
        :param resets: of envs where an episode ended, the next one's first observation, if known
        :return: stored latents of ``obs`` and ``next_obs``, shape ``(n_envs, K, N, L)``; the observations to act on,
            sorted like ``obs``, and their stored latents
        """
        next_obs = sort_bytes(next_obs, obs.shape[1])
        pending, starts = next_obs.copy(), list(resets)
        for env, first in resets.items():
            pending[env] = sort_bytes(first, obs.shape[1])
        unexpected = np.flatnonzero(np.logical_not(continues))
        images = np.concatenate((next_obs, pending[starts], obs[unexpected]))
        to_act_on = self.layout.from_memory(pending)
        inputs, n_inputs = self._network_inputs(self.layout.from_memory(images)), len(images) * self.n_augmentations
        if self.augmentation is not None:
            inputs = map_parts(lambda *parts: th.cat(parts), inputs, self._center_crop(self._to_tensors(to_act_on)))
        encoded = self._encoder_or_raise().encode(inputs)
        fresh = self._to_stored(encoded[:n_inputs].cpu().numpy().reshape(len(images), *store.shape))

        next_latents = fresh[: self.n_envs]
        pending_latents = next_latents.copy()
        pending_latents[starts] = fresh[self.n_envs : self.n_envs + len(starts)]
        latents = store.pending_latents.copy()
        latents[unexpected] = fresh[self.n_envs + len(starts) :]
        if self.augmentation is None:
            order = np.arange(self.n_envs)
            order[starts] = self.n_envs + np.arange(len(starts))
            acting = encoded[th.as_tensor(order, device=encoded.device)]
        else:
            acting = encoded[n_inputs:]
        self.acting = to_act_on, acting
        return latents, next_latents, pending, pending_latents

    # ---- from bytes to latents ----

    def _to_tensors(self, images: Observations) -> PyTorchObs:
        """:return: the images on the device"""
        return map_parts(lambda part: self.to_torch(part, copy=False), images)

    def _network_inputs(self, observations: Observations, n_copies: int | None = None) -> PyTorchObs:
        """:return: n_copies (K) augmented images of each observation, one after the other"""
        images = self._to_tensors(observations)
        if self.augmentation is None:
            return self._center_crop(images)
        k = n_copies or self.n_augmentations
        # As repeat_interleave() does, in a fifth of the time, and the channels stay where they lie in memory
        return self._augment(map_parts(lambda part: th.cat([image for image in part.split(1) for _ in range(k)]), images))

    def _augment(self, images: PyTorchObs) -> PyTorchObs:
        """:return: each image once, augmented if anything is"""
        if self.augmentation is None:
            return images
        if type(self.augmentation) not in AUGMENTATIONS.values():  # a user's may take views of the usual layout
            images = map_parts(th.Tensor.contiguous, images)
        with th.no_grad():
            return map_parts(self.augmentation, images)

    def _center_crop(self, images: PyTorchObs) -> PyTorchObs:
        return self._encoder_or_raise().center_crop(images)

    def _encode(self, frames: np.ndarray) -> np.ndarray:
        """
        :param frames: bytes of images, shape ``(batch_size, n_stack, frame_bytes)``
        :return: their stored latents, shape ``(batch_size, K, N, L)``, computed a few encoder inputs at a time
        """
        latents = [np.zeros((0, *self._known_latent_shape()), dtype=np.float32)]
        step = max(MAX_ENCODER_INPUTS // self.n_augmentations, 1)
        for i in range(0, len(frames), step):
            inputs = self._network_inputs(self.layout.to_images(frames[i : i + step]))
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

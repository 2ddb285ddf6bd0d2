"""From the bytes of images to what the encoder takes, and to the latents that are stored."""

import numpy as np
import torch as th
from stable_baselines3.common.buffers import BaseBuffer
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from tqdm import tqdm

from sb3_seer.common.codec import LatentCodec
from sb3_seer.common.layout import ImageLayout, map_parts
from sb3_seer.common.storage import ImageStore, LatentStore
from sb3_seer.common.type_aliases import LatentEncoder, Observations

# Network inputs in one call of the encoder while the buffer is converted: bounds the peak of memory
MAX_ENCODER_INPUTS = 32
# Observations that the range of uint8 latents is fitted on
MAX_FIT_OBSERVATIONS = 1024


class ImageEncoding(BaseBuffer):
    """
    Mixin for a buffer of images: knows the encoder, the augmentation, and how latents are stored.
    Bytes of images have the shape ``(batch_size, n_stack, frame_bytes)``.
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
        :param obs: bytes of the observations
        :param next_obs: bytes of the next observations, the last ones of an episode where it ended
        :param continues: for each env, whether ``obs`` was encoded in the step before
        :param resets: of envs where an episode ended, bytes of the next one's first observation, if known
        :return: stored latents of ``obs`` and ``next_obs``, shape ``(n_envs, K, N, L)``; the bytes of the observations
            to act on, and their stored latents
        """
        pending, starts = next_obs.copy(), list(resets)
        for env, first in resets.items():
            pending[env] = first
        unexpected = np.flatnonzero(np.logical_not(continues))
        images = np.concatenate((next_obs, pending[starts], obs[unexpected]))
        inputs, n_inputs = self._network_inputs(images), len(images) * self.n_augmentations
        if self.augmentation is not None:
            inputs = map_parts(lambda *parts: th.cat(parts), inputs, self._center_crop(self._to_images(pending)))
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
        self._set_acting(pending, acting)
        return latents, next_latents, pending, pending_latents

    def _set_acting(self, pending: np.ndarray, latents: th.Tensor) -> None:
        self.acting = map_parts(np.copy, self.layout.to_images(pending)), latents

    # ---- the switch of stage ----

    def _convert(self, images: ImageStore, latents: LatentStore, n_rows: int, pos: int) -> None:
        """
        Write the latents of every row over its images, then open the ring at the write head.

        :param images: what is stored
        :param latents: an empty store in the same arena
        :param n_rows: rows that hold transitions
        :param pos: where the next row will be written; the rows from there on are older and move to the end of the ring
        """
        gap = latents.rows - n_rows
        chunk = max(MAX_ENCODER_INPUTS // (self.n_augmentations * self.n_envs), 1)
        with tqdm(total=n_rows * self.n_envs, desc="images to latents", delay=2) as bar:
            for first, stacks, keys, successors in images.drain(n_rows, chunk):
                encoded = self._encode(stacks.reshape(-1, *stacks.shape[2:]))
                # This chunk was copied, and a record is no larger than a frame: no image still to come is overwritten
                latents.records[first : first + len(stacks)] = encoded.reshape(len(stacks), self.n_envs, *latents.shape)
                for (row, env), successor in zip(keys, self._encode(successors), strict=True):
                    latents.successor[row + gap if row >= pos else row, env] = successor.copy()
                bar.update(len(encoded))
        latents.move_to_end(pos, n_rows)
        latents.open, latents.pending_bytes = images.open, images.pending_bytes
        pending = images.pending_stacks
        latents.pending_latents = self._encode(pending)
        self._set_acting(pending, self._encoder_or_raise().encode(self._center_crop(self._to_images(pending))))

    def _fit_codec(self, images: ImageStore, n_rows: int) -> LatentCodec:
        total = n_rows * self.n_envs
        picks = np.linspace(0, total - 1, min(total, MAX_FIT_OBSERVATIONS)).astype(int)
        latents = []
        for some in np.array_split(picks, -(-len(picks) // MAX_ENCODER_INPUTS)):
            inputs = self._network_inputs(images.observations(some // self.n_envs, some % self.n_envs), n_copies=1)
            latents.append(self._encoder_or_raise().encode(inputs).cpu().numpy())
        return LatentCodec.fit(np.concatenate(latents))

    # ---- from bytes to latents ----

    def _to_images(self, frames: np.ndarray) -> PyTorchObs:
        """:return: the images that these bytes are, on the device"""
        return map_parts(lambda part: self.to_torch(part, copy=False), self.layout.to_images(frames))

    def _network_inputs(self, frames: np.ndarray, n_copies: int | None = None) -> PyTorchObs:
        """:return: n_copies (K) augmented images of each stack of frames, one after the other"""
        images = self._to_images(frames)
        if self.augmentation is None:
            return self._center_crop(images)
        k = n_copies or self.n_augmentations
        # As repeat_interleave() does, in a fifth of the time
        return self._augment(map_parts(lambda part: part.unsqueeze(1).repeat(1, k, 1, 1, 1).flatten(end_dim=1), images))

    def _augment(self, images: PyTorchObs) -> PyTorchObs:
        """:return: each image once, augmented if anything is"""
        if self.augmentation is None:
            return images
        with th.no_grad():
            return map_parts(self.augmentation, images)

    def _center_crop(self, images: PyTorchObs) -> PyTorchObs:
        return self._encoder_or_raise().center_crop(images)

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

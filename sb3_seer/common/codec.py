"""How latents are stored as numbers of fewer bytes."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch as th


@dataclass
class LatentCodec:
    """
    Turns float32 latents into the numbers that are stored, and back.

    :param dtype: one of ``LATENT_DTYPES``
    :param scale: uint8 only: what one step of the stored number is worth, shape ``(N, L)``
    :param offset: uint8 only: the value of a stored zero, shape ``(N, L)``
    """

    dtype: str
    scale: np.ndarray | None = None
    offset: np.ndarray | None = None
    # The two as tensors where they were last needed
    _tensors: tuple[th.Tensor, th.Tensor] | None = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def fit(cls, latents: np.ndarray, margin: float = 0.02) -> "LatentCodec":
        """
        :param latents: latents that the uint8 range must cover, shape ``(batch_size, N, L)``
        :param margin: part of each dimension's range added at either end
        :return: a uint8 codec
        """
        low, high = latents.min(axis=0), latents.max(axis=0)  # [N, L]
        # A dimension that never moved in these latents (a dead unit) still gets some room
        span = np.maximum(high - low, 0.01 * (high - low).max())
        span[span == 0.0] = 1.0
        # Latents that follow a ReLU are never negative, and their zeros stay exact
        offset = np.where(low >= 0.0, np.maximum(low - margin * span, 0.0), low - margin * span)
        scale = (low + (1.0 + margin) * span - offset) / 255.0
        return cls("uint8", scale.astype(np.float32), offset.astype(np.float32))

    def encode(self, latents: np.ndarray) -> tuple[np.ndarray, int]:
        """
        :param latents: float32, shape ``(..., N, L)``
        :return: what is stored, same shape, and how many numbers had to be clipped
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
        :param stored: what ``encode`` returned, as a tensor, shape ``(..., N, L)``
        :return: float32 latents of the same shape
        """
        latents = stored.float()
        if self.scale is None or self.offset is None:
            return latents
        if self._tensors is None or self._tensors[0].device != stored.device:
            self._tensors = th.as_tensor(self.scale, device=stored.device), th.as_tensor(self.offset, device=stored.device)
        scale, offset = self._tensors
        return th.addcmul(offset, latents, scale)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tensors": None}

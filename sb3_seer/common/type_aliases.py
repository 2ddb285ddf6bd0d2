"""Types shared by the replay buffer (which stores latents) and the networks (which read them)."""

from dataclasses import dataclass
from typing import Protocol

import torch as th


@dataclass(frozen=True)
class Latents:
    """
    A batch of stored latents, tagged so that a network never has to guess from a shape
    whether it was given images or latents.

    :param values: float32 tensor of shape ``(batch_size, N, L)``: N networks with a latent
        of their own, L numbers in a latent
    """

    values: th.Tensor

    def __len__(self) -> int:
        return len(self.values)

    def detach(self) -> "Latents":
        """:return: the same latents, cut off from the graph that computed them"""
        return Latents(self.values.detach())


class LatentEncoder(Protocol):
    """
    What a :class:`~sb3_seer.common.replay.LatentReplayBuffer` needs to know of the policy.
    """

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(N, L): networks with a latent of their own, numbers in a latent"""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images that ``encode`` takes, after augmentation"""

    @property
    def device(self) -> th.device:
        """where the encoder lives"""

    def encode(self, images: th.Tensor) -> th.Tensor:
        """
        :param images: shape ``(batch_size, *image_shape)``, dtype of the observation space,
            on ``device``
        :return: float32 latents of shape ``(batch_size, N, L)``, without a graph
        """

    def encoder_fingerprint(self) -> str:
        """a short hash of everything that decides the value of a latent"""

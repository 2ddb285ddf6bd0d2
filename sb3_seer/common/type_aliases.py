"""Types shared by the replay buffer, which stores latents, and the networks, which read them."""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs, TensorDict

Observations = np.ndarray | dict[str, np.ndarray]


@dataclass(frozen=True)
class Latents:
    """
    A batch of latents, tagged so that a network need not guess from a shape whether it was given images or latents.

    :param values: float32 tensor of shape ``(batch_size, N, L)``: N networks with their own
        latent, L numbers in a latent
    :param vector_obs: of ``Dict`` observations, the keys without images
    """

    values: th.Tensor
    vector_obs: TensorDict = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.values)

    def first(self, n: int) -> "Latents":
        """:return: the first ``n`` latents of the batch"""
        return Latents(self.values[:n], {key: part[:n] for key, part in self.vector_obs.items()})

    def detach(self) -> "Latents":
        """:return: the same latents without the graph that computed them"""
        return Latents(self.values.detach(), self.vector_obs)


class LatentEncoder(Protocol):
    """
    The part of a policy that a :class:`~sb3_seer.common.replay.LatentReplayBuffer` calls.
    """

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(N, L): networks with their own latent, numbers in a latent"""

    def center_crop(self, images: PyTorchObs) -> PyTorchObs:
        """
        :param images: shape ``(batch_size, channels, height, width)``; of ``Dict`` observations, by key
        :return: the middle of images that are larger than the encoder takes
        """

    def cache_latents(self, observations: Observations, latents: th.Tensor) -> None:
        """
        :param observations: images that are acted on next, shape ``(n_envs, *obs_shape)``; of ``Dict`` observations, by key
        :param latents: of their middle, shape ``(n_envs, N, L)``
        """

    def encode(self, images: PyTorchObs) -> th.Tensor:
        """
        :param images: as large as ``center_crop`` makes them, dtype of the observation space
        :return: float32 latents of shape ``(batch_size, N, L)``, without a graph
        """

    def encoder_fingerprint(self) -> str:
        """:return: a short hash of everything that decides the value of a latent"""

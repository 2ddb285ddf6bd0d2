"""Features extractors that know where their encoder ends, and the encoders of the paper."""

from dataclasses import dataclass

import gymnasium as gym
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn


class SplitExtractor(BaseFeaturesExtractor):
    """
    A features extractor in three parts, so that an agent can freeze the first two and keep learning the third::

        image -> trunk -> projection -> latents -> head -> features
                 (the encoder: frozen)             (goes on learning)

    * ``trunk``: the convolutions; networks that each have a projection of their own share it,
    * ``projection``: what the encoder has on top of them (``nn.Identity()`` for nothing),
    * ``head``: maps stored latents to features (``nn.Identity()`` for nothing).

    To write one, assign the three modules in the constructor.

    :param observation_space: (channels-first) image space
    :param latent_dim: numbers in a latent
    :param features_dim: numbers in the features, that of the latent by default
    """

    trunk: nn.Module
    projection: nn.Module
    head: nn.Module

    def __init__(self, observation_space: gym.Space, latent_dim: int, features_dim: int | None = None) -> None:
        super().__init__(observation_space, latent_dim if features_dim is None else features_dim)
        self.latent_dim = latent_dim

    def encode(self, images: th.Tensor) -> th.Tensor:
        """
        :param images: preprocessed images, shape ``(batch_size, channels, height, width)``
        :return: latents, shape ``(batch_size, latent_dim)``
        """
        return self.projection(self.trunk(images))

    def forward(self, images: th.Tensor) -> th.Tensor:
        """
        :param images: preprocessed images, shape ``(batch_size, channels, height, width)``
        :return: features, shape ``(batch_size, features_dim)``
        """
        return self.head(self.encode(images))


@dataclass(frozen=True)
class WholeExtractor:
    """
    Any other features extractor, seen as a ``SplitExtractor``: all of it is the encoder.
    Not a module, so the names in a ``state_dict`` stay what they are in SB3.
    """

    trunk: BaseFeaturesExtractor
    projection: nn.Module
    head: nn.Module

    @property
    def latent_dim(self) -> int:
        return self.trunk.features_dim


def split(extractor: BaseFeaturesExtractor) -> SplitExtractor | WholeExtractor:
    """
    :param extractor: any features extractor
    :return: its trunk, projection and head
    """
    if isinstance(extractor, SplitExtractor):
        return extractor
    return WholeExtractor(extractor, nn.Identity(), nn.Identity())


def _n_flatten(cnn: nn.Module, observation_space: spaces.Box) -> int:
    with th.no_grad():
        return cnn(th.zeros(1, *observation_space.shape)).shape[1]


class ChannelsLast(nn.Module):
    """Lays images out as (batch, height, width, channels) in memory: on a CPU, convolutions run several times faster."""

    def forward(self, images: th.Tensor) -> th.Tensor:
        """:param images: shape ``(batch_size, channels, height, width)``, and so is the output's"""
        return images.contiguous(memory_format=th.channels_last)


class PixelEncoder(SplitExtractor):
    """
    The encoder of SAC-AE, CURL and SEER for control from pixels (SEER, section 5.1 and appendix, Table 4):
    four 3x3 convolutions with 32 filters (strides 2, 1, 1, 1), a linear layer to the latent, and layer
    normalisation as the head. The freeze takes the convolutions and the linear layer.

    As in the released code, there is no tanh after the normalisation, and the weights are initialised
    delta-orthogonally (convolutions) and orthogonally (linear). Unlike it, the normalisation keeps learning
    after the freeze: the paper freezes the convolutions and the linear layer only.

    :param observation_space: (channels-first) image space
    :param latent_dim: numbers in a latent (50 in the paper)
    :param n_filters: filters of each convolution
    """

    def __init__(self, observation_space: spaces.Box, latent_dim: int = 50, n_filters: int = 32) -> None:
        super().__init__(observation_space, latent_dim)
        n_channels = observation_space.shape[0]
        layers: list[nn.Module] = [nn.Conv2d(n_channels, n_filters, kernel_size=3, stride=2), nn.ReLU()]
        for _ in range(3):
            layers += [nn.Conv2d(n_filters, n_filters, kernel_size=3), nn.ReLU()]
        self.trunk = nn.Sequential(ChannelsLast(), *layers, nn.Flatten())
        self.projection = nn.Linear(_n_flatten(self.trunk, observation_space), latent_dim)
        self.head = nn.LayerNorm(latent_dim)
        self.apply(_delta_orthogonal_init)


def _delta_orthogonal_init(module: nn.Module) -> None:
    """
    Orthogonal linear layers; convolutions that start as an orthogonal map of the centre pixel's channels
    (Xiao et al. 2018, https://arxiv.org/abs/1806.05393).
    """
    if isinstance(module, nn.Linear):
        nn.init.orthogonal_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        assert module.bias is not None
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
        centre = module.kernel_size[0] // 2
        nn.init.orthogonal_(module.weight.data[:, :, centre, centre], gain=nn.init.calculate_gain("relu"))


class DataEfficientCNN(SplitExtractor):
    """
    The encoder of data-efficient Rainbow (van Hasselt et al. 2019, https://arxiv.org/abs/1906.05243), that SEER
    uses on Atari (appendix, Table 5): two 5x5 convolutions of stride 5 with 32 and 64 filters.
    The freeze takes all of it: 576 numbers of 84x84 pixels.

    :param observation_space: (channels-first) image space
    """

    def __init__(self, observation_space: spaces.Box) -> None:
        trunk = nn.Sequential(
            ChannelsLast(),
            nn.Conv2d(observation_space.shape[0], 32, kernel_size=5, stride=5),
            nn.ReLU(),
            nn.Conv2d(32, 64, kernel_size=5, stride=5),
            nn.ReLU(),
            nn.Flatten(),
        )
        super().__init__(observation_space, _n_flatten(trunk, observation_space))
        self.trunk = trunk
        self.projection = nn.Identity()
        self.head = nn.Identity()

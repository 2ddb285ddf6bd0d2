"""Features extractors that know where their encoder ends, and those of SB3 seen so."""

from dataclasses import dataclass
from functools import cached_property

import gymnasium as gym
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, NatureCNN
from stable_baselines3.common.type_aliases import PyTorchObs, TensorDict
from torch import nn

from sb3_seer.common.layout import image_spaces, separate


class SplitExtractor(BaseFeaturesExtractor):
    """
    A features extractor in three parts, so that an agent can freeze the first two and keep learning the third::

        image -> trunk -> projection -> latents -> head -> features
                 (the encoder: frozen)             (goes on learning)

    * ``trunk``: the convolutions; networks that each have a projection of their own share it,
    * ``projection``: what the encoder has on top of them (``nn.Identity()`` for nothing),
    * ``head``: maps stored latents to features (``nn.Identity()`` for nothing).

    To write one, assign the three modules in the constructor. For ``Dict`` observations, the trunk takes the images
    by key, and ``features()`` is to be overridden with what joins the other keys. Images lie channels last in memory, and
    so does what convolutions make of them: flatten it with ``nn.Flatten`` or ``reshape()``, not with ``view()``.

    :param observation_space: (channels-first) image space, or a ``Dict`` with some
    :param latent_dim: numbers in a latent
    :param features_dim: numbers in the features, that of the latent by default
    """

    trunk: nn.Module
    projection: nn.Module
    head: nn.Module

    def __init__(self, observation_space: gym.Space, latent_dim: int, features_dim: int | None = None) -> None:
        super().__init__(observation_space, latent_dim if features_dim is None else features_dim)
        self.latent_dim = latent_dim

    def share_convolutions(self, other: "SplitExtractor") -> None:
        """
        Have the convolutions of another extractor in place of one's own.

        :param other: an extractor of the same class and arguments
        """
        self.trunk = other.trunk

    def run_trunk(self, images: PyTorchObs) -> th.Tensor:
        """
        :param images: preprocessed images, shape ``(batch_size, channels, height, width)``; of a ``Dict``, by key
        :return: what the projection takes
        """
        return self.trunk(images)

    def encode(self, images: PyTorchObs) -> th.Tensor:
        """
        :param images: preprocessed images, shape ``(batch_size, channels, height, width)``; of a ``Dict``, by key
        :return: latents, shape ``(batch_size, latent_dim)``
        """
        return self.projection(self.run_trunk(images))

    def features(self, latents: th.Tensor, others: TensorDict) -> th.Tensor:
        """
        :param latents: shape ``(batch_size, latent_dim)``
        :param others: of ``Dict`` observations, what is no image, preprocessed, by key
        :return: features, shape ``(batch_size, features_dim)``
        """
        return self.head(latents)

    def forward(self, observations: PyTorchObs) -> th.Tensor:
        """
        :param observations: preprocessed images, shape ``(batch_size, channels, height, width)``; or a ``Dict`` with some
        :return: features, shape ``(batch_size, features_dim)``
        """
        images, others = separate(observations, self._observation_space)
        return self.features(self.encode(images), others)


@dataclass(frozen=True)
class WholeExtractor:
    """
    Any other features extractor, seen as a ``SplitExtractor``: all of it is the encoder.
    Not a module, so the names in a ``state_dict`` stay what they are in SB3.
    """

    trunk: BaseFeaturesExtractor
    projection = nn.Identity()

    @property
    def latent_dim(self) -> int:
        """numbers in a latent"""
        return self.trunk.features_dim

    def run_trunk(self, images: PyTorchObs) -> th.Tensor:
        """:return: latents of preprocessed images"""
        return self.trunk(images)

    def features(self, latents: th.Tensor, others: TensorDict) -> th.Tensor:
        """:return: the latents"""
        return latents


@dataclass(frozen=True)
class SplitCombinedExtractor:
    """
    SB3's ``CombinedExtractor`` (for ``Dict`` observations), seen as a ``SplitExtractor``: what it has for its images is
    the encoder, and a latent is what all of these put out. No module, for the same reason.
    """

    extractor: CombinedExtractor
    projection = nn.Identity()

    @cached_property
    def trunk(self) -> nn.ModuleDict:
        """what it has for each image: what it has for the other keys may go on learning"""
        images = image_spaces(self.extractor._observation_space)
        return nn.ModuleDict({key: module for key, module in self.extractor.extractors.items() if key in images})

    @property
    def latent_dims(self) -> dict[str, int]:
        """
        of each image, the numbers that its part of a latent has

        :raises ValueError: if that is not known
        """
        images = image_spaces(self.extractor._observation_space)
        return {key: self._n_features(key, module, images[key]) for key, module in self.trunk.items()}

    def _n_features(self, key: str, module: nn.Module, image: spaces.Box) -> int:
        if isinstance(module, BaseFeaturesExtractor):
            return module.features_dim
        if isinstance(module, nn.Flatten):
            return spaces.flatdim(image)
        raise ValueError(
            f"{type(self.extractor).__name__} has a {type(module).__name__} for the image {key!r}: "
            "allowed are a BaseFeaturesExtractor, which knows its features_dim, and nn.Flatten"
        )

    @property
    def latent_dim(self) -> int:
        """numbers in a latent"""
        return sum(self.latent_dims.values())

    def run_trunk(self, images: PyTorchObs) -> th.Tensor:
        """:return: latents of preprocessed images, by key"""
        assert isinstance(images, dict)
        return th.cat([module(images[key]) for key, module in self.trunk.items()], dim=1)

    def features(self, latents: th.Tensor, others: TensorDict) -> th.Tensor:
        """:return: the latents and all else, each key's in its place"""
        dims = self.latent_dims
        parts = dict(zip(dims, latents.split(list(dims.values()), dim=1), strict=True))
        extractors = self.extractor.extractors.items()
        return th.cat([parts[key] if key in dims else module(others[key]) for key, module in extractors], dim=1)


Split = SplitExtractor | WholeExtractor | SplitCombinedExtractor


def can_split(extractor_class: type[BaseFeaturesExtractor], observation_space: spaces.Space) -> bool:
    """
    :param extractor_class: of features extractors
    :param observation_space: what they take
    :return: whether it is known which part of them is for images
    """
    if not isinstance(observation_space, spaces.Dict) or issubclass(extractor_class, SplitExtractor):
        return True
    return issubclass(extractor_class, CombinedExtractor) and extractor_class.forward is CombinedExtractor.forward


def split(extractor: BaseFeaturesExtractor) -> Split:
    """
    :param extractor: any features extractor
    :return: its trunk, projection and head
    """
    if isinstance(extractor, SplitExtractor):
        return extractor
    if isinstance(extractor, CombinedExtractor):
        return SplitCombinedExtractor(extractor)
    return WholeExtractor(extractor)


def takes_channels_last(extractor: Split) -> bool:
    """
    :param extractor: its trunk, projection and head
    :return: whether its images may lie channels last in memory, as convolutions like best: another's may take a view of
        what its convolutions put out, as only the usual layout allows
    """
    if isinstance(extractor, SplitCombinedExtractor):
        return all(type(module) in (NatureCNN, nn.Flatten) for module in extractor.trunk.values())
    return isinstance(extractor, SplitExtractor) or type(extractor.trunk) is NatureCNN

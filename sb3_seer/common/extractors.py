"""Splits a features extractor into an encoder, which is frozen, and a head, which goes on learning."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import gymnasium as gym
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, NatureCNN
from stable_baselines3.common.type_aliases import PyTorchObs, TensorDict
from torch import nn

from sb3_seer.common.observations import image_spaces, separate


class SplitExtractor(BaseFeaturesExtractor):
    """
    A features extractor of three modules, of which a freeze takes the first two::

        image -> trunk -> projection -> latents -> head -> features
                 (the encoder: frozen)             (goes on learning)

    * ``trunk``: the convolutions; an actor and a critic share it,
    * ``projection``: the encoder's layers on top of it, one for each network (``nn.Identity()`` for none),
    * ``head``: maps stored latents to features (``nn.Identity()`` for none).

    A subclass assigns the three modules in its constructor, and overrides neither ``forward()`` nor ``encode()``. For ``Dict``
    observations, the trunk takes the images by key, and the subclass overrides ``features()`` to join the other keys. Images,
    and so the feature maps, have their channels last in memory: flatten them with ``nn.Flatten`` or ``reshape()``, not with
    ``view()``.

    :param observation_space: (channels-first) image space, or a ``Dict`` with images
    :param latent_dim: numbers in a latent
    :param features_dim: numbers in the features, ``latent_dim`` by default
    """

    trunk: nn.Module
    projection: nn.Module
    head: nn.Module
    is_trained = False  # whether its encoder was trained before, and may be frozen before its first gradient step

    def __init__(self, observation_space: gym.Space, latent_dim: int, features_dim: int | None = None) -> None:
        super().__init__(observation_space, latent_dim if features_dim is None else features_dim)
        self.latent_dim = latent_dim

    def share_convolutions(self, other: "SplitExtractor") -> None:
        """
        Take the convolutions of another extractor.

        :param other: an extractor of the same class and arguments
        """
        self.trunk = other.trunk

    def encode(self, images: PyTorchObs) -> th.Tensor:
        """
        :param images: preprocessed images, shape ``(batch_size, channels, height, width)``; of a ``Dict``, by key
        :return: latents, shape ``(batch_size, latent_dim)``
        """
        return self.projection(self.trunk(images))

    def features(self, latents: th.Tensor, vector_obs: TensorDict) -> th.Tensor:
        """
        :param latents: shape ``(batch_size, latent_dim)``
        :param vector_obs: of ``Dict`` observations, the keys without images, preprocessed
        :return: features, shape ``(batch_size, features_dim)``
        """
        return self.head(latents)

    def forward(self, observations: PyTorchObs) -> th.Tensor:
        """
        :param observations: preprocessed images, shape ``(batch_size, channels, height, width)``; or a ``Dict`` with images
        :return: features, shape ``(batch_size, features_dim)``
        """
        images, vector_obs = separate(observations, self._observation_space)
        return self.features(self.encode(images), vector_obs)


class ConcatModules(nn.ModuleDict):
    """
    Applies a module to each part, and puts their outputs side by side.

    :param modules: by key
    :param shapes: of each part of an input, None if the input has its parts by key
    """

    def __init__(self, modules: Mapping[str, nn.Module], shapes: Sequence[Sequence[int]] | None = None) -> None:
        super().__init__(modules)
        self.shapes = shapes

    def forward(self, inputs: PyTorchObs) -> th.Tensor:
        """
        :param inputs: parts by key, or one tensor with the flattened parts, shape ``(batch_size, n_inputs)``
        :return: the flattened outputs, shape ``(batch_size, n_outputs)``
        """
        if isinstance(inputs, th.Tensor):
            assert self.shapes is not None
            parts = inputs.split([math.prod(shape) for shape in self.shapes], dim=1)
            inputs = {key: part.unflatten(1, shape) for key, part, shape in zip(self, parts, self.shapes, strict=True)}
        return th.cat([module(inputs[key]).flatten(start_dim=1) for key, module in self.items()], dim=1)


@dataclass(frozen=True)
class WholeExtractor:
    """
    View of any other features extractor: all of it is the encoder. It is not a module, so that the names in a
    ``state_dict`` are SB3's.
    """

    trunk: BaseFeaturesExtractor
    projection = nn.Identity()

    @property
    def latent_dim(self) -> int:
        """numbers in a latent"""
        return self.trunk.features_dim

    def features(self, latents: th.Tensor, vector_obs: TensorDict) -> th.Tensor:
        """:return: the latents"""
        return latents


@dataclass(frozen=True)
class SplitCombinedExtractor:
    """
    View of SB3's ``CombinedExtractor`` (for ``Dict`` observations): its extractors of images are the encoder, and a latent
    joins their outputs.
    """

    extractor: CombinedExtractor
    projection = nn.Identity()

    @cached_property
    def trunk(self) -> ConcatModules:
        """the extractors of images, by key"""
        return ConcatModules({key: self.extractor.extractors[key] for key in self.latent_dims})

    @property
    def latent_dims(self) -> dict[str, int]:
        """
        numbers in the part of a latent that comes from each image, by key

        :raises ValueError: for a module of unknown output size
        """
        images = image_spaces(self.extractor._observation_space)
        extractors = self.extractor.extractors.items()
        return {key: self._n_features(key, module, images[key]) for key, module in extractors if key in images}

    def _n_features(self, key: str, module: nn.Module, image: spaces.Box) -> int:
        if isinstance(module, BaseFeaturesExtractor):
            return module.features_dim
        if isinstance(module, nn.Flatten):
            return spaces.flatdim(image)
        raise ValueError(
            f"{type(self.extractor).__name__} must have a BaseFeaturesExtractor (with a features_dim) or nn.Flatten for the "
            f"image {key!r}, got {type(module).__name__}"
        )

    @property
    def latent_dim(self) -> int:
        """numbers in a latent"""
        return sum(self.latent_dims.values())

    def features(self, latents: th.Tensor, vector_obs: TensorDict) -> th.Tensor:
        """:return: features of all keys, in the order of the ``CombinedExtractor``"""
        dims = self.latent_dims
        parts = dict(zip(dims, latents.split(list(dims.values()), dim=1), strict=True))
        extractors = self.extractor.extractors.items()
        return th.cat([parts[key] if key in dims else module(vector_obs[key]) for key, module in extractors], dim=1)


Split = SplitExtractor | WholeExtractor | SplitCombinedExtractor


def can_split(extractor_class: type[BaseFeaturesExtractor], observation_space: spaces.Space) -> bool:
    """
    :param extractor_class: class of a features extractor
    :param observation_space: observation space
    :return: whether it is known which part of the extractor encodes images
    """
    if not isinstance(observation_space, spaces.Dict) or issubclass(extractor_class, SplitExtractor):
        return True
    return issubclass(extractor_class, CombinedExtractor) and extractor_class.forward is CombinedExtractor.forward


def check_extractor(extractor_class: type[BaseFeaturesExtractor], observation_space: spaces.Space) -> None:
    """
    :param extractor_class: class of a features extractor
    :param observation_space: observation space
    :raises ValueError: if it is not known which part of the extractor encodes images; for methods of a ``SplitExtractor`` that
        are overridden and not called, or not overridden and needed
    """
    name = extractor_class.__name__
    if not can_split(extractor_class, observation_space):
        raise ValueError(
            "`features_extractor_class` must be CombinedExtractor or a SplitExtractor with Dict observations, got "
            f"{name}, which may mix images with other keys"
        )
    if not issubclass(extractor_class, SplitExtractor):
        return
    if extractor_class.forward is not SplitExtractor.forward or extractor_class.encode is not SplitExtractor.encode:
        raise ValueError(f"{name} must not override forward() or encode(): networks call trunk, projection and features()")
    has_vectors = isinstance(observation_space, spaces.Dict) and len(image_spaces(observation_space)) < len(observation_space)
    if has_vectors and extractor_class.features is SplitExtractor.features:
        raise ValueError(f"{name} must override features() to join the keys of {observation_space} that are not images")


def split(extractor: BaseFeaturesExtractor) -> Split:
    """
    :param extractor: any features extractor
    :return: the extractor, or a view of it, with a trunk, a projection and a head
    """
    if isinstance(extractor, SplitExtractor):
        return extractor
    if isinstance(extractor, CombinedExtractor):
        return SplitCombinedExtractor(extractor)
    return WholeExtractor(extractor)


def takes_channels_last(extractor: Split) -> bool:
    """
    :param extractor: an extractor, see :func:`split`
    :return: whether its images may have their channels last in memory, where convolutions are fastest. A user's extractor may
        take a ``view()`` of feature maps, which needs channels first
    """
    if isinstance(extractor, SplitCombinedExtractor):
        return all(type(module) in (NatureCNN, nn.Flatten) for module in extractor.trunk.values())
    return isinstance(extractor, SplitExtractor) or type(extractor.trunk) is NatureCNN

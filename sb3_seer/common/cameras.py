"""An encoder for each camera."""

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_flattened_obs_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, NatureCNN
from stable_baselines3.common.type_aliases import TensorDict
from torch import nn

from sb3_seer.common.extractors import ConcatModules, SplitExtractor, split
from sb3_seer.common.observations import image_spaces

Encoder = type[BaseFeaturesExtractor] | Sequence[Any]


class MultiCameraEncoder(SplitExtractor):
    """
    For ``Dict`` observations: an encoder of its own for each image. Their latents stand side by side, and so do their
    features, before the other keys.

    :param observation_space: with at least one image
    :param encoders: by key of an image, the class of its features extractor, or the class and its arguments:
        ``dict(front=PixelEncoder, wrist=(PixelEncoder, dict(latent_dim=20)))``. The others have SB3's ``NatureCNN``
    :raises ValueError: for a key that is not an image, or for ``freeze_at``
    """

    def __init__(self, observation_space: gym.Space, encoders: Mapping[str, Encoder] | None = None) -> None:
        if not isinstance(observation_space, spaces.Dict):
            raise ValueError(f"`observation_space` must be a Dict with images, got {observation_space}")
        images = image_spaces(observation_space)
        encoders = encoders or {}
        if not encoders.keys() <= images.keys():
            raise ValueError(f"`encoders` must be for images among {', '.join(images)}, got {', '.join(encoders)}")
        parts, trunk_shapes, head_dims = {}, [], []
        for key, box in images.items():
            encoder = encoders.get(key, NatureCNN)
            extractor_class, kwargs = encoder if isinstance(encoder, tuple | list) and len(encoder) == 2 else (encoder, {})
            if not (isinstance(extractor_class, type) and isinstance(kwargs, Mapping)):
                raise ValueError(
                    f"`encoders` must be classes, or pairs of a class and its arguments, got {encoder!r} for {key!r}"
                )
            if "freeze_at" in kwargs:
                raise ValueError(f"`encoders` must be frozen as a whole, got freeze_at={kwargs['freeze_at']!r} for {key!r}")
            extractor = extractor_class(box, **kwargs).eval()  # one image has no batch statistics
            parts[key] = split(extractor)
            head_dims.append(extractor.features_dim)
            with th.no_grad():
                trunk_shapes.append(parts[key].trunk(th.zeros(1, *box.shape)).shape[1:])
        vector_dims = [get_flattened_obs_dim(space) for key, space in observation_space.spaces.items() if key not in images]
        latent_dims = [part.latent_dim for part in parts.values()]
        super().__init__(observation_space, sum(latent_dims), features_dim=sum(head_dims) + sum(vector_dims))
        self.trunk = ConcatModules({key: part.trunk for key, part in parts.items()})
        self.projection = ConcatModules({key: part.projection for key, part in parts.items()}, trunk_shapes)
        heads = {key: part.head if isinstance(part, SplitExtractor) else nn.Identity() for key, part in parts.items()}
        self.head = ConcatModules(heads, [(dim,) for dim in latent_dims])
        self.is_trained = all(getattr(part, "is_trained", False) for part in parts.values())
        self.train()

    def features(self, latents: th.Tensor, vector_obs: TensorDict) -> th.Tensor:
        """
        :param latents: shape ``(batch_size, latent_dim)``
        :param vector_obs: the keys without images, preprocessed
        :return: features of all keys, shape ``(batch_size, features_dim)``
        """
        return th.cat([self.head(latents), *(part.flatten(start_dim=1) for part in vector_obs.values())], dim=1)

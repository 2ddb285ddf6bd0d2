"""The seam: networks that take images or latents, and policies that know where their encoder ends."""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel, BasePolicy
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_seer.common.augmentations import CenterCrop
from sb3_seer.common.encoders import split
from sb3_seer.common.type_aliases import Latents


class LatentNetwork(BaseModel):
    """
    Mixin for any SB3 network: its observations are images, as before, or ``Latents``.

    ``BaseModel.extract_features`` is the one place through which the observations of every actor, critic and
    Q-network pass. That is why SB3's ``train()`` runs on latents as it is.
    """

    observation_space: spaces.Box
    features_extractor: BaseFeaturesExtractor
    latent_index = 0  # which of the N latents is this network's
    encoder_frozen = False

    def extract_features(self, obs: PyTorchObs | Latents, features_extractor: BaseFeaturesExtractor) -> th.Tensor:
        """
        :param obs: images of shape ``(batch_size, channels, height, width)``, those larger than this network's
            observation space are cropped to their middle; or latents
        :param features_extractor: the features extractor to use
        :return: features, shape ``(batch_size, features_dim)``
        """
        if isinstance(obs, Latents):
            return split(features_extractor).head(obs.values[:, self.latent_index])
        return super().extract_features(CenterCrop(self.observation_space.shape[-2:])(obs), features_extractor)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """
        :return: The parameters, without those of a frozen encoder. SB3 lists them with this method to update a target
            network, and a Polyak update must leave a frozen encoder out: ``(1 - tau) * x + tau * x`` is not always x.
        """
        if not self.encoder_frozen:
            return super().parameters(recurse)
        frozen = {parameter for module in self.encoder_modules() for parameter in module.parameters()}
        return (parameter for parameter in super().parameters(recurse) if parameter not in frozen)

    def encoder_modules(self) -> tuple[nn.Module, nn.Module]:
        """:return: all that a freeze takes of this network"""
        extractor = split(self.features_extractor)
        return extractor.trunk, extractor.projection


class SEERPolicy(BasePolicy):
    """
    Mixin for the policies of SEER algorithms.

    Their networks live in the space of the augmented images, ``image_shape``. The policy itself takes
    observations of the environment.

    :param image_size: (height, width) of the augmented images, None if they are as large as the observations
    """

    observation_space: spaces.Box
    encoder_frozen = False
    # Observations whose latents are known already, (n_envs, *obs_shape), and these latents
    _encoded: tuple[np.ndarray, Latents] | None = None

    def __init__(
        self, observation_space: spaces.Box, *args: Any, image_size: tuple[int, int] | None = None, **kwargs: Any
    ) -> None:
        self.image_size = image_size
        if image_size is None:
            self.image_space = observation_space
        else:
            corner = CenterCrop(image_size)
            low, high = (corner(th.as_tensor(bound)).numpy() for bound in (observation_space.low, observation_space.high))
            self.image_space = spaces.Box(low, high, dtype=observation_space.dtype.type)
        super().__init__(observation_space, *args, **kwargs)

    # What a policy has to say of its networks

    @property
    def encoder_networks(self) -> list[LatentNetwork]:
        """The N networks with a latent of their own, in the order of their ``latent_index``."""
        raise NotImplementedError

    @property
    def target_networks(self) -> list[LatentNetwork]:
        """The target networks of the first ``encoder_networks``."""
        raise NotImplementedError

    # What follows from it

    def make_features_extractor(self) -> BaseFeaturesExtractor:
        """:return: a new features extractor for augmented images"""
        return self.features_extractor_class(self.image_space, **self.features_extractor_kwargs)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images that ``encode`` takes."""
        return self.image_space.shape  # type: ignore[return-value]

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(N, L): networks with a latent of their own, numbers in a latent."""
        extractors = [split(network.features_extractor) for network in self.encoder_networks]
        return len(extractors), extractors[0].latent_dim

    def encode(self, images: th.Tensor) -> th.Tensor:
        """
        Latents of all networks at once: convolutions that they share run once.

        :param images: shape ``(batch_size, *image_shape)``
        :return: float32 latents without a graph, shape ``(batch_size, N, L)``
        """
        self.set_training_mode(False)
        with th.no_grad():
            return self._encode(images, self.encoder_networks).values

    def encode_observations(self, observations: np.ndarray) -> th.Tensor:
        """
        :param observations: one observation of the environment, or a batch; larger images are cropped to their middle
        :return: float32 latents, shape ``(batch_size, N, L)``
        """
        images, _ = super().obs_to_tensor(observations)
        assert isinstance(images, th.Tensor)
        return self.encode(CenterCrop(self.image_shape[1:])(images))

    def _encode(self, images: th.Tensor, networks: list[LatentNetwork], detach_after_first: bool = False) -> Latents:
        """
        :param images: shape ``(batch_size, *image_shape)``
        :param networks: whose latents to compute
        :param detach_after_first: whether only the first network's loss trains a trunk that others share
        :return: latents of shape ``(batch_size, len(networks), L)``
        """
        # The layout that convolutions like best, while an image is a quarter of what it is as floats
        images = images.contiguous(memory_format=th.channels_last)
        images = preprocess_obs(images, self.image_space, normalize_images=self.normalize_images)  # type: ignore[assignment]
        outputs: dict[nn.Module, th.Tensor] = {}
        latents: list[th.Tensor] = []
        for network in networks:
            extractor = split(network.features_extractor)
            if extractor.trunk not in outputs:
                outputs[extractor.trunk] = extractor.trunk(images)
            output = outputs[extractor.trunk]
            latents.append(extractor.projection(output.detach() if detach_after_first and latents else output))
        return Latents(th.stack(latents, dim=1))  # (batch_size, n_networks, L)

    def _latent_networks(self) -> list[LatentNetwork]:
        """:return: all networks, targets and those that have a latent from another network included"""
        return [module for module in self.modules() if isinstance(module, LatentNetwork)]

    def freeze_encoder(self) -> None:
        """
        Stop the encoders from learning for ever, after making the target networks equal to the online ones (as the
        released code for control does): from now on they share their latents. Heads go on learning, the targets' too.
        """
        for network, target in zip(self.encoder_networks, self.target_networks, strict=False):
            target.load_state_dict(network.state_dict())
        for network in self._latent_networks():
            network.encoder_frozen = True
            for module in network.encoder_modules():
                # The parameters stay in the optimizer's groups, or its saved state could not be loaded.
                # Without a gradient it does not step them.
                module.requires_grad_(False)
                module.zero_grad(set_to_none=True)
        self.encoder_frozen = True
        self.set_training_mode(self.training)

    def set_training_mode(self, mode: bool) -> None:
        """
        Put the policy in training or evaluation mode. A frozen encoder stays in evaluation mode.

        :param mode: True for training mode
        """
        super().set_training_mode(mode)
        if self.encoder_frozen:
            for network in self._latent_networks():
                for module in network.encoder_modules():
                    module.eval()

    def encoder_fingerprint(self) -> str:
        """:return: a short hash of all that decides the value of a latent"""
        digest = hashlib.sha256(f"{self.image_shape} {self.latent_shape} {self.normalize_images}".encode())
        for network in self.encoder_networks:
            for module in network.encoder_modules():
                for name, tensor in module.state_dict().items():
                    digest.update(f"{name} {tuple(tensor.shape)}".encode())
                    digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def remember(self, observations: np.ndarray, latents: th.Tensor) -> None:
        """
        Know the latents of these observations, so that acting on them does not encode them again.

        :param observations: shape ``(n_envs, *obs_shape)``
        :param latents: what ``encode`` says of their middle, shape ``(n_envs, N, L)``
        """
        self._encoded = (observations, Latents(latents))

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load weights, see :meth:`torch.nn.Module.load_state_dict`, and forget latents of others."""
        self._encoded = None
        return super().load_state_dict(*args, **kwargs)

    def obs_to_tensor(self, observation: np.ndarray | dict[str, np.ndarray]) -> tuple[PyTorchObs, bool]:
        """
        :param observation: one observation of the environment, or a batch
        :return: the observation as a tensor, or its latents if they are known; whether it is a batch
        """
        if self._encoded is not None and np.array_equal(observation, self._encoded[0]):  # type: ignore[arg-type]
            return self._encoded[1], True  # type: ignore[return-value]
        return super().obs_to_tensor(observation)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "image_size": self.image_size}

"""The seam between images and latents: networks that take both, and policies that know where their encoder ends."""

import hashlib
import pickle
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel, BasePolicy
from stable_baselines3.common.preprocessing import is_image_space, preprocess_obs
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_seer.common.extractors import SplitExtractor, check_extractor, split, takes_channels_last
from sb3_seer.common.observations import center_crop, crop_to_middle, image_spaces, map_parts, separate
from sb3_seer.common.type_aliases import Latents, Observations

SelfNetwork = TypeVar("SelfNetwork", bound="LatentNetwork")

# Arguments of autocast
ENCODER_DTYPES = {"float32": None, "bfloat16": th.bfloat16}


def preprocess_images(
    images: PyTorchObs, space: spaces.Space, normalize_images: bool, dtype: th.dtype | None = None
) -> PyTorchObs:
    """
    SB3's ``preprocess_obs`` for images, with one copy of the floats instead of two.

    :param images: shape ``(batch_size, channels, height, width)``; of ``Dict`` observations, by key
    :param space: observation space
    :param normalize_images: whether to divide pixels by 255
    :param dtype: of the images to return, None for float32. Bytes become the bfloat16 that their float32 would be rounded to
    :return: images of floats
    """
    boxes = image_spaces(space)

    def preprocess(image: th.Tensor, box: spaces.Box) -> th.Tensor:
        floats = image.to(dtype or th.float32)
        if not (normalize_images and is_image_space(box)):
            return floats
        return floats / 255.0 if floats is image else floats.div_(255.0)  # never the caller's own floats

    if isinstance(images, dict):
        return {key: preprocess(image, boxes[key]) for key, image in images.items()}
    return preprocess(images, boxes[""])


def channels_last(images: PyTorchObs) -> PyTorchObs:
    """
    :param images: shape ``(batch_size, channels, height, width)``; of ``Dict`` observations, by key
    :return: the images with their channels last in memory, where convolutions are fastest. The copy is cheapest while a
        pixel is a byte
    """
    return map_parts(lambda part: part.contiguous(memory_format=th.channels_last), images)


class LatentNetwork(BaseModel):
    """
    Mixin for any SB3 network: it takes images, as before, or ``Latents``.

    The observations of every actor, critic and Q-network pass through ``BaseModel.extract_features``. That is why SB3's
    ``train()`` runs on latents unmodified.
    """

    features_extractor: BaseFeaturesExtractor
    latent_index = 0  # which of the N latents this network takes
    is_target = False
    encoder_frozen = False
    tied_parameters: Set[nn.Parameter] = frozenset()  # which another network's loss trains
    autocast_dtype: th.dtype | None = None  # for the encoder, None for float32

    def extract_features(self, obs: PyTorchObs | Latents, features_extractor: BaseFeaturesExtractor) -> th.Tensor:
        """
        :param obs: images of shape ``(batch_size, channels, height, width)`` (or a dict with some), or latents. Images
            larger than this network's observation space are cropped to their middle
        :param features_extractor: the features extractor to use
        :return: features, shape ``(batch_size, features_dim)``
        """
        extractor = split(features_extractor)
        if isinstance(obs, Latents):
            latents, vector_obs = obs.of(self.latent_index, self.is_target), obs.vector_obs
            if not th.is_grad_enabled():
                latents = latents.detach()  # a head that is the identity would return them with their graph
        else:
            images, vector_obs = separate(center_crop(obs, self.observation_space), self.observation_space)
            # Unlike _encode(), with SB3's extractors this is bit-identical to SB3: freeze_after=None changes nothing
            if isinstance(extractor, SplitExtractor):
                images = channels_last(images)
            images = preprocess_images(images, self.observation_space, self.normalize_images, self.autocast_dtype)
            with self.autocast():
                output = extractor.trunk(images)
                latents = extractor.projection(output.detach() if self.tied_parameters else output).float()
        if vector_obs:
            vector_obs = preprocess_obs(vector_obs, self.observation_space)  # type: ignore[assignment]
        return extractor.features(latents, vector_obs)

    def autocast(self) -> AbstractContextManager:
        """:return: the context in which the encoder runs (heads run outside of it)"""
        # self.device lists all parameters, which takes a while
        return nullcontext() if self.autocast_dtype is None else th.autocast(self.device.type, dtype=self.autocast_dtype)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """
        :return: the parameters without those that another network's loss trains, and without a frozen encoder's. SB3 lists
            them with this method for an optimizer and to update a target network, and a Polyak update must leave a frozen
            encoder out: ``(1 - tau) * x + tau * x`` is not always x
        """
        left_out = set(self.tied_parameters)
        if self.encoder_frozen:
            left_out.update(parameter for module in self.encoder_modules() for parameter in module.parameters())
        return (parameter for parameter in super().parameters(recurse) if parameter not in left_out)

    def train(self: SelfNetwork, mode: bool = True) -> SelfNetwork:
        """Put the network in training or evaluation mode; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.encoder_frozen:
            for module in self.encoder_modules():
                module.eval()
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle a network whose class ``latent_class()`` made."""
        class_arguments = vars(type(self)).get("class_arguments")
        return super().__reduce_ex__(protocol) if class_arguments is None else (_new_network, class_arguments, self.__dict__)

    def encoder_modules(self) -> tuple[nn.Module, nn.Module]:
        """:return: the part of this network that a freeze takes"""
        extractor = split(self.features_extractor)
        return extractor.trunk, extractor.projection


@cache
def latent_class(network_class: type, mixin: type) -> type[LatentNetwork]:
    """
    :param network_class: class of an actor, a critic or a Q-network
    :param mixin: what to add to it
    :return: a subclass whose networks take images or ``Latents``; the class itself if its networks do already
    """
    if issubclass(network_class, LatentNetwork):
        return network_class
    return type(f"Latent{network_class.__name__}", (mixin, network_class), {"class_arguments": (network_class, mixin)})


def _new_network(network_class: type, mixin: type) -> LatentNetwork:
    """:return: a network without modules and parameters, to be filled by ``copy`` or ``pickle``"""
    made = latent_class(network_class, mixin)
    return made.__new__(made)


def _is_equal(tensor: th.Tensor, other: th.Tensor) -> bool:
    # No gradient flows through what was encoded before, as a saliency map needs
    if tensor.requires_grad or tensor.device != other.device:
        return False
    if tensor.device.type == "cpu":  # numpy is several times faster
        return np.array_equal(tensor.numpy(), other.numpy())
    return tensor.dtype == other.dtype and th.equal(tensor, other)


class SEERPolicy(BasePolicy):
    """
    Mixin for the policies of SEER algorithms. The policy takes observations of the environment, its networks take
    augmented images (``image_space``).

    :param image_size: (height, width) of augmented images that are smaller than the observations, by key (``""`` if the
        space is not a ``Dict``)
    :param encoder_dtype: ``"float32"``, or ``"bfloat16"`` to run the encoder on bfloat16 images in PyTorch's autocast: faster
        where the hardware has instructions for it (AMX or AVX-512 of recent x86 processors, recent GPUs), many times slower on
        other CPUs. Weights, heads, losses and stored latents stay in float32
    :raises ValueError: for another ``encoder_dtype``
    """

    _cached: tuple[PyTorchObs, th.Tensor] | None = None  # see cache_latents()
    has_loaded_weights = False  # loaded, and not yet compared with the latents in the replay buffer

    def __init__(
        self,
        observation_space: spaces.Space,
        *args: Any,
        image_size: dict[str, tuple[int, int]] | None = None,
        encoder_dtype: str = "float32",
        **kwargs: Any,
    ) -> None:
        if encoder_dtype not in ENCODER_DTYPES:
            raise ValueError(f"`encoder_dtype` must be 'float32' or 'bfloat16', got {encoder_dtype!r}")
        self.image_size = image_size
        self.encoder_dtype = encoder_dtype
        self.image_space = observation_space
        for key, size in (image_size or {}).items():
            box = image_spaces(observation_space)[key]
            low, high = (crop_to_middle(bound, size) for bound in (box.low, box.high))
            cropped = spaces.Box(low, high, dtype=box.dtype.type)
            if isinstance(self.image_space, spaces.Dict):
                self.image_space = spaces.Dict({**self.image_space.spaces, key: cropped})
            else:
                self.image_space = cropped
        super().__init__(observation_space, *args, **kwargs)

    # ---- the networks ----

    def _build(self, lr_schedule: Schedule) -> None:
        """Build the networks of the SB3 policy, which take latents from then on."""
        super()._build(lr_schedule)  # type: ignore[misc]  # each policy of SB3 has this method
        for name, network in self.named_children():
            if not isinstance(network, BaseModel):
                continue
            # As torch.nn.utils.parametrize does: whatever built the network need not know its new class
            network.__class__ = latent_class(type(network), self._latent_mixin(name))  # type: ignore[arg-type]
            assert isinstance(network, LatentNetwork)
            network.observation_space = self.image_space
            network.is_target = name.endswith("_target")
            network.autocast_dtype = ENCODER_DTYPES[self.encoder_dtype]
        for index, latent_network in enumerate(self.encoder_networks):
            latent_network.latent_index = index
        for name, network in self.named_children():
            if isinstance(network, LatentNetwork) and network.is_target:
                network.latent_index = getattr(self, name.removesuffix("_target")).latent_index

    def _latent_mixin(self, name: str) -> type[LatentNetwork]:
        """:return: the mixin for the network of this name"""
        return LatentNetwork

    @property
    def encoder_networks(self) -> list[LatentNetwork]:
        """The N networks with their own latent, in the order of their ``latent_index``."""
        return [network for network in self.children() if isinstance(network, LatentNetwork) and not network.is_target]

    @property
    def target_networks(self) -> list[LatentNetwork]:
        """Target networks, in the order of their ``latent_index``. There may be fewer: SAC has none of the actor."""
        return [network for network in self.children() if isinstance(network, LatentNetwork) and network.is_target]

    def copy_to_targets(self) -> None:
        """Make each target network, named ``<network>_target``, equal to its network."""
        for name, network in self.named_children():
            if (target := getattr(self, f"{name}_target", None)) is not None:
                target.load_state_dict(network.state_dict())

    # ---- the encoder ----

    def make_features_extractor(self) -> BaseFeaturesExtractor:
        """
        :return: a new features extractor for augmented images
        :raises ValueError: if its class cannot be used, see :func:`~sb3_seer.common.extractors.check_extractor`
        """
        check_extractor(self.features_extractor_class, self.image_space)
        return self.features_extractor_class(self.image_space, **self.features_extractor_kwargs)

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(N, L): networks with their own latent, numbers in a latent"""
        extractors = [split(network.features_extractor) for network in self.encoder_networks]
        return len(extractors), extractors[0].latent_dim

    def check_latent_dim(self) -> None:
        """:raises ValueError: if a latent has not as many numbers as the features extractor says"""
        training = self.training
        boxes = image_spaces(self.image_space)
        images = {key: th.as_tensor(np.zeros((1, *box.shape), box.dtype), device=self.device) for key, box in boxes.items()}
        shape = self.encode(images if isinstance(self.image_space, spaces.Dict) else images[""]).shape[1:]
        self.set_training_mode(training)
        if shape != self.latent_shape:
            name, latent_dim = self.features_extractor_class.__name__, self.latent_shape[1]
            raise ValueError(f"A latent of {name} must have latent_dim={latent_dim} numbers, got shape {tuple(shape[1:])}")

    def center_crop(self, images: PyTorchObs) -> PyTorchObs:
        """
        :param images: shape ``(batch_size, channels, height, width)``; of ``Dict`` observations, by key
        :return: the images, cropped to their middle where they are larger than the augmented ones
        """
        return center_crop(images, self.image_space)

    def encode(self, images: PyTorchObs, networks: Sequence[LatentNetwork] | None = None) -> th.Tensor:
        """
        Encode for several networks at once: convolutions that they share run once.

        :param images: batch of augmented images; of ``Dict`` observations, by key
        :param networks: None for the N ``encoder_networks``
        :return: float32 latents without a graph, shape ``(batch_size, N, L)``
        """
        self.set_training_mode(False)
        with th.no_grad():
            return th.stack(self._encode(images, networks or self.encoder_networks), dim=1)

    def encode_observations(self, observations: Observations, networks: Sequence[LatentNetwork] | None = None) -> th.Tensor:
        """
        :param observations: one observation of the environment, or a batch; larger images are cropped to their middle
        :param networks: None for the N ``encoder_networks``
        :return: float32 latents, shape ``(batch_size, N, L)``
        """
        tensors, _ = super().obs_to_tensor(observations)
        return self.encode(self.center_crop(tensors), networks)

    def _encode(
        self, observations: PyTorchObs, networks: Sequence[LatentNetwork], detach_after_first: bool = False
    ) -> list[th.Tensor]:
        """
        :param observations: batch of augmented images; of ``Dict`` observations, by key, with or without the other keys
        :param networks: networks to encode for
        :param detach_after_first: whether only the first network's loss trains a trunk that several share
        :return: latents of each network, shape ``(batch_size, L)``
        """
        images, _ = separate(observations, self.image_space)
        extractors = [split(network.features_extractor) for network in networks]
        images = channels_last(images) if takes_channels_last(extractors[0]) else map_parts(th.Tensor.contiguous, images)
        images = preprocess_images(images, self.image_space, self.normalize_images, networks[0].autocast_dtype)
        trunks = list(dict.fromkeys(extractor.trunk for extractor in extractors))
        latents: list[th.Tensor] = []
        with networks[0].autocast():
            # A trunk may change its input in place, as in SB3: all but the last have a copy
            outputs = {trunk: trunk(images if trunk is trunks[-1] else map_parts(th.clone, images)) for trunk in trunks}
            for extractor in extractors:
                output = outputs[extractor.trunk]
                if any(getattr(module, "inplace", False) for module in extractor.projection.modules()):
                    output = output.clone()
                latents.append(extractor.projection(output.detach() if detach_after_first and latents else output).float())
        return latents

    def freeze_encoder(self) -> None:
        """
        Freeze the encoders, after copying the online networks to the target networks (as the released code for control
        does): from now on they share latents. Heads go on learning, and the targets' heads go on following.
        """
        self.copy_to_targets()
        frozen: set[nn.Module] = set()
        for child in self.children():
            if isinstance(child, LatentNetwork):
                child.encoder_frozen = True
                frozen.update(child.encoder_modules())
        for module in frozen:
            # The parameters stay in the optimizer's groups, so that its saved state can be loaded.
            # It does not step parameters without a gradient.
            module.requires_grad_(False)
            module.zero_grad(set_to_none=True)
            module.eval()

    def encoder_fingerprint(self) -> str:
        """:return: a short hash of the weights, buffers and settings that decide the value of a latent"""
        shapes = {key: box.shape for key, box in image_spaces(self.image_space).items()}
        digest = hashlib.sha256(f"{shapes} {self.latent_shape} {self.normalize_images} {self.encoder_dtype}".encode())
        for network in self.encoder_networks:
            for module in network.encoder_modules():
                for name, value in module.state_dict().items():
                    if isinstance(value, th.Tensor):
                        digest.update(f"{name} {tuple(value.shape)}".encode())
                        digest.update(value.cpu().flatten().view(th.uint8).numpy().tobytes())
                    else:  # of get_extra_state()
                        digest.update(name.encode() + pickle.dumps(value))
        return digest.hexdigest()[:16]

    def cache_latents(self, observations: Observations, latents: th.Tensor) -> None:
        """
        Keep the latents of the next observations to act on, which were encoded to store them: acting on just these
        calls no encoder.

        :param observations: images, shape ``(n_envs, *obs_shape)``; of ``Dict`` observations, by key
        :param latents: of their middle, shape ``(n_envs, N, L)``
        """
        self._cached = map_parts(lambda part: th.as_tensor(part, device=self.device).clone(), observations), latents

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        if self._cached is not None and not th.compiler.is_compiling() and not th.jit.is_tracing():  # nor exporting
            images, vector_obs = separate(observation, self.observation_space)
            same = map_parts(_is_equal, images, self._cached[0])
            if all(same.values()) if isinstance(same, dict) else same:
                observation = Latents(self._cached[1].unbind(dim=1), vector_obs)  # type: ignore[assignment]
        return super()._predict(observation, deterministic)  # type: ignore[safe-super]

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """
        Load weights, see :meth:`torch.nn.Module.load_state_dict`, and forget latents of other weights.

        :raises ValueError: for two values of one weight that networks share here; nothing is loaded then
        """
        names: dict[Any, str] = {}
        for name, tensor in self.state_dict().items():
            if name in state_dict and isinstance(tensor, th.Tensor) and tensor.data_ptr() != 0:
                first = names.setdefault((tensor.data_ptr(), tensor.shape), name)
                if not th.equal(state_dict[first].nan_to_num(), state_dict[name].nan_to_num()):
                    raise ValueError(f"{first} and {name} must be equal: networks of this policy share that weight")
        self._forget_latents()
        return super().load_state_dict(state_dict, *args, **kwargs)

    def load_from_vector(self, vector: np.ndarray) -> None:
        """
        Load parameters from a 1D vector, and forget latents of other weights.

        :param vector: as ``parameters_to_vector()`` gives it
        """
        self._forget_latents()
        super().load_from_vector(vector)

    def _forget_latents(self) -> None:
        self._cached, self.has_loaded_weights = None, True

    def _get_constructor_parameters(self) -> dict[str, Any]:
        parameters = super()._get_constructor_parameters()
        return {**parameters, "image_size": self.image_size, "encoder_dtype": self.encoder_dtype}

"""The encoders of the papers."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch as th
from gymnasium import spaces
from torch import nn

from sb3_seer.common.extractors import SplitExtractor


def _output_shape(module: nn.Module, observation_space: spaces.Box) -> tuple[int, ...]:
    """:return: output shape for one image, without the batch"""
    with th.no_grad():
        return tuple(module(th.zeros(1, *observation_space.shape)).shape[1:])


def _n_channels(encoder_class: type, observation_space: spaces.Space) -> int:
    """:raises ValueError: if the space is not a Box of images"""
    if not isinstance(observation_space, spaces.Box) or len(observation_space.shape) != 3:
        raise ValueError(
            f"`observation_space` of {encoder_class.__name__} must be a Box of images, got {observation_space}. For Dict "
            "observations there is MultiCameraEncoder"
        )
    return observation_space.shape[0]


class ChannelsLast(nn.Module):
    """Puts the channels last in memory: on a CPU, convolutions run several times faster."""

    def forward(self, images: th.Tensor) -> th.Tensor:
        """
        :param images: shape ``(batch_size, channels, height, width)``
        :return: the same images, same shape
        """
        return images.contiguous(memory_format=th.channels_last)


class FlattenPixels(nn.Module):
    """Flattens feature maps pixel by pixel, which copies nothing if their channels are last in memory."""

    def forward(self, feature_maps: th.Tensor) -> th.Tensor:
        """
        :param feature_maps: shape ``(batch_size, channels, height, width)``
        :return: shape ``(batch_size, height * width * channels)``
        """
        return feature_maps.permute(0, 2, 3, 1).flatten(start_dim=1)


class LayeredExtractor(SplitExtractor):
    """
    Base of the built-in encoders: convolutions, a first fully connected layer (or none), and a head.

    The freeze takes the layers up to ``freeze_at``, as in the papers' analysis of how many to freeze (Chen et al. 2021,
    https://arxiv.org/abs/2103.02886, appendix C of its first version). Later layers are part of the head. A latent is the
    output of the layer ``freeze_at``, after its activation and pooling; of a convolution, its feature map, pixel by pixel.
    Feature maps of early layers may be larger than the image, and cannot replace it in the replay buffer.

    The names in a ``state_dict`` do not depend on ``freeze_at``: weights saved with one load with another.

    :param observation_space: (channels-first) image space
    :param convolutions: maps images to feature maps
    :param fc1: the first fully connected layer, None for none
    :param head: maps the output of the last layer to features
    :param freeze_at: the last layer that is frozen: ``"fc1"``, or ``"conv1"``, ``"conv2"``... for convolutions, counted from
        the image. Residual blocks are not cut
    :raises ValueError: if there is no such layer
    """

    def __init__(
        self,
        observation_space: spaces.Box,
        convolutions: nn.Sequential,
        fc1: nn.Linear | None,
        head: nn.Module,
        freeze_at: str,
    ) -> None:
        ends = _ends_of_layers(convolutions)
        if fc1 is not None:
            ends["fc1"] = len(convolutions)
        if freeze_at not in ends:
            raise ValueError(f"`freeze_at` of {type(self).__name__} must be one of {', '.join(ends)}, got {freeze_at!r}")
        modules, end = list(convolutions.named_children()), ends[freeze_at]
        frozen, others = (nn.Sequential(OrderedDict(part)) for part in (modules[:end], modules[end:]))
        shape = _output_shape(frozen, observation_space)
        features_dim = fc1.out_features if fc1 is not None else _n_flatten(convolutions, observation_space)
        is_last = freeze_at == list(ends)[-1]
        super().__init__(observation_space, features_dim if is_last else math.prod(shape), features_dim)

        projection = nn.Identity() if fc1 is None else fc1
        self.trunk = nn.Sequential(*frozen, FlattenPixels())
        self.projection = projection if is_last else nn.Identity()
        self.head = head if is_last else _Remainder(shape, others, projection, head)
        self.register_state_dict_post_hook(_rename_saved)
        self.register_load_state_dict_pre_hook(_rename_loaded)

    def share_convolutions(self, other: SplitExtractor) -> None:
        """
        Take the convolutions of another extractor, including convolutions of the head. This one no longer trains those.

        :param other: an extractor of the same class and arguments
        """
        super().share_convolutions(other)
        if isinstance(self.head, _Remainder) and isinstance(other.head, _Remainder):
            self.head.trunk = other.head.trunk
            self.head.trains_trunk = False


def _n_flatten(convolutions: nn.Module, observation_space: spaces.Box) -> int:
    return math.prod(_output_shape(convolutions, observation_space))


def _ends_of_layers(convolutions: nn.Sequential) -> dict[str, int]:
    """:return: by name of a layer, the number of modules up to its end, with its activation and pooling"""
    ends: dict[str, int] = {}
    n_convolutions = 0
    for i, module in enumerate(convolutions):
        n_convolutions += sum(isinstance(part, nn.Conv2d) for part in module.modules())
        if n_convolutions > 0:
            ends[f"conv{n_convolutions}"] = i + 1
    return ends


class _Remainder(nn.Module):
    """
    Head of an encoder that ends before its last layer. Its modules are named as in an encoder that ends there.

    :param shape: shape of the feature map that is stored as a latent
    :param trunk: the convolutions after it, possibly none
    :param projection: the first fully connected layer
    :param head: head of the whole encoder
    """

    def __init__(self, shape: tuple[int, ...], trunk: nn.Sequential, projection: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.shape = shape
        self.trunk = trunk
        self.trains_trunk = True
        self.flatten = FlattenPixels()
        self.projection = projection
        self.head = head

    def forward(self, latents: th.Tensor) -> th.Tensor:
        """
        :param latents: shape ``(batch_size, latent_dim)``
        :return: features, shape ``(batch_size, features_dim)``
        """
        if len(self.trunk) > 0:
            channels, height, width = self.shape
            feature_maps = latents.unflatten(1, (height, width, channels)).permute(0, 3, 1, 2)
            latents = self.flatten(self.trunk(feature_maps))
            if not self.trains_trunk:
                latents = latents.detach()
        return self.head(self.projection(latents))


def _rename_saved(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    """Drop the prefix ``head.`` of a ``_Remainder``."""
    if isinstance(module.head, _Remainder):
        for name in module.head.state_dict():
            state_dict[prefix + name] = state_dict.pop(f"{prefix}head.{name}")


def _rename_loaded(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Restore the prefix ``head.`` of a ``_Remainder``."""
    if isinstance(module.head, _Remainder):
        for name in module.head.state_dict():
            if prefix + name in state_dict:
                state_dict[f"{prefix}head.{name}"] = state_dict.pop(prefix + name)


class PixelEncoder(LayeredExtractor):
    """
    The encoder of SAC-AE, CURL and SEER for control from pixels (SEER, section 5.1 and appendix, Table 4):
    four 3x3 convolutions with 32 filters (strides 2, 1, 1, 1), a linear layer to the latent, and layer
    normalisation as the head. The freeze takes the convolutions and the linear layer.

    As in the released code, the convolutions start delta-orthogonal and the linear layer orthogonal.
    Unlike it, the normalisation keeps learning after the freeze: the paper freezes the convolutions and the linear
    layer only.

    :param observation_space: (channels-first) image space
    :param latent_dim: outputs of the linear layer (50 in the paper), the numbers in a latent if the freeze takes it
    :param n_filters: filters of each convolution
    :param tanh: whether a tanh follows the normalisation, as in SAC-AE and DrQ (not in CURL and SEER)
    :param freeze_at: the last layer that is frozen: ``"conv1"`` to ``"conv4"``, or ``"fc1"``, the linear layer
    :param conv_init: how convolutions start: ``"delta_orthogonal"`` (Xiao et al. 2018, https://arxiv.org/abs/1806.05393; as
        in SAC-AE, CURL and SEER) is an orthogonal map of the centre pixel's channels, ``"orthogonal"`` (DrQ and
        DrQ-v2) one of the whole window
    :raises ValueError: if there is no such layer, or no such ``conv_init``
    """

    def __init__(
        self,
        observation_space: spaces.Box,
        latent_dim: int = 50,
        n_filters: int = 32,
        freeze_at: str = "fc1",
        tanh: bool = False,
        conv_init: str = "delta_orthogonal",
    ) -> None:
        if conv_init not in ("delta_orthogonal", "orthogonal"):
            raise ValueError(f'`conv_init` must be "delta_orthogonal" or "orthogonal", got {conv_init!r}')
        n_channels = _n_channels(type(self), observation_space)
        layers: list[nn.Module] = [nn.Conv2d(n_channels, n_filters, kernel_size=3, stride=2), nn.ReLU(inplace=True)]
        for _ in range(3):
            layers += [nn.Conv2d(n_filters, n_filters, kernel_size=3), nn.ReLU(inplace=True)]
        convolutions = nn.Sequential(ChannelsLast(), *layers)
        fc1 = nn.Linear(_n_flatten(convolutions, observation_space), latent_dim)
        normalization = nn.LayerNorm(latent_dim)
        head = nn.Sequential(normalization, nn.Tanh()) if tanh else normalization
        super().__init__(observation_space, convolutions, fc1, head, freeze_at)
        self.apply(partial(_orthogonal_init, only_centre=conv_init == "delta_orthogonal"))


def _orthogonal_init(module: nn.Module, only_centre: bool) -> None:
    """
    :param module: linear layers and convolutions are initialised, others left
    :param only_centre: whether convolutions see the centre pixel of their window only
    """
    if isinstance(module, nn.Linear):
        nn.init.orthogonal_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        assert module.bias is not None
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
        centre = module.kernel_size[0] // 2
        weight = module.weight.data[:, :, centre, centre] if only_centre else module.weight
        nn.init.orthogonal_(weight, gain=nn.init.calculate_gain("relu"))


class DataEfficientCNN(LayeredExtractor):
    """
    The encoder of data-efficient Rainbow (van Hasselt et al. 2019, https://arxiv.org/abs/1906.05243), that SEER
    uses on Atari (appendix, Table 5): two 5x5 convolutions of stride 5 with 32 and 64 filters.
    The freeze takes all of it: a latent of 576 numbers for 84x84 pixels.

    :param observation_space: (channels-first) image space
    :param freeze_at: the last layer that is frozen: ``"conv1"`` or ``"conv2"``
    :raises ValueError: if there is no such layer
    """

    def __init__(self, observation_space: spaces.Box, freeze_at: str = "conv2") -> None:
        convolutions = nn.Sequential(
            ChannelsLast(),
            nn.Conv2d(_n_channels(type(self), observation_space), 32, kernel_size=5, stride=5),
            nn.ReLU(inplace=True),
            nn.Conv2d(32, 64, kernel_size=5, stride=5),
            nn.ReLU(inplace=True),
        )
        super().__init__(observation_space, convolutions, fc1=None, head=nn.Identity(), freeze_at=freeze_at)


class ResidualBlock(nn.Module):
    """
    Two 3x3 convolutions, each after a ReLU, and a skip connection.

    :param n_channels: channels of the feature maps, in and out
    """

    def __init__(self, n_channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(),  # not in place: the input is needed again
            nn.Conv2d(n_channels, n_channels, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(n_channels, n_channels, kernel_size=3, padding=1),
        )

    def forward(self, feature_maps: th.Tensor) -> th.Tensor:
        """
        :param feature_maps: shape ``(batch_size, n_channels, height, width)``
        :return: feature maps of the same shape
        """
        return feature_maps + self.layers(feature_maps)


class ImpalaCNN(LayeredExtractor):
    """
    The large encoder of IMPALA (Espeholt et al. 2018, https://arxiv.org/abs/1802.01561, figure 3, without its LSTM):
    three stages of a 3x3 convolution, max pooling that halves the feature maps, and two residual blocks of two
    convolutions each. After these 15 convolutions a ReLU, a linear layer and a ReLU.

    SEER, section 5.3, uses it for dm_control instead of ``PixelEncoder``, with all else as in section 5.1: the freeze takes
    the convolutions and the first fully connected layer. The paper does not give the size of that layer or the
    initialisation, and its code for these experiments was not released: here they are IMPALA's 256 and PyTorch's default.
    A latent is stored before the last ReLU, which is the head.

    :param observation_space: (channels-first) image space
    :param latent_dim: outputs of the linear layer, the numbers in a latent if the freeze takes it
    :param n_filters: filters of the convolutions of each stage
    :param freeze_at: the last layer that is frozen: ``"fc1"``, the linear layer, or a convolution outside of residual
        blocks (of each stage the first, third and fifth: ``"conv1"``, ``"conv3"``, ``"conv5"``, ``"conv6"``... ``"conv15"``)
    :raises ValueError: if there is no such layer
    """

    def __init__(
        self,
        observation_space: spaces.Box,
        latent_dim: int = 256,
        n_filters: Sequence[int] = (16, 32, 32),
        freeze_at: str = "fc1",
    ) -> None:
        layers: list[nn.Module] = [ChannelsLast()]
        n_channels = _n_channels(type(self), observation_space)
        for filters in n_filters:
            layers += [nn.Conv2d(n_channels, filters, kernel_size=3, padding=1), nn.MaxPool2d(3, stride=2, padding=1)]
            layers += [ResidualBlock(filters), ResidualBlock(filters)]
            n_channels = filters
        convolutions = nn.Sequential(*layers, nn.ReLU(inplace=True))
        fc1 = nn.Linear(_n_flatten(convolutions, observation_space), latent_dim)
        super().__init__(observation_space, convolutions, fc1, nn.ReLU(), freeze_at)

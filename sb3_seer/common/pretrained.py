"""Encoders that were trained elsewhere: any torch module from images to vectors."""

import copy
import importlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space
from torch import nn
from torch.nn import functional as F

from sb3_seer.common.extractors import SplitExtractor
from sb3_seer.common.utils import check_positive_int

# Of ImageNet, for pixels from 0 to 1
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PretrainedEncoder(SplitExtractor):
    """
    Encoder that was trained elsewhere, for ``freeze_after=0``: no image is ever stored. With a later freeze it is
    trained until then.

    Frames of a stack are encoded one by one, as the module was trained on single images: their outputs side by side are the
    latent, and a step of the environments encodes one frame (with an augmentation, all of them). The head is a layer
    normalisation: the outputs of a module may have any scale.

    :param observation_space: (channels-first) space of images of bytes
    :param module: maps float images of shape ``(batch_size, channels, height, width)`` to vectors or feature maps. A torch
        module, which is copied; or, for YAML files, ``"timm:NAME"`` for a model of the library timm without its classifier,
        or ``"package.module:NAME"`` for a function or class that returns the module
    :param module_kwargs: arguments of the named model, function or class
    :param weights: file of the module's ``state_dict``, by ``torch.save`` or safetensors (by its suffix); None to keep the
        module's own. Nothing is downloaded. The file is read whenever a model is made, also when a saved one is loaded
    :param input_size: height and width to which images are resized; None to leave them as they are
    :param mean: mean of each channel of the images that the module was trained on, for pixels from 0 to 1; None for 0
    :param std: their standard deviation; None for 1
    :param n_stack: frames in an observation
    :raises ValueError: for images that are not bytes; for an unknown name; for weights that do not fit; for a module whose
        output is not the same twice in evaluation mode
    :raises ImportError: if a package that is named is not installed
    """

    is_trained = True

    def __init__(
        self,
        observation_space: spaces.Box,
        module: nn.Module | str,
        module_kwargs: Mapping[str, Any] | None = None,
        weights: str | pathlib.Path | None = None,
        input_size: int | tuple[int, int] | None = None,
        mean: Sequence[float] | None = IMAGENET_MEAN,
        std: Sequence[float] | None = IMAGENET_STD,
        n_stack: int = 1,
    ) -> None:
        if not is_image_space(observation_space):
            raise ValueError(f"`observation_space` must have images of bytes (uint8 from 0 to 255), got {observation_space}")
        channels, height, width = observation_space.shape
        check_positive_int("n_stack", n_stack)
        if channels % n_stack != 0:
            raise ValueError(f"`n_stack` must divide the {channels} channels of an observation, got {n_stack}")
        module = make_module(module, **(module_kwargs or {})) if isinstance(module, str) else copy.deepcopy(module)
        if weights is not None:
            load_weights(module, weights)
        size = (input_size, input_size) if isinstance(input_size, int | np.integer) else input_size
        trunk = _Frames(module, n_stack, channels // n_stack, size, mean, std)
        super().__init__(observation_space, n_stack * _check_module(trunk, (channels // n_stack, height, width)))
        self.trunk = trunk
        self.projection = nn.Identity()
        self.head = nn.LayerNorm(self.latent_dim)


class _Frames(nn.Module):
    """Applies a module to each frame of a stack: resized, normalised, and its output flattened."""

    mean: th.Tensor
    std: th.Tensor

    def __init__(
        self,
        module: nn.Module,
        n_stack: int,
        n_channels: int,
        size: tuple[int, int] | None,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
    ) -> None:
        super().__init__()
        self.module, self.n_stack, self.size = module, n_stack, size
        # The last batch and its outputs, once the module is frozen. No gradient flows through them
        self._last: tuple[th.Tensor, th.Tensor] | None = None
        self.register_load_state_dict_pre_hook(self._forget)
        for name, values, default in (("mean", mean, 0.0), ("std", std, 1.0)):
            values = [default] * n_channels if values is None else list(values)
            if len(values) != n_channels:
                raise ValueError(f"`{name}` must be None or have a number for each of {n_channels} channels, got {values}")
            if name == "std" and not all(value > 0 for value in values):
                raise ValueError(f"`std` must have numbers > 0, got {values}")
            self.register_buffer(name, th.tensor(values).reshape(1, n_channels, 1, 1))

    def forward(self, images: th.Tensor) -> th.Tensor:
        """
        :param images: pixels from 0 to 1, shape ``(batch_size, n_stack * channels, height, width)``
        :return: shape ``(batch_size, n_stack * n_outputs)``
        """
        stacks = images.unflatten(1, (self.n_stack, -1))  # (batch_size, n_stack, channels, height, width)
        is_frozen = not (stacks.requires_grad or any(parameter.requires_grad for parameter in self.module.parameters()))
        last = self._last if self._last is not None and self._last[0].device == stacks.device else None
        if is_frozen and last is not None and not th.compiler.is_compiling() and th.equal(stacks[:, :-1], last[0][:, 1:]):
            outputs = th.cat([last[1][:, 1:], self._encode(stacks[:, -1:])], dim=1)
        else:
            outputs = self._encode(stacks)
        # A step of the environments shows one new frame
        self._last = (stacks, outputs) if is_frozen and self.n_stack > 1 else None
        return outputs.flatten(start_dim=1)

    def _encode(self, stacks: th.Tensor) -> th.Tensor:
        """:return: outputs for each frame, shape ``(batch_size, n_frames, n_outputs)``"""
        frames = stacks.flatten(0, 1)
        if self.size is not None and tuple(frames.shape[2:]) != self.size:
            frames = F.interpolate(frames.float(), self.size, mode="bilinear", antialias=True)
        return self.module((frames - self.mean) / self.std).reshape(*stacks.shape[:2], -1)

    def _forget(self, *_: Any) -> None:
        self._last = None


def _check_module(trunk: _Frames, frame_shape: tuple[int, ...]) -> int:
    """:return: numbers that the module makes of a frame"""
    module = trunk.module
    module.eval()
    with th.no_grad(), th.random.fork_rng(devices=[]):  # the random numbers of the training stay as they are
        stack = th.rand(1, *frame_shape).repeat(1, trunk.n_stack, 1, 1)
        outputs = []
        for _ in range(2):
            outputs.append(trunk(stack))
            trunk._forget()
    if not th.equal(*outputs):
        raise ValueError(
            f"`module` must give the same output twice in evaluation mode, got a {type(module).__name__} that does not: "
            "a stored latent would not belong to its image"
        )
    return outputs[0].shape[1] // trunk.n_stack


def make_module(name: str, **kwargs: Any) -> nn.Module:
    """
    :param name: ``"timm:NAME"`` or ``"package.module:NAME"``
    :param kwargs: arguments of the named model, function or class
    :return: the module
    :raises ValueError: for an unknown name, or if what it names does not return a torch module
    :raises ImportError: if the package cannot be imported
    """
    package, colon, attribute = name.partition(":")
    if not (package and colon and attribute):
        raise ValueError(f'`module` must be a torch module, "timm:NAME" or "package.module:NAME", got {name!r}')
    try:
        library = importlib.import_module(package)
    except (ImportError, RuntimeError) as error:  # RuntimeError: timm with a torchvision that was built for another torch
        remedy = f"is {package} installed?"
        if package == "timm":
            remedy = 'pip install "sb3_seer[pretrained]", with the torchvision that was built for your torch'
        raise ImportError(f"`module` {name!r} needs {package}, which cannot be imported ({error}): {remedy}") from error
    if package == "timm":
        if attribute not in library.list_models():
            similar = ", ".join(library.list_models(f"*{attribute[:6]}*")[:10]) or "see timm.list_models()"
            raise ValueError(f"`module` must be a model of timm {library.__version__}, got {attribute!r}. Similar: {similar}")
        return library.create_model(attribute, pretrained=False, **{"num_classes": 0, **kwargs})
    if not hasattr(library, attribute):
        raise ValueError(f"`module` must name a function or class in {library}, got {attribute!r}")
    module = getattr(library, attribute)(**kwargs)
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"`module` must name what returns a torch module, got {name!r}, which returns a {type(module).__name__}"
        )
    return module


def load_weights(module: nn.Module, path: str | pathlib.Path) -> None:
    """
    Load weights after checking all names and shapes. Weights that the module does not have, as a classifier's, are left out.

    :param module: changed in place
    :param path: file of a ``state_dict``
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if it is not such a file; if a weight is missing there, or has another shape
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"`weights` must be a file, got {str(path)!r}")
    load_safetensors = importlib.import_module("safetensors.torch").load_file if path.suffix == ".safetensors" else None
    try:
        saved = th.load(path, map_location="cpu", weights_only=True) if load_safetensors is None else load_safetensors(path)
    except Exception as error:  # torch and safetensors have several of their own
        raise ValueError(f"`weights` must be the file of a state_dict, got {str(path)!r}: {error}") from error
    if not isinstance(saved, Mapping):
        raise ValueError(f"`weights` must be the file of a state_dict, got {str(path)!r} with a {type(saved).__name__}")
    weights = module.state_dict()
    for name, tensor in weights.items():
        if name not in saved:
            raise ValueError(f"`weights` must have all weights of the module, got {str(path)!r} without {name}")
        if saved[name].shape != tensor.shape:
            there, here = tuple(saved[name].shape), tuple(tensor.shape)
            raise ValueError(f"`weights` must fit the module, got {str(path)!r} with {name} of {there}, and {here} here")
    module.load_state_dict({name: saved[name] for name in weights})

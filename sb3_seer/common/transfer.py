"""Weights of a saved model, for a new one."""

import os
import pathlib
from typing import Any

import torch as th
from stable_baselines3.common.save_util import load_from_zip_file
from torch import nn

from sb3_seer.common.policies import SEERPolicy

PRETRAINED_PARTS = ("encoder", "policy")


def load_pretrained(policy: SEERPolicy, path: str | pathlib.Path, part: str) -> None:
    """
    Copy weights of a saved model, after checking the shapes of all of them. Nothing else of the file is used: no
    hyperparameters, no optimizer state, no entropy coefficient.

    The encoder of each network comes from the network of the same name in the file, or else (a Q-network's encoder, for a
    quantile network) from its critic or its first network. Weights that actor and critic share come from the critic.

    :param policy: policy to copy to
    :param path: path of a model that an SB3 algorithm saved
    :param part: ``"encoder"`` for the encoders of all networks, or ``"policy"`` for all networks
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if the file has no model with an encoder; if a weight is missing or has another shape there, or if
        networks share a weight here but not there. The policy keeps its weights then
    """
    if not any(os.path.isfile(file) for file in (str(path), f"{path}.zip")):
        raise FileNotFoundError(f"`pretrained_encoder` must be the path of a saved model, got {str(path)!r}")
    _, parameters, _ = load_from_zip_file(path, load_data=False, device=policy.device)
    saved: Any = parameters.get("policy", {})
    networks = [name for name in dict.fromkeys(map(_network, saved)) if name and not name.endswith("_target")]
    if not networks:
        raise ValueError(
            "`pretrained_encoder` must be a saved model of an off-policy algorithm with a features extractor, "
            f"got {str(path)!r}"
        )

    saved = {name: value for name, value in saved.items() if isinstance(value, th.Tensor)}  # a module may have more state
    weights = _tensors(policy)
    if part == "encoder":
        encoder = _encoder_tensors(policy)
        weights = {name: tensor for name, tensor in weights.items() if tensor in encoder}
    problem = f"The {part} of {str(path)!r} has another architecture"
    sources: dict[th.Tensor, th.Tensor] = {}
    for name, tensor in sorted(weights.items(), key=lambda item: _network(item[0]) != "critic"):
        network = _network(name)
        if part == "encoder" and network not in networks:
            network = "critic" if "critic" in networks else networks[0]
        source = name.replace(_network(name), network, 1)
        if source not in saved or saved[source].shape != tensor.shape:
            shapes = {key: tuple(value.shape) for key, value in saved.items() if _network(key) == network}
            there = f"{source} is {shapes[source]}" if source in saved else f"{source} is not among {shapes or networks}"
            raise ValueError(f"{problem}: {there} there, and {name} is {tuple(tensor.shape)} here")
        if part == "policy" and not th.equal(sources.get(tensor, saved[source]), saved[source]):
            raise ValueError(f"{problem}: networks of this policy share {name}, those in the file do not")
        sources.setdefault(tensor, saved[source])

    with th.no_grad():
        for tensor, loaded in sources.items():
            tensor.copy_(loaded)
    if part == "encoder":
        policy.copy_to_targets()


def _network(name: str) -> str:
    """:return: the network of a weight of a features extractor, "" for other weights"""
    network, extractor, _ = name.partition(".features_extractor.")
    return network if extractor else ""


def _encoder_tensors(policy: SEERPolicy) -> set[th.Tensor]:
    """:return: the tensors that the freeze takes, of the networks with their own latent"""
    modules = [module for network in policy.encoder_networks for module in network.encoder_modules()]
    return {tensor for module in modules for tensor in _tensors(module).values()}


def _tensors(module: nn.Module) -> dict[str, th.Tensor]:
    """:return: the weights and buffers themselves, to see which are shared, by name"""
    return {name: value for name, value in module.state_dict(keep_vars=True).items() if isinstance(value, th.Tensor)}

"""A run of RL Zoo with checkpoints: its models, fresh episodes, and what the layers of a network put out."""

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.policies import BaseModel
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn
from tqdm import tqdm

from sb3_seer.common.encoding import batch_size
from sb3_seer.common.observations import image_spaces, map_parts
from sb3_seer.common.policies import SEERPolicy
from sb3_seer.common.type_aliases import Observations
from sb3_seer.plots import Run

BATCH_SIZE = 64
MAX_SIZE = 64  # numbers in an array of quantities: larger ones are images
N_POSITIONS = 2  # of a feature map of each observation, as samples of a convolution


@dataclass(frozen=True)
class Episodes:
    """
    Steps of fresh episodes.

    :param observations: shape ``(n, *obs_shape)``; of ``Dict`` observations, by key
    :param actions: shape ``(n, *action_shape)``
    :param quantities: numbers that belong to each observation, by name, shape ``(n,)``: of its ``info``, and of the
        observation that the innermost environment gave, if this is not an image
    """

    observations: Observations
    actions: np.ndarray
    quantities: dict[str, np.ndarray]


class AnalysedRun:
    """
    :param folder: log folder of ``python -m rl_zoo3.train --save-freq <steps>``: ``logs/<algorithm>/<environment>_<number>``
    :raises ValueError: if it has no checkpoints, or the folder above is not an algorithm of RL Zoo
    :raises ImportError: without RL Zoo
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from rl_zoo3 import ALGOS
        except ImportError as error:
            raise ImportError('The analysis needs RL Zoo: pip install "sb3_seer[zoo]"') from error
        self.folder = Path(folder)
        self.files = {
            int(match[1]): file
            for file in self.folder.glob("*.zip")
            if (match := re.fullmatch(r".*_(\d+)_steps", file.stem)) is not None
        }
        self.steps = sorted(self.files)
        if not self.files:
            raise ValueError(f"{folder} has no checkpoints (rl_model_<steps>_steps.zip). Train with --save-freq <steps>")
        algorithm = Run(self.folder).algorithm
        if algorithm not in ALGOS:
            raise ValueError(f"The folder above {folder} must be one of {', '.join(ALGOS)}, got {algorithm}")
        self.algorithm_class = ALGOS[algorithm]

    def load(self, step: int) -> Any:
        """
        :param step: of a checkpoint, one of ``steps``
        :return: its model, in evaluation mode, without the noise of noisy layers
        """
        model: Any = self.algorithm_class.load(self.files[step], device="cpu", buffer_size=1, verbose=0)
        model.policy.set_training_mode(False)
        _set_noise(model, enabled=False)
        return model

    @cached_property
    def _settings(self) -> tuple[str, dict[str, Any], dict[str, Any], str]:
        """:return: id of the environment, its arguments, hyperparameters and their folder, as RL Zoo has written them"""
        from rl_zoo3.utils import get_saved_hyperparams

        run = Run(self.folder)
        args, folder = run.args, str(self.folder / run.environment)
        if not args:
            raise ValueError(f"{self.folder} must be the log folder of a run of RL Zoo, with {run.environment}/args.yml")
        packages = list(args.get("gym_packages") or ())  # they make the environment known, as in RL Zoo's enjoy
        if args["env"].startswith("dm_control/"):
            packages.append("sb3_seer.envs")
        for package in packages:
            importlib.import_module(package)
        hyperparams, _ = get_saved_hyperparams(folder, test_mode=True)
        env_kwargs = hyperparams.pop("env_kwargs", {})
        return args["env"], args["env_kwargs"] or env_kwargs, hyperparams, folder

    def play(self, n_steps: int, seed: int = 0) -> Episodes:
        """
        :param n_steps: steps to play with the last checkpoint, which acts as in training, but without action noise
        :param seed: of the environment
        :return: the steps, without the first of each episode, which have no ``info``
        :raises ValueError: if 1,000 episodes in a row end after one step
        """
        from rl_zoo3.utils import create_test_env

        env_id, env_kwargs, hyperparams, folder = self._settings
        env: Any = create_test_env(
            env_id, 1, folder, seed, should_render=False, hyperparams=dict(hyperparams), env_kwargs=env_kwargs
        )
        assert isinstance(env.unwrapped, DummyVecEnv)
        recorder, model = _record(env.unwrapped.envs[0]), self.load(self.steps[-1])
        _set_noise(model, enabled=True)
        observations: list[Any] = []
        actions, numbers = [], []
        obs, info, n_short = env.reset(), None, 0
        with tqdm(total=n_steps, desc="episodes", delay=2) as bar:
            while len(observations) < n_steps:
                action, _ = model.predict(obs, deterministic=False)
                if info is not None:
                    observations.append(map_parts(lambda part: part[0].copy(), obs))
                    actions.append(action[0])
                    numbers.append(_numbers("", {**info, **recorder.raw()}))
                    bar.update()
                n_short = n_short + 1 if info is None else 0
                if n_short == 1001:
                    raise ValueError(f"Episodes of {env_id} must have more than one step, got 1,000 without a second one")
                obs, _, dones, infos = env.step(action)
                info = None if dones[0] else infos[0]
        env.close()
        names = [name for name in numbers[0] if all(name in step for step in numbers)]
        quantities = {name: np.array([step[name] for step in numbers]) for name in names}
        return Episodes(
            map_parts(lambda *parts: np.stack(parts), *observations),
            np.stack(actions),
            {name: values for name, values in quantities.items() if values.std() > 0},
        )


def _set_noise(model: Any, enabled: bool) -> None:
    for module in model.policy.modules():
        if hasattr(module, "noise_enabled"):
            module.noise_enabled = enabled


class _Recorder(gym.Wrapper):
    """Keeps the newest observation of the innermost environment."""

    obs: Any = None

    def reset(self, **kwargs: Any) -> Any:
        self.obs, info = self.env.reset(**kwargs)
        return self.obs, info

    def step(self, action: Any) -> Any:
        self.obs, *rest = self.env.step(action)
        return self.obs, *rest

    def raw(self) -> dict[str, Any]:
        """:return: the newest observation by key"""
        return self.obs if isinstance(self.obs, dict) else {"observation": self.obs}


def _record(env: Any) -> _Recorder:
    """Put a recorder around the innermost environment (a ``Monitor`` is around it)."""
    while env.env is not env.unwrapped:
        env = env.env
    env.env = _Recorder(env.env)
    return env.env


def _numbers(name: str, value: Any) -> dict[str, float]:
    """:return: the numbers in an observation or an ``info``, by name"""
    if isinstance(value, dict):
        prefix = f"{name}." if name else ""
        return {key: number for part in value for key, number in _numbers(f"{prefix}{part}", value[part]).items()}
    if isinstance(value, (int, float, np.ndarray, np.generic)):
        array = np.asarray(value)
        if array.dtype.kind in "biuf" and array.size <= MAX_SIZE:
            flat = array.ravel().astype(float).tolist()
            return {name: flat[0]} if array.ndim == 0 or len(flat) == 1 else {f"{name}[{i}]": x for i, x in enumerate(flat)}
    return {}


# ---- networks ----


def latents(model: Any, observations: Observations) -> np.ndarray:
    """
    :param model: a SEER algorithm, or any with a features extractor
    :param observations: batch of observations
    :return: latents of its first network, or else its features, shape ``(n, latent_dim)``
    """
    outputs = []
    for batch in _batches(observations):
        with th.no_grad():
            if isinstance(model.policy, SEERPolicy):
                output = model.policy.encode_observations(batch)[:, 0]
            else:
                network = next(iter(_networks(model).values()))
                output = network.extract_features(model.policy.obs_to_tensor(batch)[0], network.features_extractor)
        outputs.append(output.numpy())
    return np.concatenate(outputs).astype(np.float64)


def layer_samples(model: Any, episodes: Episodes) -> dict[str, np.ndarray]:
    """
    :param model: an algorithm
    :param episodes: what its networks see
    :return: what each layer with weights puts out (before the activation), by its name, shape ``(n_samples, n_features)``. The
        samples of a convolution are random positions in its feature maps, the same ones for each model
    """
    samples: dict[str, list[np.ndarray]] = {}

    def keep(name: str, output: th.Tensor) -> None:
        if output.ndim == 4:
            output = output.flatten(2).transpose(1, 2)  # (batch_size, height * width, channels)
        if output.ndim == 3:
            positions = np.random.default_rng(len(samples.get(name, ()))).integers(
                output.shape[1], size=(len(output), N_POSITIONS)
            )
            output = output[th.arange(len(output))[:, None], th.as_tensor(positions)].flatten(0, 1)
        samples.setdefault(name, []).append(output.detach().double().numpy().copy())

    actions = episodes.actions
    if isinstance(model.action_space, gym.spaces.Box):
        actions = model.policy.scale_action(actions)
    seen: set[str] = set()

    def keep_first(name: str, layer: nn.Module, output: Any) -> None:
        # Several networks may share a layer
        if name not in seen and any(True for _ in layer.parameters(recurse=False)) and isinstance(output, th.Tensor):
            seen.add(name)
            keep(name, output)

    starts = range(0, len(actions), BATCH_SIZE)
    with _watching(model, keep_first):
        for start, batch in zip(starts, _batches(episodes.observations), strict=True):
            seen.clear()
            tensors, some = model.policy.obs_to_tensor(batch)[0], th.as_tensor(actions[start : start + BATCH_SIZE]).float()
            with th.no_grad():
                for name, network in _networks(model).items():
                    network(tensors, *([some] if name == "critic" else []))
    return {name: np.concatenate(batches) for name, batches in samples.items()}


def feature_maps(model: Any, observations: Observations, layer: str | None = None) -> np.ndarray:
    """
    :param model: an algorithm
    :param observations: a few observations
    :param layer: name of a layer, None for the last one of its features extractor that puts out feature maps
    :return: shape ``(n, channels, height, width)``
    :raises ValueError: if there is no such layer
    """
    found: dict[str, np.ndarray] = {}

    def keep(name: str, _: nn.Module, output: Any) -> None:
        if isinstance(output, th.Tensor) and output.ndim == 4:
            maps = output.detach().float().numpy().copy()
            # A pretrained encoder takes each frame of a stack on its own: the newest is the one that is shown
            found[name] = maps.reshape(n, -1, *maps.shape[1:])[:, -1]

    n = batch_size(observations)
    network = next(iter(_networks(model).values()))
    with _watching(model, keep), th.no_grad():
        network.extract_features(model.policy.obs_to_tensor(observations)[0], network.features_extractor)
    if not found or (layer is not None and layer not in found):
        raise ValueError(f"`layer` must be one of {', '.join(found)}, got {layer!r}")
    return found[layer or list(found)[-1]]


def newest_frames(model: Any, observations: Observations) -> np.ndarray:
    """
    :param model: an algorithm
    :param observations: batch of observations
    :return: the newest frame of their (last) image, cropped as the network sees it, shape ``(n, height, width, 1 or 3)``
    :raises ValueError: if they have no images
    """
    if not image_spaces(model.observation_space):
        raise ValueError(f"`observations` must have images, got {model.observation_space}")
    tensors = model.policy.obs_to_tensor(observations)[0]
    images = model.policy.center_crop(tensors) if isinstance(model.policy, SEERPolicy) else tensors
    if isinstance(images, dict):
        images = images[list(image_spaces(model.observation_space))[-1]]
    n_channels = images.shape[1] // getattr(model, "n_stack", 1)
    n_channels = n_channels if n_channels in (1, 3) else 1
    return images[:, -n_channels:].permute(0, 2, 3, 1).numpy()


def _networks(model: Any) -> dict[str, Any]:
    """:return: the networks that learn by name, a critic first"""
    networks = {name: child for name, child in model.policy.named_children() if isinstance(child, BaseModel)}
    if not networks:
        raise ValueError(f"`model` must be an off-policy algorithm, got {type(model).__name__}")
    return {name: networks[name] for name in sorted(networks, key="critic".__ne__) if not name.endswith("_target")}


def _batches(observations: Observations) -> Iterator[Observations]:
    for start in range(0, batch_size(observations), BATCH_SIZE):
        yield map_parts(lambda part: part[start : start + BATCH_SIZE], observations)  # noqa: B023


@contextmanager
def _watching(model: Any, watch: Any) -> Iterator[None]:
    """Context in which ``watch(name, layer, output)`` is called for each layer that runs."""
    layers: dict[nn.Module, str] = {}
    for name, network in _networks(model).items():
        for part, layer in network.named_modules(prefix=name):
            if not any(True for _ in layer.children()):
                layers.setdefault(layer, part)  # several networks may share it
    handles = [
        layer.register_forward_hook(lambda layer, _, output, name=name: watch(name, layer, output))
        for layer, name in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

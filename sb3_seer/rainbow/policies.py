from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.dqn.policies import CnnPolicy as SB3CnnPolicy
from stable_baselines3.dqn.policies import DQNPolicy, QNetwork
from stable_baselines3.dqn.policies import MultiInputPolicy as SB3MultiInputPolicy
from torch import nn

from sb3_seer.common.utils import check_positive_int
from sb3_seer.rainbow.noisy import NoisyLinear, reset_noise


class RainbowNetwork(QNetwork):
    """
    Action-value network for Rainbow.

    :param observation_space: Observation space
    :param action_space: Action space
    :param features_extractor: features extractor
    :param features_dim: numbers in the features
    :param net_arch: hidden layers, of each of the two streams if ``dueling``
    :param activation_fn: Activation function
    :param normalize_images: Whether to normalize images or not, dividing by 255.0 (True by default)
    :param n_atoms: atoms of the value distributions, 1 for plain values
    :param v_min: the lowest atom
    :param v_max: the highest atom
    :param dueling: whether one stream gives the value of the state, and another the advantages of the actions
    :param noisy: whether the linear layers after the features extractor are noisy
    :param sigma0: initial scale of the noise
    :raises ValueError: for an invalid parameter
    """

    support: th.Tensor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Discrete,
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        net_arch: list[int] | None = None,
        activation_fn: type[nn.Module] = nn.ReLU,
        normalize_images: bool = True,
        n_atoms: int = 51,
        v_min: float = -10.0,
        v_max: float = 10.0,
        dueling: bool = True,
        noisy: bool = True,
        sigma0: float = 0.5,
    ) -> None:
        check_positive_int("n_atoms", n_atoms)
        if n_atoms > 1 and not -float("inf") < v_min < v_max < float("inf"):
            raise ValueError(f"`v_min` and `v_max` must be finite, v_min < v_max, got {v_min} and {v_max}")
        if noisy and not 0.0 < sigma0 < float("inf"):
            raise ValueError(f"`sigma0` must be finite and > 0, got {sigma0}")
        # QNetwork would build its own network: skip its constructor
        super(QNetwork, self).__init__(
            observation_space, action_space, features_extractor=features_extractor, normalize_images=normalize_images
        )
        self.net_arch = [64, 64] if net_arch is None else net_arch
        self.activation_fn = activation_fn
        self.features_dim = features_dim
        self.n_atoms, self.v_min, self.v_max = n_atoms, v_min, v_max
        self.dueling, self.noisy, self.sigma0 = dueling, noisy, sigma0
        self.n_actions = int(self.action_space.n)
        self.register_buffer("support", th.linspace(v_min, v_max, n_atoms), persistent=False)
        if dueling:
            self.value_net = self._make_mlp(n_atoms)
            self.advantage_net = self._make_mlp(self.n_actions * n_atoms)
        else:
            self.q_net = self._make_mlp(self.n_actions * n_atoms)

    def _make_mlp(self, output_dim: int) -> nn.Sequential:
        layers = create_mlp(self.features_dim, output_dim, self.net_arch, self.activation_fn)
        if self.noisy:
            layers = [
                NoisyLinear(layer.in_features, layer.out_features, self.sigma0) if isinstance(layer, nn.Linear) else layer
                for layer in layers
            ]
        return nn.Sequential(*layers)

    def logits(self, features: th.Tensor) -> th.Tensor:
        """
        :param features: features, shape ``(batch_size, features_dim)``
        :return: logits of the value distributions, shape ``(batch_size, n_actions, n_atoms)``; with one atom, the values
        """
        if not self.dueling:
            return self.q_net(features).view(-1, self.n_actions, self.n_atoms)
        value = self.value_net(features).view(-1, 1, self.n_atoms)
        advantages = self.advantage_net(features).view(-1, self.n_actions, self.n_atoms)
        # Wang et al. 2016, https://arxiv.org/abs/1511.06581, equation 9
        return value + advantages - advantages.mean(dim=1, keepdim=True)

    def q_values(self, logits: th.Tensor) -> th.Tensor:
        """
        :param logits: shape ``(batch_size, n_actions, n_atoms)``
        :return: the means of the distributions, shape ``(batch_size, n_actions)``
        """
        if self.n_atoms == 1:
            return logits.squeeze(dim=2)
        return logits.softmax(dim=2) @ self.support

    def forward(self, obs: PyTorchObs) -> th.Tensor:
        """
        Predict the q-values.

        :param obs: Observation
        :return: The estimated Q-Value for each action.
        """
        return self.q_values(self.logits(self.extract_features(obs, self.features_extractor)))

    def reset_noise(self) -> None:
        """Draw new noise for all noisy layers."""
        reset_noise(self._noisy_layers())

    @contextmanager
    def without_noise(self) -> Iterator[None]:
        """Context in which the weights are their means. The noise itself does not change."""
        layers = self._noisy_layers()
        for layer in layers:
            layer.noise_enabled = False
        try:
            yield
        finally:
            for layer in layers:
                layer.noise_enabled = True

    def _noisy_layers(self) -> list[NoisyLinear]:
        return [module for module in self.modules() if isinstance(module, NoisyLinear)]

    def _predict(self, observation: PyTorchObs, deterministic: bool = True) -> th.Tensor:
        if deterministic:
            with self.without_noise():
                return super()._predict(observation)
        self.reset_noise()
        return super()._predict(observation)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        for name in ("n_atoms", "v_min", "v_max", "dueling", "noisy", "sigma0"):
            data[name] = getattr(self, name)
        return data


class RainbowPolicy(DQNPolicy):
    """
    Policy class with Q-Value Net and target net for Rainbow.

    :param args: as for SB3's ``DQNPolicy``
    :param n_atoms: atoms of the value distributions, 1 for plain values
    :param v_min: the lowest atom
    :param v_max: the highest atom
    :param dueling: whether one stream gives the value of the state, and another the advantages of the actions;
        each has the hidden layers of ``net_arch``
    :param noisy: whether the linear layers after the features extractor are noisy
    :param sigma0: initial scale of the noise
    :param kwargs: as for SB3's ``DQNPolicy``, with the same defaults
    """

    q_net: RainbowNetwork
    q_net_target: RainbowNetwork

    def __init__(
        self,
        *args: Any,
        n_atoms: int = 51,
        v_min: float = -10.0,
        v_max: float = 10.0,
        dueling: bool = True,
        noisy: bool = True,
        sigma0: float = 0.5,
        **kwargs: Any,
    ) -> None:
        # Before the constructor of DQNPolicy, which builds the networks
        self.rainbow_kwargs = dict(n_atoms=n_atoms, v_min=v_min, v_max=v_max, dueling=dueling, noisy=noisy, sigma0=sigma0)
        super().__init__(*args, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        self.net_args.update(self.rainbow_kwargs)
        super()._build(lr_schedule)

    def make_q_net(self) -> RainbowNetwork:
        # Make sure we always have separate networks for features extractors etc
        return RainbowNetwork(**self._update_features_extractor(self.net_args)).to(self.device)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), **self.rainbow_kwargs}


MlpPolicy = RainbowPolicy


class CnnPolicy(RainbowPolicy, SB3CnnPolicy):
    """Policy class for Rainbow when using images as input. Parameters as for ``RainbowPolicy``."""


class MultiInputPolicy(RainbowPolicy, SB3MultiInputPolicy):
    """Policy class for Rainbow when using dict observations as input. Parameters as for ``RainbowPolicy``."""

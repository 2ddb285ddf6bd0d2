"""The floating point operations of a training, counted from its networks as in the papers."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from sb3_contrib.qrdqn import QRDQN
from stable_baselines3.common.policies import BaseModel, BasePolicy, ContinuousCritic
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.dqn import DQN
from stable_baselines3.sac import SAC
from torch import nn

from sb3_seer.common.callbacks import freeze_step
from sb3_seer.common.extractors import split
from sb3_seer.common.policies import SEERPolicy

# ---- the papers' formula ----


class Passes(NamedTuple):
    """
    How often a batch passes through the networks in an update.

    :param forward: F: forward
    :param backward: B: backward
    :param encoder_forward: further ones forward through the encoder alone, for a loss that ends with the freeze
    :param encoder_backward: further ones backward, likewise
    """

    forward: float
    backward: float
    encoder_forward: float = 0
    encoder_backward: float = 0


@dataclass(frozen=True)
class FlopsFormula:
    """
    How the papers estimate floating point operations (SEER, appendix; LeVER, Tables 2 and 3): a multiply-add is one of them,
    a backward pass takes twice as many as a forward pass. Acting is left out: it costs the same with and without SEER.

    :param encoder: E: of a forward pass of one observation through the part of a network that the freeze takes
    :param heads: M: the same through the rest of the networks
    :param passes: F and B: those of an update
    :param n_augmentations: K: stored copies of an observation
    :param n_networks: N: networks with a latent of their own
    """

    encoder: int
    heads: int
    passes: Passes
    n_augmentations: int = 1
    n_networks: int = 1

    def update(self, batch_size: int, frozen: bool) -> int:
        """
        :param batch_size: b, transitions in a batch
        :param frozen: whether it is an update on latents
        :return: operations of a gradient step: ``b F (E + M) + 2 b B (E + M)``, without E if frozen
        """
        forward, backward, encoder_forward, encoder_backward = self.passes
        operations = (forward + 2 * backward) * self.heads
        if not frozen:
            operations += (forward + encoder_forward + 2 * (backward + encoder_backward)) * self.encoder
        return round(batch_size * operations)

    def storing(self, n_transitions: int) -> int:
        """
        :param n_transitions: transitions that become latents, at the freeze or later
        :return: operations to encode them: E K N of each
        """
        return self.encoder * self.n_augmentations * self.n_networks * n_transitions

    @classmethod
    def of(cls, model: Any, networks: tuple[int, int] | None = None) -> "FlopsFormula":
        """
        :param model: an off-policy algorithm, see :func:`find_passes`
        :param networks: E and M if they are known; by default its networks are run once, on one observation of zeros
        :return: the formula with its numbers
        :raises ValueError: if the passes of an update are not known
        """
        passes = find_passes(model)
        if passes is None:
            raise ValueError(
                f"The passes of an update are not known of {type(model).__name__}: allowed are DQN, QRDQN, "
                "SEERSAC with images, what extends them, and algorithms with an attribute flops_passes"
            )
        return cls(
            *(networks or count_networks(model.policy)),
            passes,
            n_augmentations=getattr(model, "n_augmentations", 1),
            n_networks=model.policy.latent_shape[0] if isinstance(model.policy, SEERPolicy) else 1,
        )


def find_passes(model: Any) -> Passes | None:
    """
    The passes of an update. A class says in its attribute ``flops_passes`` if it has others than what it extends.

    * DQN, QR-DQN: F = 2, the observations through the online network and the next ones through the target; B = 1.
    * Double Q-learning (Rainbow): F = 3, as the next ones also pass through the online network. With these, the formula
      gives the 45T operations of the paper (SEER, Table 1).
    * SEERSAC: F = 3, B = 1. Of the encoder: the observations, and the next ones for the actor and for the target. Of the
      heads, the actor passes forward twice and each critic three times; each backward once, and the critics once more for
      the gradient of the actions alone. Three and one for all of them is right within 10% of the heads.
    * SEERCURL: for its contrastive loss, two more forward passes of the encoder and one backward. The released code has
      another forward pass in every second update, as it encodes the observations again for the actor.

    :param model: an off-policy algorithm
    :return: its passes; None if they are not known
    """
    if hasattr(model, "flops_passes"):
        return model.flops_passes
    if isinstance(model, SAC) and isinstance(model.policy, SEERPolicy):
        contrastive_freq = getattr(model, "cpc_update_freq", None)
        contrastive = 0 if contrastive_freq is None else 1 / contrastive_freq
        return Passes(3, 1, encoder_forward=2 * contrastive, encoder_backward=contrastive)
    if isinstance(model, DQN | QRDQN):
        return Passes(3 if getattr(model, "double_q", False) else 2, 1)
    return None


def multiply_adds(module: nn.Module, *inputs: Any) -> dict[nn.Module, int]:
    """
    Run a module, and count in its convolutions and linear layers. As in the papers' tables, biases count in linear layers
    (control, LeVER's Table 2), but not in noisy ones (Atari, Table 3) and not in convolutions.

    :param module: with whatever layers; those that are neither cost nothing, as in the papers
    :param inputs: what it takes, a batch of one
    :return: the multiply-adds of each layer that ran
    """
    counts: dict[nn.Module, int] = {}

    def count(layer: nn.Module, _: Any, output: th.Tensor) -> None:
        if isinstance(layer, nn.Linear):
            per_output = layer.in_features + (type(layer) is nn.Linear and layer.bias is not None)
        else:
            assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
            per_output = layer.weight[0].numel()
        counts[layer] = counts.get(layer, 0) + output.numel() * per_output

    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    try:
        with th.no_grad():
            module(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return counts


def count_networks(policy: BasePolicy) -> tuple[int, int]:
    """
    :param policy: of an off-policy algorithm
    :return: E and M: multiply-adds for one observation, of the encoder of one network, and of the heads of all
        networks together (targets are left out: they are the same again)
    """
    encoder = heads = 0
    training = policy.training
    policy.set_training_mode(False)  # zeros are nothing to learn from: normalisation layers would
    for name, network in policy.named_children():
        if not isinstance(network, BaseModel) or name.endswith("_target"):
            continue
        assert network.features_extractor is not None
        counts = _forward_pass(network)
        extractor = split(network.features_extractor)
        frozen = {*extractor.trunk.modules(), *extractor.projection.modules()}
        # Actor and critic have equal encoders
        encoder = sum(count for module, count in counts.items() if module in frozen)
        heads += sum(count for module, count in counts.items() if module not in frozen)
    policy.set_training_mode(training)
    return encoder, heads


def _forward_pass(network: BaseModel) -> dict[nn.Module, int]:
    space = network.observation_space
    zeros = gym.vector.utils.create_empty_array(space, n=1, fn=np.zeros)
    inputs: list[Any] = [obs_as_tensor(zeros, network.device)]  # type: ignore[arg-type]
    if isinstance(network, ContinuousCritic):
        inputs.append(th.zeros(1, get_action_dim(network.action_space), device=network.device))
    # An actor draws an action: this must not move the random numbers of the training
    with th.random.fork_rng(devices=[network.device] if network.device.type == "cuda" else []):
        return multiply_adds(network, *inputs)


def estimate_flops(model: Any, timesteps: np.ndarray) -> np.ndarray:
    """
    What ``FlopsCallback`` would have counted, from the parameters of an algorithm: for a training without the callback.

    :param model: an off-policy algorithm that was trained from step 0 on, see :func:`find_passes`
    :param timesteps: numbers of steps, shape ``(n,)``
    :return: operations until each of them, shape ``(n,)``
    :raises ValueError: if the passes of an update are not known; if ``train_freq`` is in episodes, of unknown length
    """
    formula, train_freq = FlopsFormula.of(model), model.train_freq
    if not isinstance(train_freq, TrainFreq):
        frequency, unit = train_freq if isinstance(train_freq, tuple) else (train_freq, "step")
        train_freq = TrainFreq(frequency, TrainFrequencyUnit(unit))
    if train_freq.unit != TrainFrequencyUnit.STEP:
        raise ValueError(f"train_freq: {train_freq} was given, allowed are steps: nobody knows when the episodes ended")
    rollout = train_freq.frequency * model.n_envs
    per_rollout = model.gradient_steps if model.gradient_steps >= 0 else rollout

    def n_updates(steps: np.ndarray) -> np.ndarray:
        """:return: gradient steps before these steps: some after each rollout that ends later than learning_starts"""
        return np.maximum((steps - 1) // rollout - model.learning_starts // rollout, 0) * per_rollout

    timesteps = np.asarray(timesteps)
    freeze_after = getattr(model, "freeze_after", None)
    if freeze_after is None:
        return n_updates(timesteps) * formula.update(model.batch_size, frozen=False)
    # The first step of all envs that reaches T_f
    freeze = -(-freeze_step(model, freeze_after) // model.n_envs) * model.n_envs
    before = n_updates(np.minimum(timesteps, max(freeze, 1)))
    after = n_updates(timesteps) - before
    # The step at which the encoder is frozen is stored after that
    converted = min(max(freeze - model.n_envs, 0), model.buffer_size)
    collected = (timesteps - 1) // rollout * rollout
    stored = np.where(collected < freeze, 0, converted + collected - max(freeze - model.n_envs, 0))
    return (
        before * formula.update(model.batch_size, frozen=False)
        + after * formula.update(model.batch_size, frozen=True)
        + stored * formula.storing(1)
    )


# ---- the meter ----

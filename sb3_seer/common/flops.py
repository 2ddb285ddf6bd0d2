"""
What a training costs in floating point operations, counted as in the papers (SEER, appendix; LeVER, Tables 2 and 3): a
multiply-add is one operation, a backward pass takes twice as many as a forward pass, and acting is left out, as it costs the
same with and without SEER.
"""

import csv
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from sb3_contrib.qrdqn import QRDQN
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.policies import BaseModel, BasePolicy, ContinuousCritic
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import TrainFrequencyUnit
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.dqn import DQN
from torch import nn

from sb3_seer.common.callbacks import freeze_step, walk
from sb3_seer.common.extractors import split
from sb3_seer.common.policies import SEERPolicy

# Written beside the evaluations of an EvalCallback
FLOPS_FILE = "flops.csv"

# ---- networks ----


def multiply_adds(module: nn.Module, *inputs: Any) -> dict[nn.Module, int]:
    """
    Run a module, and count in its convolutions and linear layers. As in the papers' tables, biases count in linear layers
    (control, LeVER's Table 2), but not in noisy ones (Atari, Table 3) and not in convolutions.

    :param module: all layers but convolutions and linear layers are free
    :param inputs: what it takes, a batch of one
    :return: the multiply-adds of each layer that ran
    """
    counts: dict[nn.Module, int] = {}

    def count(layer: nn.Module, _: Any, output: th.Tensor) -> None:
        per_output = layer.weight[0].numel()  # type: ignore[index]
        per_output += type(layer) is nn.Linear and layer.bias is not None
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
    :param policy: policy of an off-policy algorithm
    :return: E and M: multiply-adds for one observation, of the encoder of one network, and of the heads of all
        networks together. Target networks are left out: they cost the same again
    """
    encoder = heads = 0
    training = policy.training
    policy.set_training_mode(False)  # normalisation layers must not learn from the zeros
    for name, network in policy.named_children():
        if not isinstance(network, BaseModel) or name.endswith("_target"):
            continue
        zeros = gym.vector.utils.create_empty_array(network.observation_space, n=1, fn=np.zeros)
        inputs: list[Any] = [obs_as_tensor(zeros, network.device)]  # type: ignore[arg-type]
        if isinstance(network, ContinuousCritic):
            inputs.append(th.zeros(1, get_action_dim(network.action_space), device=network.device))
        # An actor draws an action: this must not move the random numbers of the training
        with th.random.fork_rng(devices=[network.device] if network.device.type == "cuda" else []):
            counts = multiply_adds(network, *inputs)
        assert network.features_extractor is not None
        extractor = split(network.features_extractor)
        frozen = {*extractor.trunk.modules(), *extractor.projection.modules()}
        # Actor and critic have equal encoders
        encoder = sum(count for module, count in counts.items() if module in frozen)
        heads += sum(count for module, count in counts.items() if module not in frozen)
    policy.set_training_mode(training)
    return encoder, heads


# ---- the formula ----


class Passes(NamedTuple):
    """
    Passes of a batch through the networks in a gradient step.

    :param forward: F: forward passes
    :param backward: B: backward passes
    :param encoder_forward: more forward passes of the encoder, for a loss that ends with the freeze
    :param encoder_backward: more backward passes of the encoder, for a loss that ends with the freeze
    """

    forward: float
    backward: float
    encoder_forward: float = 0
    encoder_backward: float = 0


def find_passes(model: Any) -> Passes | None:
    """
    The attribute ``flops_passes`` of an algorithm (SEERSAC, SEERCURL) comes first. Otherwise:

    * DQN, QR-DQN: F = 2, the observations through the online network and the next ones through the target; B = 1.
    * Double Q-learning (Rainbow): F = 3, as the next observations also pass through the online network. With these, the
      formula gives the 45T operations of the paper (SEER, Table 1).

    :param model: an off-policy algorithm
    :return: the passes of a gradient step, None if they are not known
    """
    if hasattr(model, "flops_passes"):
        return model.flops_passes
    if isinstance(model, DQN | QRDQN):
        return Passes(3 if getattr(model, "double_q", False) else 2, 1)
    return None


@dataclass(frozen=True)
class FlopsFormula:
    """
    The papers' formula, with the numbers of an algorithm.

    :param encoder: E: multiply-adds of one observation in the part of a network that the freeze takes
    :param heads: M: multiply-adds of one observation in the rest of the networks
    :param passes: F and B: passes of a gradient step
    :param n_augmentations: K: stored copies of an observation
    :param n_networks: N: networks with their own latent
    """

    encoder: int
    heads: int
    passes: Passes
    n_augmentations: int = 1
    n_networks: int = 1

    @classmethod
    def of(cls, model: Any, networks: tuple[int, int] | None = None) -> "FlopsFormula":
        """
        :param model: an off-policy algorithm, see :func:`find_passes`
        :param networks: E and M. If None, its networks run once, on an observation of zeros
        :return: the formula of the algorithm
        :raises ValueError: if the passes of a gradient step are not known
        """
        passes = find_passes(model)
        if passes is None:
            raise ValueError(
                "`model` must be a DQN, QRDQN, SEERSAC with images, a subclass of them or an algorithm with an attribute "
                f"`flops_passes`, got {type(model).__name__}"
            )
        n_networks = model.policy.latent_shape[0] if isinstance(model.policy, SEERPolicy) else 1
        return cls(*(networks or count_networks(model.policy)), passes, getattr(model, "n_augmentations", 1), n_networks)

    def update(self, batch_size: int, frozen: bool) -> int:
        """
        :param batch_size: b, transitions in a batch
        :param frozen: whether the update is on latents
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
        :return: operations to encode them: E K N each
        """
        return self.encoder * self.n_augmentations * self.n_networks * n_transitions


def estimate_flops(model: Any, timesteps: np.ndarray) -> np.ndarray:
    """
    The count of a ``FlopsCallback``, from the parameters of an algorithm: for a training without the callback.

    :param model: an off-policy algorithm that was trained from step 0 on, see :func:`find_passes`
    :param timesteps: numbers of steps, shape ``(n,)``
    :return: operations until each of them, shape ``(n,)``
    :raises ValueError: if the passes of a gradient step are not known; if ``train_freq`` is in episodes, of unknown length;
        if the algorithm has other settings after the freeze
    """
    formula, (frequency, unit) = FlopsFormula.of(model), model.train_freq
    if unit != TrainFrequencyUnit.STEP:
        raise ValueError(f"`train_freq` must be in steps, got {model.train_freq}. The ends of the episodes are not known")
    for name in ("batch_size_after_freeze", "gradient_steps_after_freeze"):
        if getattr(model, name, None) is not None:
            raise ValueError(f"`{name}` must be None, got {getattr(model, name)}")
    rollout = frequency * model.n_envs
    per_training = model.gradient_steps if model.gradient_steps >= 0 else rollout

    def n_updates(steps: np.ndarray) -> np.ndarray:
        """:return: gradient steps before these steps: some after each rollout that ends later than learning_starts"""
        return np.maximum((steps - 1) // rollout - model.learning_starts // rollout, 0) * per_training

    timesteps = np.asarray(timesteps)
    before, stored = n_updates(timesteps), np.zeros_like(timesteps)
    freeze_after = getattr(model, "freeze_after", None)
    if freeze_after is not None:
        # The first step of all envs that reaches T_f. It is stored after the freeze
        freeze = -(-freeze_step(model, freeze_after) // model.n_envs) * model.n_envs
        before = n_updates(np.minimum(timesteps, max(freeze, 1)))
        held = max(freeze - model.n_envs, 0)
        collected = (timesteps - 1) // rollout * rollout
        stored = np.where(collected < freeze, 0, min(held, model.buffer_size) + collected - held)
    after = n_updates(timesteps) - before
    before_each, after_each = (formula.update(model.batch_size, frozen) for frozen in (False, True))
    return before * before_each + after * after_each + stored * formula.storing(1)


# ---- the meter ----


@dataclass
class FlopsCount:
    """
    The count so far: an attribute of the algorithm, saved with it.

    :param flops: operations, by the formula
    :param seconds: time of the training, without the evaluations of an ``EvalCallback``
    :param n_updates: gradient steps that are counted
    :param frozen: whether the freeze is counted
    :param networks: E and M, see :class:`FlopsFormula`
    """

    flops: int = 0
    seconds: float = 0.0
    n_updates: int = 0
    frozen: bool = False
    networks: tuple[int, int] | None = None


class FlopsRow(NamedTuple):
    """
    A row of a ``flops.csv``.

    :param timesteps: steps of the training
    :param flops: operations until then, see :class:`FlopsFormula`
    :param seconds: time of the training until then, without the evaluations
    :param frozen: 1 if the encoder was frozen, 0 if not
    """

    timesteps: int
    flops: int
    seconds: float
    frozen: int


def read_rows(file: Path) -> list[FlopsRow]:
    """
    :param file: path of a ``flops.csv``
    :return: its rows, none if there is no such file
    :raises ValueError: if it has other columns
    """
    if not file.is_file():
        return []
    with file.open(newline="") as stream:
        header, *rows = csv.reader(stream)
    if tuple(header) != FlopsRow._fields:
        raise ValueError(f"{file} must have the columns {', '.join(FlopsRow._fields)}, got {', '.join(header)}")
    return [FlopsRow(int(row[0]), int(row[1]), float(row[2]), int(row[3])) for row in rows]


class FlopsCallback(BaseCallback):
    """
    Counts the operations of a training by the papers' formula (:class:`FlopsFormula`), and logs them as ``seer/flops``.

    Where an ``EvalCallback`` logs its evaluations, a file ``flops.csv`` is written beside them: the steps, the operations and
    the seconds (without the evaluations) until each evaluation, and until the freeze.

    A SEER algorithm attaches one by itself. Give it to ``Rainbow``, or to SB3's algorithms, to compare with them (in RL Zoo's
    YAML files: ``callback: sb3_seer.common.flops.FlopsCallback``).

    :param verbose: as for any callback
    :raises ValueError: if the passes of a gradient step are not known, see :func:`find_passes`
    """

    model: Any

    def _init_callback(self) -> None:
        if not hasattr(self.model, "flops_count"):
            self.model.flops_count = FlopsCount()
        self.formula = FlopsFormula.of(self.model, self.model.flops_count.networks)
        self.model.flops_count.networks = self.formula.encoder, self.formula.heads

    @property
    def _frozen(self) -> bool:
        return getattr(self.model, "encoder_frozen", False)

    def _on_training_start(self) -> None:
        self._n_timesteps = self.num_timesteps
        self._eval_callbacks = [child for child in walk(self.locals.get("callback")) if isinstance(child, EvalCallback)]
        self._files = [Path(callback.log_path).parent / FLOPS_FILE for callback in self._eval_callbacks if callback.log_path]
        self._n_evaluations, self._was_frozen = self._count_evaluations(), self._frozen
        self._time = time.perf_counter()
        for file in self._files:
            # Where a training is resumed, its file goes on
            rows = [row for row in read_rows(file) if row.timesteps < self.num_timesteps]
            with file.open("w", newline="") as stream:
                csv.writer(stream).writerows([FlopsRow._fields, *rows])
        self._write_row()

    def _on_rollout_start(self) -> None:
        self._count_operations()
        self._observe()

    def _on_step(self) -> bool:
        self._observe()
        return True

    def _on_training_end(self) -> None:
        self._on_rollout_start()

    def _count_operations(self) -> None:
        # Only callbacks freeze, and they run between updates: these updates are all of one stage
        count, frozen = self.model.flops_count, self._frozen
        count.flops += (self.model._n_updates - count.n_updates) * self.formula.update(self.model.batch_size, frozen)
        if frozen:
            # The freeze encodes all that is held. Later, each step is encoded
            held = self.model.replay_buffer.size() * self.model.n_envs
            count.flops += self.formula.storing(self.num_timesteps - self._n_timesteps if count.frozen else held)
        count.n_updates, count.frozen = self.model._n_updates, frozen
        self._n_timesteps = self.num_timesteps

    def _observe(self) -> None:
        now, n_evaluations = time.perf_counter(), self._count_evaluations()
        evaluated, froze = n_evaluations > self._n_evaluations, self._frozen and not self._was_frozen
        # The time of a freeze counts, even if there was an evaluation next to it
        if froze or not evaluated:
            self.model.flops_count.seconds += now - self._time
        self._time, self._n_evaluations, self._was_frozen = now, n_evaluations, self._frozen
        self.logger.record("seer/flops", self.model.flops_count.flops)
        if froze or evaluated:
            self._write_row()

    def _count_evaluations(self) -> int:
        return sum(len(callback.evaluations_timesteps) for callback in self._eval_callbacks)

    def _write_row(self) -> None:
        count = self.model.flops_count
        row = FlopsRow(self.num_timesteps, count.flops, round(count.seconds, 3), int(self._frozen))
        for file in self._files:
            with file.open("a", newline="") as stream:
                csv.writer(stream).writerow(row)

"""
What a training costs in floating point operations, counted as in the papers (SEER, appendix; LeVER, Tables 2 and 3): a
multiply-add is one operation, a backward pass takes twice as many as a forward pass, and acting is left out, as it costs the
same with and without SEER.
"""

import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch as th
from gymnasium import spaces
from sb3_contrib.qrdqn import QRDQN
from stable_baselines3 import DQN, SAC
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.policies import BaseModel, BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim, preprocess_obs
from torch.utils.flop_counter import FlopCounterMode

from sb3_seer.common.callbacks import iter_callbacks
from sb3_seer.common.extractors import can_split, split
from sb3_seer.common.observations import image_spaces, separate
from sb3_seer.common.save_util import open_atomic
from sb3_seer.common.utils import warn

# Written beside the evaluations of an EvalCallback
FLOPS_FILE = "flops.csv"


# ---- the formula ----


class Passes(NamedTuple):
    """
    Passes of a batch through the networks in a gradient step.

    :param forward: F: forward passes
    :param backward: B: backward passes
    :param encoder_forward: more forward passes of the encoder
    :param encoder_backward: more backward passes of the encoder
    """

    forward: float
    backward: float
    encoder_forward: float = 0
    encoder_backward: float = 0


def find_passes(model: Any) -> Passes | None:
    """
    The attribute ``flops_passes`` of an algorithm (of our actor-critic ones) comes first. Otherwise:

    * DQN, QR-DQN: F = 2, the observations through the online network and the next ones through the target; B = 1.
    * Double Q-learning (Rainbow): F = 3, as the next observations also pass through the online network. With these, the
      formula gives the 45T operations of the paper (SEER, Table 1).
    * SB3's SAC: each of its five forward passes encodes the images, and its actor's loss goes back through two encoders. With
      convolutions that actor and critic share, F = 3 and B = 1.

    :param model: an off-policy algorithm
    :return: the passes of a gradient step, None if they are not known
    """
    passes: Passes | None = getattr(model, "flops_passes", None)
    if passes is None and isinstance(model, DQN | QRDQN):
        return Passes(3 if getattr(model, "double_q", False) else 2, 1)
    if passes is None and isinstance(model, SAC):
        if getattr(model.policy, "tie_convolutions", False):
            return Passes(3, 1)
        return Passes(3, 1, 2, 0 if model.policy.share_features_extractor else 2)
    return passes


def count_networks(policy: BasePolicy) -> tuple[int, int]:
    """
    Run the networks once, on a random observation, and count in convolutions and matrix products, without biases.

    :param policy: policy of an off-policy algorithm
    :return: E and M: multiply-adds for one observation, of the encoder of one network, and of the heads of all
        networks together. Target networks are left out: they cost the same again
    """
    encoder = heads = 0
    training = policy.training
    policy.set_training_mode(False)  # normalisation layers must not learn from it
    for name, network in policy.named_children():
        if not isinstance(network, BaseModel) or name.endswith("_target"):
            continue
        space = deepcopy(network.observation_space)
        space.seed(0)
        # Of frames that differ: an encoder may run once for equal ones
        obs, _ = network.obs_to_tensor(space.sample())
        actions = [th.zeros(1, get_action_dim(network.action_space), device=policy.device)]
        extractor: Any = network.features_extractor
        images: Any = preprocess_obs(obs, space)
        if isinstance(space, spaces.Dict) and not image_spaces(space):
            images = None
        elif can_split(type(extractor), space):
            images, _ = separate(images, space)
        # An actor draws an action: this must not move the random numbers of the training
        with th.no_grad(), th.random.fork_rng(devices=[policy.device] if policy.device.type == "cuda" else []):
            try:
                with FlopCounterMode(display=False) as whole:
                    network(obs, *(actions if name == "critic" else []))
            except TypeError as error:  # a network of a user's own, with other inputs
                warn(f"Operations of {name} are not counted: {error}")
                continue
            with FlopCounterMode(display=False) as part:
                if images is not None:
                    split(extractor).projection(split(extractor).trunk(images))
        encoder = part.get_total_flops() // 2
        heads += whole.get_total_flops() // 2 - encoder
    policy.set_training_mode(training)
    return encoder, heads


class FlopsFormula(NamedTuple):
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
        :param networks: E and M. If None, they are counted
        :return: the formula of the algorithm
        :raises ValueError: if the passes of a gradient step are not known
        """
        passes = find_passes(model)
        if passes is None:
            raise ValueError(f"`model` must be a DQN, QRDQN or SAC, or have `flops_passes`, got {type(model).__name__}")
        n_networks, _ = getattr(model.policy, "latent_shape", (1, 0))
        networks = networks or count_networks(model.policy)
        return cls(*networks, passes, getattr(model, "n_augmentations", 1), n_networks)

    def update(self, batch_size: int, frozen: bool) -> int:
        """
        :param batch_size: b, transitions in a batch
        :param frozen: whether the update is on latents
        :return: operations of a gradient step: ``b F (E + M) + 2 b B (E + M)``, without E if frozen
        """
        forward, backward, encoder_forward, encoder_backward = self.passes
        heads = (forward + 2 * backward) * self.heads
        encoder = (forward + encoder_forward + 2 * (backward + encoder_backward)) * self.encoder
        return round(batch_size * (heads if frozen else heads + encoder))

    def storing(self, n_transitions: int) -> int:
        """
        :param n_transitions: transitions that become latents, at the freeze or later
        :return: operations to encode them: E K N each
        """
        return self.encoder * self.n_augmentations * self.n_networks * n_transitions


# ---- the meter ----


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


@dataclass
class FlopsCount:
    """
    The count so far: an attribute of the algorithm, saved with it.

    :param flops: operations, by the formula
    :param seconds: time of the training, without the evaluations of an ``EvalCallback``
    :param n_updates: gradient steps that are counted
    :param frozen: whether the freeze is counted
    :param networks: E and M, see :class:`FlopsFormula`
    :param rows: of the ``flops.csv``
    """

    flops: int = 0
    seconds: float = 0.0
    n_updates: int = 0
    frozen: bool = False
    networks: tuple[int, int] | None = None
    rows: tuple[FlopsRow, ...] = ()


class FlopsCallback(BaseCallback):
    """
    Counts the operations of a training by the papers' formula (:class:`FlopsFormula`), and logs them as ``seer/flops``.

    Where an ``EvalCallback`` logs its evaluations, a file ``flops.csv`` is written beside them: the steps, the operations and
    the seconds (without the evaluations) until each evaluation, and until the freeze.

    The SEER algorithms of this package attach one by themselves. Give it to ``Rainbow``, or to SB3's SAC, DQN and QR-DQN, to
    compare with them (in RL Zoo's YAML files: ``callback: sb3_seer.common.flops.FlopsCallback``).

    :param verbose: as for any callback
    :raises ValueError: if the passes of a gradient step are not known, see :func:`find_passes`; inside of a callback that
        would not call it at each step
    """

    model: Any

    def _init_callback(self) -> None:
        if self.parent is not None:
            name = type(self.parent).__name__
            raise ValueError(f"A FlopsCallback must be given to learn() itself, got one inside of {name}")
        self.model.flops_count = self.count = getattr(self.model, "flops_count", FlopsCount())
        self.formula = FlopsFormula.of(self.model, self.count.networks)
        self.count.networks = self.formula.encoder, self.formula.heads
        self._evaluators: list[EvalCallback] = []
        self._start()

    def _start(self) -> None:
        self._n_timesteps, self._time = self.model.num_timesteps, time.perf_counter()
        self._n_evaluations, self._was_frozen = -1, self._is_frozen()  # the first step writes a row

    def _is_frozen(self) -> bool:
        return getattr(self.model, "encoder_frozen", False)

    def _on_training_start(self) -> None:
        self._evaluators = [child for child in iter_callbacks(self.locals.get("callback")) if isinstance(child, EvalCallback)]
        self._start()
        self._on_step()

    def _on_rollout_start(self) -> None:
        # Only callbacks freeze, and they run between updates: these updates are all of one stage
        count, frozen = self.count, self._is_frozen()
        count.flops += (self.model._n_updates - count.n_updates) * self.formula.update(self.model.batch_size, frozen)
        if frozen:
            # The freeze encodes all that is held. Later, each step is encoded
            held = self.model.replay_buffer.size() * self.model.n_envs
            count.flops += self.formula.storing(self.num_timesteps - self._n_timesteps if count.frozen else held)
        count.n_updates, count.frozen, self._n_timesteps = self.model._n_updates, frozen, self.num_timesteps
        self._on_step()

    def _on_step(self) -> bool:
        count, now, frozen = self.count, time.perf_counter(), self._is_frozen()
        n_evaluations = sum(child.n_calls // child.eval_freq for child in self._evaluators if child.eval_freq > 0)
        evaluated, froze = n_evaluations != self._n_evaluations, frozen != self._was_frozen
        if not evaluated:
            count.seconds += now - self._time
        elif froze:  # of a freeze and an evaluation in one step, only the freeze counts
            count.seconds += getattr(self.model, "freeze_seconds", 0.0)
        if evaluated or froze:
            row = FlopsRow(self.num_timesteps, count.flops, round(count.seconds, 3), int(frozen))
            count.rows = (*(old for old in count.rows if old.timesteps < row.timesteps), row)
            for path in [evaluator.log_path for evaluator in self._evaluators if evaluator.log_path]:
                with open_atomic(Path(path).with_name(FLOPS_FILE)) as file:
                    file.write("".join(",".join(map(str, line)) + "\n" for line in [FlopsRow._fields, *count.rows]).encode())
        self._time, self._n_evaluations, self._was_frozen = now, n_evaluations, frozen
        self.logger.record("seer/flops", count.flops)
        return True

    def _on_training_end(self) -> None:
        self._on_rollout_start()

"""
``freeze_after="auto"``: freeze once the encoder has nearly stopped changing, and gets no better at the dynamics.

Both are measured with linear maps between latents, on transitions of the replay buffer. The distance
between weights is no measure of this: a layer can change a lot and still compute the same.
"""

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces

from sb3_seer.common.regression import linear_predictability

# The constants of the criterion: docs/guides/freeze.md says what they were chosen by
N_CHECKS = 40  # over the steps of learn()
MAX_DRIFT = 0.2
MAX_GAIN = 0.05

N_TRANSITIONS = 256  # in the batch of a check, with two observations each
MAX_COST = 0.01  # most operations of the checks, as a fraction of the updates'


class FreezeCheck(NamedTuple):
    """
    What a check has measured.

    :param drift: part of the latents that a linear map cannot predict from the latents of the last check's encoder, 0 to 1
    :param dynamics: part of the next latents that a linear map predicts from the latent and the action, 0 to 1
    :param dynamics_gain: ``dynamics`` minus the same for the last check's encoder, on the same transitions
    """

    drift: float
    dynamics: float
    dynamics_gain: float

    @property
    def is_settled(self) -> bool:
        """whether the encoder can be frozen"""
        return self.drift <= MAX_DRIFT and self.dynamics_gain <= MAX_GAIN


@dataclass
class AutoFreeze:
    """
    The criterion, and what it remembers between two checks: an attribute of the algorithm, saved with it.

    :param rng: draws the transitions. The random numbers of the training stay as they are
    :param snapshot: weights of the encoder at the last check, on the CPU
    :param flops: operations of the training until the last check, counted by a :class:`~sb3_seer.common.flops.FlopsCallback`
    :param step: the step of the last call of ``check()``, -1 before the first one
    """

    rng: np.random.Generator
    snapshot: list[dict[str, th.Tensor]] | None = None
    flops: int = 0
    step: int = -1

    def check(self, model: Any) -> FreezeCheck | None:
        """
        Compare the encoder with its snapshot, and take the next one: ``N_CHECKS`` times in ``learn()``, once there are enough
        transitions, and less often where there are too few updates to keep the cost below ``MAX_COST``.

        :param model: a SEER algorithm that stores images
        :return: what was measured, None if it is not the time or if there was no snapshot
        """
        count, cost = getattr(model, "flops_count", None), 0
        if count is not None:
            cost = 4 * N_TRANSITIONS * count.networks[0]  # two observations of each, through two encoders
        last_step, self.step = self.step, model.num_timesteps
        if not _is_time(model, last_step) or (count is not None and cost > MAX_COST * (count.flops - self.flops)):
            return None
        check = None if self.snapshot is None else self.compare(model)
        if count is not None:
            count.flops += 0 if check is None else cost
            self.flops = count.flops
        modules = model.policy.encoder_networks[0].encoder_modules()
        self.snapshot = [copy.deepcopy(module).cpu().state_dict() for module in modules]
        return check

    def compare(self, model: Any) -> FreezeCheck:
        """
        :param model: a SEER algorithm that stores images
        :return: how its encoder differs from the snapshot
        """
        assert self.snapshot is not None
        policy, buffer = model.policy, model.replay_buffer
        policy.set_training_mode(False)
        new = policy.encoder_networks[0]
        old = copy.deepcopy(new, {id(getattr(new, "optimizer", None)): None})  # without its optimizer
        for module, weights in zip(old.encoder_modules(), self.snapshot, strict=True):
            module.load_state_dict(weights)
        indices = self.rng.choice(buffer.size() * buffer.n_envs, size=N_TRANSITIONS, replace=False)
        *images, actions = buffer.images_at(indices)
        (old_now, new_now), (old_next, new_next) = (
            policy.encode_observations(part, [old, new]).cpu().double().numpy().swapaxes(0, 1) for part in images
        )
        # A linear map is fitted on both observations of a transition, or on neither
        old_all, new_all = (
            np.hstack(both).reshape(2 * N_TRANSITIONS, -1) for both in ((old_now, old_next), (new_now, new_next))
        )
        actions = _as_numbers(actions, model.action_space)
        dynamics, old_dynamics = (
            linear_predictability(now, after, actions) for now, after in ((new_now, new_next), (old_now, old_next))
        )
        return FreezeCheck(1 - linear_predictability(old_all, new_all), dynamics, dynamics - old_dynamics)


def _is_time(model: Any, last_step: int) -> bool:
    """
    :return: whether a multiple of 1 / N_CHECKS of all steps was passed since the last step, and there are updates and enough
        transitions
    """
    step, total = model.num_timesteps, model._total_timesteps
    if not 0 <= last_step < step:  # the first one, or learn() counts from 0 again
        last_step = step - model.n_envs
    is_next = step * N_CHECKS // total > last_step * N_CHECKS // total
    return is_next and model._n_updates > 0 and model.replay_buffer.size() * model.n_envs >= N_TRANSITIONS


def _as_numbers(actions: np.ndarray, space: spaces.Space) -> np.ndarray:
    """:return: discrete actions as one-hot vectors, others as they are, shape ``(n, n_numbers)``"""
    return np.eye(int(space.n))[actions[:, 0].astype(int)] if isinstance(space, spaces.Discrete) else actions

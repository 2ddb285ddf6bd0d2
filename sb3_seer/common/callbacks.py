"""Callbacks for SEER algorithms."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise, NormalActionNoise, VectorizedActionNoise

from sb3_seer.common import auto_freeze
from sb3_seer.common.utils import check_number, warn

# The range of uint8 latents is fitted on at least as many observations, once the training has seen as many
MIN_FIT_OBSERVATIONS = 256


def check_freeze_after(freeze_after: Any) -> int | float | str | None:
    """
    :param freeze_after: T_f: an integer number of steps, a float fraction of ``learn()``, ``"auto"``, or None for never
    :return: T_f, numbers as an int or float of Python
    :raises ValueError: for anything else
    """
    if freeze_after is None or (isinstance(freeze_after, str) and freeze_after == "auto"):
        return freeze_after
    if isinstance(freeze_after, (int, np.integer)) and not isinstance(freeze_after, bool) and freeze_after >= 0:
        return int(freeze_after)
    if isinstance(freeze_after, (float, np.floating)) and 0 < freeze_after <= 1:
        return float(freeze_after)
    raise ValueError(
        "`freeze_after` must be an int >= 0 (a number of steps), a float in (0, 1] (a fraction of learn()), "
        f'"auto" or None (never), got {freeze_after!r}'
    )


class FreezeEncoderCallback(BaseCallback):
    """
    Freezes the encoder of a SEER algorithm, after a number of steps, or once it has settled (``"auto"``, experimental): from
    then on the replay buffer holds latents.

    A SEER algorithm attaches one by itself when its parameter ``freeze_after`` is set. Given among the callbacks
    of ``learn()``, or in the ``callback:`` entry of RL Zoo's YAML files, it takes the place of that parameter.

    With ``"auto"``, what each check measures (:class:`~sb3_seer.common.auto_freeze.AutoFreeze`) is logged as ``seer/drift``,
    ``seer/dynamics`` and ``seer/dynamics_gain``. The bounds are fractions of all steps until the end of this ``learn()``: a
    training that goes on from a saved model has the same ones.

    :param freeze_after: T_f: an integer number of steps (``num_timesteps``), a float fraction in (0, 1] of the steps
        of ``learn()``, or ``"auto"``
    :param verbose: 1 to print a line at the freeze
    :param when: another name of ``freeze_after``: ``FreezeEncoderCallback(when="auto")``
    :param min_fraction: ``"auto"`` freezes at this fraction of the steps or later
    :param max_fraction: ``"auto"`` freezes at this fraction of the steps in any case; 1 for only once the encoder has settled
    :raises ValueError: for an invalid parameter; for an algorithm without an encoder to freeze
    """

    model: Any  # a SEER algorithm

    def __init__(
        self,
        freeze_after: int | float | str = 0.2,
        verbose: int = 0,
        when: int | float | str | None = None,
        min_fraction: float = 0.05,
        max_fraction: float = 0.5,
    ) -> None:
        super().__init__(verbose)
        if when is not None and freeze_after not in (0.2, when):
            raise ValueError(f"`freeze_after` and `when` are two names of one parameter, got {freeze_after!r} and {when!r}")
        checked = check_freeze_after(freeze_after if when is None else when)
        if checked is None:
            raise ValueError('`freeze_after` of a FreezeEncoderCallback must be an int, a float or "auto", got None')
        check_number("min_fraction", min_fraction, 0, 1)
        check_number("max_fraction", max_fraction, min_fraction, 1)
        if checked != "auto" and (min_fraction, max_fraction) != (0.05, 0.5):
            raise ValueError(f'`min_fraction` and `max_fraction` are only for "auto", got freeze_after={checked!r}')
        self.freeze_after = checked
        self.min_fraction, self.max_fraction = min_fraction, max_fraction

    def _init_callback(self) -> None:
        if not hasattr(self.model, "freeze_encoder"):
            raise ValueError(f"`model` of a FreezeEncoderCallback must be a SEER algorithm, got {type(self.model).__name__}")
        self.model._check_has_encoder()
        if not self.model.encoder_frozen:
            self.model.replay_buffer.plan().check_capacity()
        if self.freeze_after == "auto" and self.model.auto_freeze is None and not self.model.encoder_frozen:
            capacity = self.model.replay_buffer.buffer_size * self.model.n_envs
            if capacity < auto_freeze.N_TRANSITIONS:
                outcome = "never frozen" if self.max_fraction == 1 else f"frozen at max_fraction={self.max_fraction}"
                warn(
                    f'freeze_after="auto" measures {auto_freeze.N_TRANSITIONS} transitions, and buffer_size is {capacity}: '
                    f"the encoder is {outcome}"
                )
            self.model.auto_freeze = auto_freeze.AutoFreeze(np.random.default_rng(self.model.seed))

    def _on_training_start(self) -> None:
        if isinstance(self.freeze_after, float) and self.model._n_updates > 0:
            step = to_steps(self.model, self.freeze_after)
            when = "is frozen already" if self.model.encoder_frozen else f"will be frozen at step {step}"
            warn(
                f"freeze_after={self.freeze_after} is a fraction of each learn(), and this is not the first: the encoder "
                f"{when}. To train in several calls, set freeze_after to a number of steps"
            )
        elif not self.model.encoder_frozen and _restarted_counting(self.model):
            warn(
                f"freeze_after={self.freeze_after!r} is counted from the start of this learn(), after {self.model._n_updates} "
                "gradient steps before it: it must be what is left until the freeze. To go on counting, learn with "
                "reset_num_timesteps=False"
            )
        if self.freeze_after != "auto":
            self._freeze_if_due()

    def _on_step(self) -> bool:
        self._freeze_if_due()
        return True

    def _freeze_if_due(self) -> None:
        if self.model.encoder_frozen:
            return
        if isinstance(self.freeze_after, str):
            why = self._why_auto()
        else:
            why = "" if self.model.num_timesteps >= to_steps(self.model, self.freeze_after) else None
        if why is not None and self._has_range():
            self.model.freeze_encoder()
            if self.verbose >= 1:
                print(f"Encoder frozen after {self.model.num_timesteps} steps{why}")

    def _on_training_end(self) -> None:
        if self.verbose >= 1 and not self.model.encoder_frozen:
            print(f"Encoder not frozen after {self.model.num_timesteps} steps: freeze_after={self.freeze_after!r}")

    def _has_range(self) -> bool:
        """:return: whether uint8 latents have a range, or the buffer enough observations to fit it on"""
        buffer = self.model.replay_buffer
        if buffer.encoder.codec is not None:
            return True
        n_stored, n_seen = buffer.size() * buffer.n_envs, self.model.num_timesteps - buffer.n_envs
        wanted = max(min(n_seen, MIN_FIT_OBSERVATIONS, buffer.buffer_size * buffer.n_envs), 1)
        if n_stored < wanted:  # a training that was resumed without its buffer
            warn(f'The freeze waits until {wanted} observations are stored, to fit the range of latent_dtype="uint8" on')
        return n_stored >= wanted

    def _why_auto(self) -> str | None:
        """:return: why ``"auto"`` freezes now, None if it does not"""
        fraction = self.model.num_timesteps / self.model._total_timesteps
        if self.max_fraction < 1 and fraction >= self.max_fraction:
            return f": at max_fraction={self.max_fraction}"
        check = self.model.auto_freeze.check(self.model)
        if check is None:
            return None
        for name, value in check._asdict().items():
            self.logger.record(f"seer/{name}", value)
        if fraction < self.min_fraction or not check.is_settled:
            return None
        return f": drift {check.drift:.3f}, dynamics {check.dynamics:.3f} ({check.dynamics_gain:+.3f})"


class NoiseScheduleCallback(BaseCallback):
    """
    Gaussian exploration noise that falls linearly (DrQ-v2: Yarats et al. 2021, https://arxiv.org/abs/2107.09645, section 3.1).

    It replaces the ``action_noise`` of the algorithm, with a warning if there is one. In the ``callback:`` entry of RL Zoo's
    YAML files::

        callback:
          - sb3_seer.common.callbacks.NoiseScheduleCallback:
              end: 100000

    :param initial_std: standard deviation at the start, in units of scaled actions (-1 to 1)
    :param final_std: standard deviation at the end and later
    :param end: when it reaches ``final_std``: an integer number of steps (``num_timesteps``), or a float fraction in (0, 1] of
        the steps of ``learn()``
    :param verbose: as for any callback
    :raises ValueError: for another ``end``, a negative standard deviation, or actions that are not a ``Box``
    """

    def __init__(self, initial_std: float = 1.0, final_std: float = 0.1, end: int | float = 0.2, verbose: int = 0) -> None:
        super().__init__(verbose)
        check_number("initial_std", initial_std, 0)
        check_number("final_std", final_std, 0)
        if isinstance(end, np.generic):
            end = end.item()
        is_fraction = isinstance(end, float) and 0 < end <= 1
        if not is_fraction and (isinstance(end, bool | float) or end < 1):
            raise ValueError(f"`end` must be an int >= 1 (a number of steps) or a float in (0, 1] (a fraction), got {end!r}")
        self.initial_std, self.final_std, self.end = initial_std, final_std, end

    def _init_callback(self) -> None:
        if not isinstance(self.model.action_space, spaces.Box):
            raise ValueError(f"`action_space` must be a Box with a NoiseScheduleCallback, got {self.model.action_space}")

    def std(self) -> float:
        """:return: the standard deviation at this step"""
        start = self.model._num_timesteps_at_start if isinstance(self.end, float) else 0
        progress = min((self.num_timesteps - start) / (to_steps(self.model, self.end) - start), 1.0)
        return self.initial_std + progress * (self.final_std - self.initial_std)

    def _set_noise(self) -> None:
        std, shape = self.std(), self.training_env.action_space.shape or ()
        noise: ActionNoise = NormalActionNoise(np.zeros(shape), np.full(shape, std))
        if self.training_env.num_envs > 1:
            noise = VectorizedActionNoise(noise, self.training_env.num_envs)
        self.model.action_noise = noise
        self.logger.record("rollout/noise_std", std)

    def _on_training_start(self) -> None:
        if _restarted_counting(self.model):
            warn(
                f"The noise falls from {self.initial_std} again in this learn(), after {self.model._n_updates} gradient steps "
                "before it. Set initial_std and end to what is left of it, or learn with reset_num_timesteps=False"
            )
        elif isinstance(self.end, float) and self.model._num_timesteps_at_start > 0:
            warn(
                f"end={self.end} is a fraction of each learn(), and this is not the first: the noise falls from "
                f"{self.initial_std} again. To train in several calls, set end to a number of steps"
            )
        elif self.num_timesteps == 0 and self.model.action_noise is not None:
            warn(f"NoiseScheduleCallback replaces action_noise={self.model.action_noise}")
        self._set_noise()

    def _on_step(self) -> bool:
        self._set_noise()
        return True


def to_steps(model: Any, when: int | float) -> int:
    """
    :param model: an algorithm, whose ``learn()`` was called
    :param when: an integer number of steps, or a float fraction of that ``learn()``
    :return: the number of steps
    """
    if isinstance(when, int):
        return when
    start, end = model._num_timesteps_at_start, model._total_timesteps
    return start + max(round(when * (end - start)), 1)


def _restarted_counting(model: Any) -> bool:
    """:return: whether ``learn()``, which was just called, counts steps from 0 again, though the model was trained before"""
    return bool(model.num_timesteps == 0 and model._n_updates > 0)


def iter_callbacks(callback: Any) -> Iterator[BaseCallback]:
    """
    :param callback: a callback, or anything else
    :return: the callback, and all callbacks that it calls
    """
    if not isinstance(callback, BaseCallback):
        return
    yield callback
    callbacks = getattr(callback, "callbacks", [])
    children = list(callbacks) if isinstance(callbacks, list | tuple) else []  # a user's attribute may be anything
    children += [getattr(callback, name, None) for name in ("callback", "callback_on_new_best")]
    for child in children:
        yield from iter_callbacks(child)


def has_callback(callbacks: Iterable[BaseCallback], callback_class: type[BaseCallback]) -> bool:
    """:return: whether one of the callbacks, or one that they call, is of a class"""
    return any(isinstance(child, callback_class) for callback in callbacks for child in iter_callbacks(callback))

"""Callbacks for SEER algorithms."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback


def check_freeze_after(freeze_after: Any) -> int | float | None:
    """
    :param freeze_after: T_f: an integer number of steps, a float fraction of ``learn()``, or None for never
    :return: the same as Python's own int or float
    :raises ValueError: if it is none of these
    """
    if freeze_after is None:
        return None
    if isinstance(freeze_after, (int, np.integer)) and not isinstance(freeze_after, bool) and freeze_after >= 0:
        return int(freeze_after)
    if isinstance(freeze_after, (float, np.floating)) and 0 < freeze_after <= 1:
        return float(freeze_after)
    raise ValueError(
        "freeze_after must be an integer of at least 0 (a number of steps), a float in (0, 1] (a fraction of learn()) "
        f"or None (never), not {freeze_after!r}"
    )


class FreezeEncoderCallback(BaseCallback):
    """
    Freezes the encoder of a SEER algorithm after a number of steps: from then on the replay buffer holds latents.

    A SEER algorithm attaches one by itself when its parameter ``freeze_after`` is set. Given among the callbacks
    of ``learn()``, or in the ``callback:`` entry of RL Zoo's YAML files, it takes the place of that parameter.

    :param freeze_after: T_f, when to freeze: an integer is a number of steps (of ``num_timesteps``), a float in
        (0, 1] a fraction of the steps of ``learn()``
    :param verbose: 1 to print a line at the freeze
    :raises ValueError: if ``freeze_after`` is neither
    """

    model: Any  # a SEER algorithm

    def __init__(self, freeze_after: int | float = 0.2, verbose: int = 0) -> None:
        super().__init__(verbose)
        checked = check_freeze_after(freeze_after)
        if checked is None:
            raise ValueError("freeze_after must be an integer or a float for a FreezeEncoderCallback, not None")
        self.freeze_after = checked

    def _init_callback(self) -> None:
        if not hasattr(self.model, "freeze_encoder"):
            raise ValueError(f"FreezeEncoderCallback needs a SEER algorithm such as SEERSAC, not {type(self.model).__name__}")

    def _on_training_start(self) -> None:
        self._freeze_if_due()

    def _on_step(self) -> bool:
        self._freeze_if_due()
        return True

    def _freeze_if_due(self) -> None:
        if self.model.num_timesteps < freeze_step(self.model, self.freeze_after) or self.model.encoder_frozen:
            return
        self.model.freeze_encoder()
        if self.verbose >= 1:
            print(f"Encoder frozen after {self.model.num_timesteps} steps")


def freeze_step(model: Any, freeze_after: int | float) -> int:
    """
    :param model: an algorithm, whose ``learn()`` was called
    :param freeze_after: T_f: an integer number of steps, or a float fraction of that ``learn()``
    :return: T_f in steps
    """
    if isinstance(freeze_after, int):
        return freeze_after
    start, end = model._num_timesteps_at_start, model._total_timesteps
    return start + max(round(freeze_after * (end - start)), 1)


def walk(callback: BaseCallback | None) -> Iterator[BaseCallback]:
    """:return: a callback, if it is one, and all that it calls"""
    if not isinstance(callback, BaseCallback):
        return
    yield callback
    children = list(getattr(callback, "callbacks", []))
    children += [getattr(callback, name, None) for name in ("callback", "callback_on_new_best")]
    for child in children:
        yield from walk(child)


def freezes(callback: BaseCallback | None) -> bool:
    """:return: whether a callback is a FreezeEncoderCallback, or calls one"""
    return any(isinstance(child, FreezeEncoderCallback) for child in walk(callback))

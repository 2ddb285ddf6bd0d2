"""Warnings that point at the user's line, and checks of numbers."""

import math
import sys
import warnings
from types import FrameType
from typing import Any

import numpy as np

# Callers that are not the user
PACKAGES = ("sb3_seer", "stable_baselines3", "sb3_contrib", "contextlib")


def warn(message: str) -> None:
    """
    :param message: of a ``UserWarning`` at the innermost line outside of this package and of SB3
    """
    frame: FrameType | None = sys._getframe(1)
    stacklevel = 2
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in PACKAGES:
        frame, stacklevel = frame.f_back, stacklevel + 1
    warnings.warn(message, stacklevel=stacklevel)


def check_positive_int(name: str, value: Any, *others: Any) -> None:
    """
    :param name: of a parameter
    :param value: what the user gave
    :param others: values that are allowed too, such as None
    :raises ValueError: if the value is not an integer >= 1, nor one of the others
    """
    is_int = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not (is_int and value >= 1) and value not in others:
        allowed = " or ".join([*map(str, others), "an integer >= 1"])
        raise ValueError(f"`{name}` must be {allowed}, got {value!r}")


def check_number(name: str, value: Any, low: float, high: float = math.inf) -> None:
    """
    :param name: of a parameter
    :param value: what the user gave
    :param low: least value that is allowed
    :param high: largest value that is allowed
    :raises ValueError: if the value is not a finite number between them
    """
    is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not (is_number and low <= value <= high and math.isfinite(value)):
        allowed = f"a number >= {low}" if high == math.inf else f"between {low} and {high}"
        raise ValueError(f"`{name}` must be {allowed}, got {value!r}")


def check_learning_rate(name: str, value: Any) -> None:
    """
    :param name: of a parameter
    :param value: what the user gave: a number, or a function of the progress remaining
    :raises ValueError: if the value, at the start of the training, is not a finite number >= 0
    """
    check_number(name, value(1.0) if callable(value) else value, 0)


def check_bool(name: str, value: Any) -> None:
    """
    :param name: of a parameter
    :param value: what the user gave
    :raises ValueError: if the value is not a bool
    """
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"`{name}` must be True or False, got {value!r}")

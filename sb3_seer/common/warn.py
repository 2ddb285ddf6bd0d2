"""Warnings that point at the user's line."""

import sys
import warnings
from types import FrameType

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

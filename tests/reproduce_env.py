"""An environment for trainings in processes of their own: ``--gym-packages tests.reproduce_env``."""

import gymnasium as gym

from tests.helpers import LightEnv


class Killed(BaseException):
    """Stands for SIGKILL: nobody handles it."""


gym.register("TinyLight-v0", LightEnv, kwargs=dict(size=48))

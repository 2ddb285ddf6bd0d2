"""The DeepMind control suite: its ids without importing it, and its pixels."""

import importlib.util
import os
import sys
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.core import ActType
from gymnasium.envs.registration import EnvSpec
from gymnasium.error import DependencyNotInstalled

# What shimmy registers, as dm_control/<name>-v0. Asking shimmy would import dm_control, which takes a second
_SUITE = {
    "acrobot": "swingup swingup_sparse",
    "ball_in_cup": "catch",
    "cartpole": "balance balance_sparse swingup swingup_sparse two_poles three_poles",
    "cheetah": "run",
    "dog": "stand walk trot run fetch",
    "finger": "spin turn_easy turn_hard",
    "fish": "upright swim",
    "hopper": "stand hop",
    "humanoid": "stand walk run run_pure_state",
    "humanoid_CMU": "stand walk run",
    "lqr": "lqr_2_1 lqr_6_2",
    "manipulator": "bring_ball bring_peg insert_ball insert_peg",
    "pendulum": "swingup",
    "point_mass": "easy hard",
    "quadruped": "walk run escape fetch",
    "reacher": "easy hard",
    "stacker": "stack_2 stack_4",
    "swimmer": "swimmer6 swimmer15",
    "walker": "stand walk run",
}
_LOCOMOTION = """
CmuHumanoidRunWalls CmuHumanoidRunGaps CmuHumanoidGoToTarget CmuHumanoidMazeForage CmuHumanoidHeterogeneousForage
RodentEscapeBowl RodentRunGaps RodentMazeForage RodentTwoTouch
"""
# Each with _features and with _vision
_MANIPULATION = """
stack_2_bricks stack_2_bricks_moveable_base stack_3_bricks stack_3_bricks_random_order
stack_2_of_3_bricks_random_order reassemble_3_bricks_fixed_order reassemble_5_bricks_random_order
lift_brick lift_large_box place_brick place_cradle reach_duplo reach_site
"""
# There is no stack_3_bricks_random_order_vision
_NOT_IN_SHIMMY = {"stack_3_bricks_random_order_vision"}
_NONDETERMINISTIC = {
    "CmuHumanoidMazeForage",
    "CmuHumanoidHeterogeneousForage",
    "RodentMazeForage",
    "RodentTwoTouch",
    "reassemble_5_bricks_random_order_features",
    "reassemble_5_bricks_random_order_vision",
}
ENTRY_POINT = "sb3_seer.envs.dmc:make_dm_control"
_OVERRIDING = ".*Overriding environment dm_control/"


def _names() -> list[str]:
    """:return: the names of shimmy's environments for dm_control"""
    suite = [f"{domain}-{task}" for domain, tasks in _SUITE.items() for task in tasks.split()]
    manipulation = [f"{task}_{kind}" for task in _MANIPULATION.split() for kind in ("features", "vision")]
    manipulation = [name for name in manipulation if name not in _NOT_IN_SHIMMY]
    return ["compatibility-env", *suite, *_LOCOMOTION.split(), *manipulation]


def register_dm_control(registry: dict[str, EnvSpec] = gym.registry) -> None:
    """
    Let gymnasium know the environments of dm_control, by the ids that shimmy gives them. Imports neither: the first
    ``gym.make`` of one of them does. Ids that are already registered stay as they are.

    :param registry: where to register
    """
    # If someone imports shimmy: these ids are overridden with what they stand for
    warnings.filterwarnings("ignore", message=_OVERRIDING)
    for name in _names():
        env_id = f"dm_control/{name}-v0"
        if env_id not in registry:
            nondeterministic = name in _NONDETERMINISTIC
            registry[env_id] = EnvSpec(env_id, ENTRY_POINT, nondeterministic=nondeterministic, kwargs=dict(env_id=env_id))


def make_dm_control(env_id: str, **kwargs: Any) -> gym.Env:
    """
    Make an environment of dm_control as shimmy does.

    :param env_id: its id for gymnasium
    :param kwargs: arguments for shimmy
    :return: the environment
    :raises gymnasium.error.DependencyNotInstalled: if dm_control or shimmy is not installed
    """
    for module in ("shimmy", "dm_control"):
        if importlib.util.find_spec(module) is None:
            raise DependencyNotInstalled(f'{env_id} needs {module}: pip install "sb3_seer[dmc]"')
    choose_renderer()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_OVERRIDING)
        import shimmy  # registers its environments

        if gym.registry[env_id].entry_point == ENTRY_POINT:  # it had been imported before
            shimmy.register_gymnasium_envs()
    entry_point = gym.registry[env_id].entry_point
    assert callable(entry_point)
    return entry_point(**kwargs)


def choose_renderer() -> None:
    """Without a screen, and if nothing was chosen, let dm_control draw through EGL. It looks once, when it is imported."""
    has_screen = sys.platform != "linux" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
    if not has_screen and "dm_control" not in sys.modules:
        os.environ.setdefault("MUJOCO_GL", "egl")


class DMControlPixels(gym.ObservationWrapper[np.ndarray, ActType, Any], gym.utils.RecordConstructorArgs):
    """
    What a camera of dm_control sees, in place of the state: uint8 images of shape ``(height, width, 3)``.

    The images come from the physics, not from ``env.render()``: they do not depend on the environment's
    ``render_mode``, which RL Zoo sets as it needs, and a video keeps the size that it has without this wrapper.
    An image is rendered once a step of this wrapper: inside it, ``ActionRepeat`` renders nothing.

    :param env: an environment of dm_control, as registered by shimmy
    :param height: pixels; the default is the papers' (they crop it to 84)
    :param width: pixels
    :param camera_id: number or name of the camera
    :raises ValueError: if the environment is not one of dm_control
    """

    def __init__(self, env: gym.Env, height: int = 100, width: int = 100, camera_id: int | str = 0) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, height=height, width=width, camera_id=camera_id)
        super().__init__(env)
        if not hasattr(env.unwrapped, "physics"):
            raise ValueError(f"DMControlPixels needs an environment of dm_control, which {env} is not")
        self.render_kwargs: dict[str, Any] = dict(height=height, width=width, camera_id=camera_id)
        self.observation_space = spaces.Box(0, 255, (height, width, 3), np.uint8)

    def observation(self, observation: Any) -> np.ndarray:
        """
        :param observation: the state, which is not used
        :return: an image
        """
        # Not kept: some environments build new physics for each episode
        physics = self.env.unwrapped.physics  # type: ignore[attr-defined]
        return np.ascontiguousarray(physics.render(**self.render_kwargs))

"""What the benchmarks have in common: an environment of noise, an agent for cartpole, measuring in turn, tables."""

import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.type_aliases import GymEnv

from sb3_seer import SEERSAC

Row = dict[str, Any]


class NoiseEnv(gym.Env):
    """
    Frames that no memory compresses (or vectors), in episodes of a given length.

    :param observation_space: a frame, channels last; or a vector of floats
    :param action_space: actions, which change nothing
    :param length: steps of an episode
    """

    def __init__(self, observation_space: spaces.Box, action_space: spaces.Space, length: int):
        self.observation_space, self.action_space, self.length = observation_space, action_space, length

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return self._frame(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.t += 1
        return self._frame(), 0.0, False, self.t == self.length, {}

    def _frame(self) -> np.ndarray:
        shape = self.observation_space.shape
        if self.observation_space.dtype == np.uint8:
            return self.np_random.integers(0, 256, shape, dtype=np.uint8)
        return self.np_random.standard_normal(shape, dtype=np.float32)


def frozen_agent(env: GymEnv, steps: int, seed: int, **policy_kwargs: Any) -> SEERSAC:
    """:return: SEERSAC for control, with an encoder that is frozen from the first step, on one thread"""
    th.set_num_threads(1)
    warnings.filterwarnings("ignore", message="The encoder is frozen at step 0")
    return SEERSAC(
        "CnnPolicy",
        env,
        buffer_size=steps,
        freeze_after=0,
        learning_starts=1000,
        learning_rate=1e-3,
        batch_size=128,
        tau=0.01,
        ent_coef="auto_0.1",
        ent_coef_learning_rate=1e-4,
        ent_coef_betas=(0.5, 0.999),
        policy_kwargs=dict(net_arch=[256, 256], ortho_init=True, log_std_bounds=(-10.0, 2.0), **policy_kwargs),
        seed=seed,
        device="cpu",
    )


def learn_and_evaluate(model: SEERSAC, make_env: Callable[[], GymEnv], steps: int, n_episodes: int = 5) -> None:
    """Print the mean return of some episodes after each quarter of the steps."""
    for _ in range(4):
        start = time.process_time()
        model.learn(steps // 4, reset_num_timesteps=False)
        rate = steps // 4 / (time.process_time() - start)
        mean, std = evaluate_policy(model, make_env(), n_eval_episodes=n_episodes)
        returns = f"return of {n_episodes} episodes {mean:.0f} ± {std:.0f}"
        print(f"{model.num_timesteps:6,} steps: {returns}, {rate:.0f} steps a second of CPU time", flush=True)


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_turn(functions: Mapping[str, Callable[[], object]], repetitions: int, in_a_row: int = 1) -> dict[str, float]:
    """
    :param functions: what to call, by name
    :param repetitions: how often, at least ``in_a_row``
    :param in_a_row: consecutive calls of one function; each round has the functions in another random order
    :return: median seconds of a call of each: the median over the rows of their mean
    """

    def row(function: Callable[[], object]) -> None:
        for _ in range(in_a_row):
            function()

    rng = np.random.default_rng(0)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(max(repetitions // in_a_row, 1)):
        for name in rng.permutation(list(functions)):
            times[name].append(seconds(partial(row, functions[name])) / in_a_row)
    return {name: float(np.median(values)) for name, values in times.items()}


def show(title: str, rows: list[Row]) -> None:
    """Print a table, numbers to the right."""

    def text(value: Any) -> str:
        if value is None:
            return ""
        if isinstance(value, bool):
            return "yes" if value else "NO"
        if isinstance(value, float):
            return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"
        return f"{value:,}" if isinstance(value, int) else str(value)

    columns = list(rows[0])
    cells = [[column.replace("_", " ") for column in columns], *([text(row[column]) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    is_text = [isinstance(rows[0][column], str) for column in columns]
    print(f"\n{title}")
    for i, line in enumerate(cells):
        padded = (f"{cell:{'<' if left else '>'}{width}}" for cell, width, left in zip(line, widths, is_text, strict=True))
        print("  ".join(padded).rstrip())
        if i == 0:
            print("  ".join("-" * width for width in widths))

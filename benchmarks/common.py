"""What the benchmarks have in common: an environment of noise, measuring in turn, tables."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

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


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_turn(functions: Mapping[str, Callable[[], object]], repetitions: int, in_a_row: int = 1) -> dict[str, float]:
    """
    :param functions: what to call, by name
    :param repetitions: how often, at least ``in_a_row``
    :param in_a_row: so often before it is the next one's turn; each time in another order
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

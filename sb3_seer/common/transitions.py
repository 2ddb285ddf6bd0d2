"""What both stages of a replay buffer share: which transitions follow each other, and what is kept aside where they do not."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np

from sb3_seer.common.layout import sort_bytes


class Asides:
    """A few arrays of varying length, kept aside under a row and an env."""

    def __init__(self) -> None:
        self._rows: dict[int, dict[int, np.ndarray]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._rows.values()))

    def items(self) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
        """:return: everything that is kept, under (row, env)"""
        return (((row, env), aside) for row, asides in self._rows.items() for env, aside in asides.items())

    def __setitem__(self, key: tuple[int, int], aside: np.ndarray) -> None:
        self._rows.setdefault(key[0], {})[key[1]] = aside

    def row(self, row: int) -> dict[int, np.ndarray]:
        """:return: what is kept under that row, by env"""
        return self._rows.get(row, {})

    def pop_row(self, row: int) -> dict[int, np.ndarray]:
        """:return: what was kept under that row, by env; no longer kept"""
        return self._rows.pop(row, {})


class TransitionStore(ABC):
    """
    What both stages share: which rows continue the row before them, and the asides of those that do not.

    :param arena: the bytes to store in, shape ``(n_bytes,)``
    :param rows: rows of the ring
    :param n_envs: transitions in a row
    """

    # The arena as what is stored, shape (rows, n_envs, ...)
    VIEW: str
    # What a store is made of, besides its arrays of one entry a row
    NUMBERS: tuple[str, ...] = ()
    ENV_ARRAYS: tuple[str, ...] = ("pending_bytes", "open")
    ASIDES: tuple[str, ...] = ("successor",)

    def __init__(self, arena: np.ndarray, rows: int, n_envs: int):
        self.arena = arena
        self.rows = rows
        self.n_envs = n_envs
        # linked[r, e]: the observation of row r + 1 is the next observation of row r
        self.linked = np.zeros((rows, n_envs), dtype=bool)
        self.successor = Asides()
        # The observation that each env is expected to go on with: nothing in numpy compares as fast as bytes do
        self.pending: list[bytes] = [b""] * n_envs
        # How their bytes are sorted, see ImageLayout.in_memory()
        self.n_places = 1
        # open[e]: the newest row of env e did not end an episode, so that `pending` is its next observation
        self.open = [False] * n_envs

    @abstractmethod
    def _view_of_arena(self) -> np.ndarray:
        """:return: the arena as what is stored, shape [rows, n_envs, ...]"""

    def __getstate__(self) -> dict[str, Any]:
        # A view would be pickled as another copy of the arena
        return {name: value for name, value in self.__dict__.items() if name != self.VIEW}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        setattr(self, self.VIEW, self._view_of_arena())

    @property
    def pending_bytes(self) -> np.ndarray:
        """the observations expected next, frame by frame, shape ``(n_envs, n_bytes)``"""
        memory = np.frombuffer(b"".join(self.pending), dtype=np.uint8).reshape(self.n_envs, self.n_places, -1)
        return sort_bytes(memory, 1).reshape(self.n_envs, -1).copy()

    @pending_bytes.setter
    def pending_bytes(self, observations: np.ndarray) -> None:
        self.pending = [observation.tobytes() for observation in observations]
        self.n_places = 1

    def continues(self, obs: np.ndarray) -> list[bool]:
        """
        :param obs: the observations as they lie in memory, shape ``(n_envs, n_places, n_bytes)``
        :return: for each env, whether that is the observation expected
        """
        if obs.shape[1] != self.n_places:
            self.pending = [sort_bytes(frames[None], obs.shape[1]).tobytes() for frames in self.pending_bytes]
            self.n_places = obs.shape[1]
        # Of the same length, unless nothing is expected
        return [pending.startswith(obs[env]) for env, pending in enumerate(self.pending)]

    def link(self, row: int, continues: list[bool]) -> None:
        """
        Settle where the newest row finds its next observation, before the row after it is written.

        :param row: the row after the newest one
        :param continues: for each env, whether what is about to be written there is what was expected
        """
        newest = (row - 1) % self.rows
        for env, is_open in enumerate(self.open):
            if is_open and continues[env]:
                self.linked[newest, env] = True
            elif is_open:
                self.successor[newest, env] = self._pending_successor(env)

    def evict(self, row: int) -> None:
        """
        :param row: the oldest row, which is about to be overwritten
        """
        self.successor.pop_row(row)

    def aside_bytes(self) -> int:
        """:return: bytes of all that is kept aside"""
        return sum(aside.nbytes for name in self.ASIDES for _, aside in getattr(self, name).items())

    @abstractmethod
    def row_arrays(self) -> dict[str, np.ndarray]:
        """:return: the arrays of one entry a row, by name"""

    @abstractmethod
    def _pending_successor(self, env: int) -> np.ndarray:
        """:return: what to keep aside as the next observation of the newest row"""

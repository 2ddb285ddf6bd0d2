"""
How observations are kept: one arena of bytes, read as images before the freeze and as latents after it.

Both stores keep an observation once. The next observation of a row is the observation of the row
after it, unless that row does not continue it (the end of an episode, a reset in the middle, the
newest row): only then is a *successor* kept aside.
"""

from collections.abc import Iterator

import numpy as np

from sb3_seer.common.layout import moved_on, sort_bytes
from sb3_seer.common.transitions import Asides, TransitionStore


class ImageStore(TransitionStore):
    """
    Observations as images: the newest frame of each in the arena, the older ones rebuilt from the rows before.

    A row whose older frames are not those of the row before (the first of an episode) keeps them
    aside as its *history*; the rows just after it rebuild from that as well. What the oldest row needs of the
    rows overwritten before it is the *tail*.

    :param arena: the bytes to store in, shape ``(rows * n_envs * frame_bytes,)``
    :param rows: rows of the ring
    :param n_envs: transitions in a row
    :param n_stack: frames in an observation, oldest first
    """

    VIEW = "frames"
    NUMBERS = ("oldest", "tail_start")
    ENV_ARRAYS = (*TransitionStore.ENV_ARRAYS, "newest_age", "shifted", "tail")
    ASIDES = (*TransitionStore.ASIDES, "history")

    def __init__(self, arena: np.ndarray, rows: int, n_envs: int, n_stack: int):
        super().__init__(arena, rows, n_envs)
        self.n_stack = n_stack
        self.frames = self._view_of_arena()  # [rows, n_envs, frame_bytes]
        # age[r, e]: how many rows before row r hold frames of its stack (n_stack - 1: all of its older frames),
        # those that were overwritten since included
        self.age = np.zeros((rows, n_envs), dtype=np.int16)
        self.oldest = 0
        self.history = Asides()
        # The older frames of the oldest row's stack, if its age is not zero: a ring of shape
        # [n_stack - 1, n_envs, frame_bytes] that begins at tail_start
        self.tail = np.zeros((n_stack - 1, n_envs, self.frames.shape[2]), dtype=np.uint8)
        self.tail_start = 0
        self.newest_age = [0] * n_envs
        # shifted[e]: `pending` is the newest row's stack, moved on by one frame
        self.shifted = [False] * n_envs
        self.offsets = np.arange(1 - n_stack, 1)

    def row_arrays(self) -> dict[str, np.ndarray]:
        return dict(observations=self.frames, linked=self.linked, age=self.age)

    def _view_of_arena(self) -> np.ndarray:
        return self.arena.reshape(self.rows, self.n_envs, -1)

    @property
    def pending_stacks(self) -> np.ndarray:
        """the observations expected next, shape ``(n_envs, n_stack, frame_bytes)``"""
        return self.pending_bytes.reshape(self.n_envs, self.n_stack, -1)

    def evict(self, row: int) -> None:
        super().evict(row)
        self.oldest = (row + 1) % self.rows
        if self.n_stack == 1:
            return
        for env, history in self.history.pop_row(row).items():
            stack = np.concatenate((self.tail[:, env], self.frames[row, env : env + 1]))
            self._unpack_history(history, stack)
            self.tail[:, env] = np.roll(stack[:-1], self.tail_start, axis=0)
        # The next row's stack is this one's, moved on by this row's frame
        self.tail[self.tail_start] = self.frames[row]
        self.tail_start = (self.tail_start + 1) % (self.n_stack - 1)

    def add(
        self,
        row: int,
        follows: list[bool],
        obs: np.ndarray,
        next_obs: np.ndarray,
        resets: dict[int, np.ndarray],
        done: list[bool],
    ) -> None:
        """
        :param row: the row to write
        :param follows: for each env, whether the row before is held and ``obs`` is what was expected after it
        :param obs: what ``continues()`` was asked about
        :param next_obs: the next observations, sorted like that or not
        :param resets: of envs where an episode ended, the next one's first observation, if known
        :param done: for each env, whether the episode ended
        """
        n_new = obs.shape[2] // self.n_stack
        next_obs = sort_bytes(next_obs, self.n_places)
        self.frames[row].reshape(self.n_envs, n_new, -1)[...] = obs[:, :, -n_new:].transpose(0, 2, 1)
        for env in range(self.n_envs):
            if follows[env] and self.shifted[env]:
                self.newest_age[env] = min(self.newest_age[env] + 1, self.n_stack - 1)
            elif self.n_stack > 1:
                self.newest_age[env] = 0
                self.history[row, env] = self._history_of(self._frame_by_frame(obs[env]))
            self.age[row, env] = self.newest_age[env]
            self.linked[row, env] = False
            expected = next_obs[env].tobytes()
            shifted = self.n_stack == 1 or moved_on(obs[env], expected, n_new)
            if done[env]:
                self.successor[row, env] = self._frame_by_frame(next_obs[env])[-1 if shifted else 0 :].copy()
            self.pending[env] = sort_bytes(resets[env], self.n_places).tobytes() if env in resets else expected
            self.open[env] = not done[env]
            self.shifted[env] = shifted and not done[env]

    def observations(self, rows: np.ndarray, envs: np.ndarray) -> np.ndarray:
        """
        :param rows: shape ``(batch_size,)``
        :param envs: shape ``(batch_size,)``
        :return: bytes of the observations, shape ``(batch_size, n_stack, frame_bytes)``
        """
        slots = (rows[:, None] + self.offsets) % self.rows * self.n_envs + envs[:, None]  # [batch_size, n_stack]
        # take() copies a frame at a time, several times faster than indexing with an array
        stacks = self.frames.reshape(self.rows * self.n_envs, -1).take(slots, axis=0)
        self._fill_history(stacks, rows, envs)
        return stacks

    def next_observations(self, rows: np.ndarray, envs: np.ndarray) -> np.ndarray:
        """
        :param rows: shape ``(batch_size,)``
        :param envs: shape ``(batch_size,)``
        :return: bytes of the next observations, shape ``(batch_size, n_stack, frame_bytes)``
        """
        linked = self.linked[rows, envs]
        stacks = self.observations((rows + linked) % self.rows, envs)
        for i in (~linked).nonzero()[0]:
            self._to_successor(stacks[i], int(rows[i]), int(envs[i]))
        return stacks

    def drain(self, n_rows: int, chunk: int) -> Iterator[tuple[int, np.ndarray, list[tuple[int, int]], np.ndarray]]:
        """
        Read everything once, in ascending order: a row may be overwritten as soon as it was handed out.

        :param n_rows: rows that hold transitions
        :param chunk: rows to read at a time
        :return: first row of the chunk; its observations, shape ``(n, n_envs, n_stack, frame_bytes)``;
            which (row, env) have a successor aside; their next observations, shape ``(m, n_stack, frame_bytes)``
        """
        before = self.frames[np.arange(1 - self.n_stack, 0) % self.rows]  # [n_stack - 1, n_envs, frame_bytes]
        for first in range(0, n_rows, chunk):
            rows = np.arange(first, min(first + chunk, n_rows))
            frames = np.concatenate((before, self.frames[rows]))  # [n_stack - 1 + n, n_envs, frame_bytes]
            before = frames[len(rows) :].copy()
            stacks = np.stack([frames[i : i + len(rows)] for i in range(self.n_stack)], axis=2)
            flat = stacks.reshape(len(rows) * self.n_envs, self.n_stack, -1)
            self._fill_history(flat, rows.repeat(self.n_envs), np.tile(np.arange(self.n_envs), len(rows)))
            keys = [(row, env) for row in rows.tolist() for env in self.successor.row(row)]
            successors = np.stack([stacks[row - first, env] for row, env in keys]) if keys else flat[:0]
            for stack, key in zip(successors, keys, strict=True):
                self._to_successor(stack, *key)
            yield first, stacks, keys, successors

    def _frame_by_frame(self, stack: np.ndarray) -> np.ndarray:
        """:return: shape [n_stack, frame_bytes], of a stack as it lies in memory"""
        return stack.T.reshape(self.n_stack, -1)

    def _history_of(self, stack: np.ndarray) -> np.ndarray:
        """The older frames of a stack, less those in front that only repeat the one after them (padding)."""
        first = 0
        while first < self.n_stack - 1 and np.array_equal(stack[first], stack[first + 1]):
            first += 1
        return stack[first:-1].copy()

    def _unpack_history(self, history: np.ndarray, frames: np.ndarray) -> None:
        """
        :param history: what ``_history_of`` returned for a row
        :param frames: that row's frame, and before it room for the frames to write there, at most ``n_stack - 1``
        """
        n_missing = len(frames) - 1
        n_kept = min(len(history), n_missing)
        frames[n_missing - n_kept : n_missing] = history[len(history) - n_kept :]
        frames[: n_missing - n_kept] = frames[n_missing - n_kept]

    def _fill_history(self, stacks: np.ndarray, rows: np.ndarray, envs: np.ndarray) -> None:
        """Write the frames that the rows before do not hold into stacks of shape [batch_size, n_stack, frame_bytes]."""
        if self.n_stack == 1:
            return
        held = (rows - self.oldest) % self.rows  # rows before it that are held, [batch_size]
        ages = self.age[rows, envs]
        for i in (np.minimum(ages, held) < self.n_stack - 1).nonzero()[0].tolist():
            row, env, age = int(rows[i]), int(envs[i]), int(ages[i])
            if age > held[i]:
                n_missing = self.n_stack - 1 - int(held[i])
                stacks[i, :n_missing] = np.roll(self.tail[:, env], -self.tail_start, axis=0)[held[i] :]
            else:
                self._unpack_history(self.history.row((row - age) % self.rows)[env], stacks[i, : self.n_stack - age])

    def _to_successor(self, stack: np.ndarray, row: int, env: int) -> None:
        """Turn the observation of a row, shape [n_stack, frame_bytes], into its next observation, in place."""
        successor = self.successor.row(row).get(env)
        if successor is None:
            stack[:] = self.pending_stacks[env]  # the newest row
        else:
            # One frame, or the whole stack where it is not the last one moved on by a frame
            stack[: -len(successor)] = stack[len(successor) :]
            stack[-len(successor) :] = successor

    def _pending_successor(self, env: int) -> np.ndarray:
        return self.pending_stacks[env, -1 if self.shifted[env] else 0 :].copy()


class LatentStore(TransitionStore):
    """
    Observations as latents: K * N latents each, already encoded.

    :param arena: the bytes to store in; those past the last whole record stay unused
    :param rows: rows of the ring
    :param n_envs: transitions in a row
    :param dtype: of the stored numbers
    :param shape: (K, N, L)
    """

    VIEW = "records"
    ENV_ARRAYS = (*TransitionStore.ENV_ARRAYS, "pending_latents")

    def __init__(self, arena: np.ndarray, rows: int, n_envs: int, dtype: str, shape: tuple[int, int, int]):
        super().__init__(arena, rows, n_envs)
        self.dtype = np.dtype(dtype)
        self.shape = shape
        self.records = self._view_of_arena()  # [rows, n_envs, K, N, L]
        # Stored latents of `pending`
        self.pending_latents = np.zeros((n_envs, *shape), dtype=self.dtype)

    def row_arrays(self) -> dict[str, np.ndarray]:
        return dict(observations=self.records, linked=self.linked)

    def _view_of_arena(self) -> np.ndarray:
        n_bytes = self.rows * self.n_envs * int(np.prod(self.shape)) * self.dtype.itemsize
        return self.arena[:n_bytes].view(self.dtype).reshape(self.rows, self.n_envs, *self.shape)

    def add(
        self,
        row: int,
        latents: np.ndarray,
        next_latents: np.ndarray,
        pending: np.ndarray,
        pending_latents: np.ndarray,
        done: list[bool],
    ) -> None:
        """
        :param row: the row to write
        :param latents: of the observations, shape ``(n_envs, K, N, L)``
        :param next_latents: of the next observations, same shape
        :param pending: the observations expected next, sorted like what ``continues()`` was asked about
        :param pending_latents: of those, shape ``(n_envs, K, N, L)``
        :param done: for each env, whether the episode ended
        """
        self.records[row] = latents
        self.linked[row] = False
        for env in range(self.n_envs):
            if done[env]:
                self.successor[row, env] = next_latents[env].copy()
        self.pending, self.pending_latents = [stack.tobytes() for stack in pending], pending_latents
        self.open = [not ended for ended in done]

    def latents(self, rows: np.ndarray, envs: np.ndarray, copies: np.ndarray) -> np.ndarray:
        """
        :param rows: shape ``(batch_size,)``
        :param envs: shape ``(batch_size,)``
        :param copies: which of the K augmented copies, shape ``(batch_size,)``
        :return: stored latents of the observations, shape ``(batch_size, N, L)``
        """
        n_copies = self.shape[0]
        slots = (rows * self.n_envs + envs) * n_copies + copies  # [batch_size]
        return self.records.reshape(-1, *self.shape[1:]).take(slots, axis=0)

    def next_latents(self, rows: np.ndarray, envs: np.ndarray, copies: np.ndarray) -> np.ndarray:
        """
        :param rows: shape ``(batch_size,)``
        :param envs: shape ``(batch_size,)``
        :param copies: which of the K augmented copies, shape ``(batch_size,)``
        :return: stored latents of the next observations, shape ``(batch_size, N, L)``
        """
        linked = self.linked[rows, envs]
        latents = self.latents((rows + linked) % self.rows, envs, copies)
        for i in (~linked).nonzero()[0]:
            row, env = int(rows[i]), int(envs[i])
            latents[i] = self.successor.row(row).get(env, self.pending_latents[env])[copies[i]]
        return latents

    def move_to_end(self, first: int, end: int) -> None:
        """
        Move the records of a block of rows to the end of the ring, in place.

        :param first: first row of the block
        :param end: row after its last
        """
        records, gap = self.records, self.rows - end
        # Last rows first, so that none is overwritten before it was moved; a megabyte or so at a time
        chunk = 1 + 2**20 // records[0].nbytes
        for stop in range(end, first, -chunk):
            start = max(stop - chunk, first)
            records[start + gap : stop + gap] = records[start:stop].copy()

    def _pending_successor(self, env: int) -> np.ndarray:
        return self.pending_latents[env].copy()

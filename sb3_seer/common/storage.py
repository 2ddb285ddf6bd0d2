"""
How observations are kept: one arena of bytes, read as images before the freeze and as latents after it.

Both stores keep an observation once. The next observation of a row is the observation of the row
after it, unless that row does not continue it (the end of an episode, a reset in the middle, the
newest row): only then is a *successor* kept aside.
"""

from collections.abc import Iterator

import numpy as np


def same_bytes(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """
    :param left: shape ``(n, ...)``
    :param right: the same shape
    :return: for each of the ``n``, whether left and right are equal byte for byte, shape ``(n,)``
    """
    return (left == right).reshape(len(left), -1).all(axis=1)


class TransitionStore:
    """
    What both stages share: which rows continue the row before them, and the asides of those that do not.

    :param arena: the bytes to store in, shape ``(n_bytes,)``
    :param rows: rows of the ring
    :param n_envs: transitions in a row
    """

    def __init__(self, arena: np.ndarray, rows: int, n_envs: int):
        self.arena = arena
        self.rows = rows
        self.n_envs = n_envs
        # linked[r, e]: the observation of row r + 1 is the next observation of row r
        self.linked = np.zeros((rows, n_envs), dtype=bool)
        self.successor: dict[tuple[int, int], np.ndarray] = {}
        # The observations expected next, shape [n_envs, n_stack, frame_bytes]
        self.pending: np.ndarray | None = None
        # open[e]: the newest row of env e did not end an episode, so that `pending` is its next observation
        self.open = np.zeros(n_envs, dtype=bool)

    def clear(self) -> None:
        """Forget every transition."""
        self.successor.clear()
        self.pending = None

    def continues(self, obs: np.ndarray) -> np.ndarray:
        """
        :param obs: bytes of the observations, shape ``(n_envs, n_stack, frame_bytes)``
        :return: for each env, whether they are the observations expected, shape ``(n_envs,)``
        """
        if self.pending is None:
            return np.zeros(self.n_envs, dtype=bool)
        return same_bytes(obs, self.pending)

    def link(self, row: int, continues: np.ndarray) -> None:
        """
        Settle where the newest row finds its next observation, before the row after it is written.

        :param row: the row after the newest one
        :param continues: for each env, whether what is about to be written there is what was expected
        """
        newest = (row - 1) % self.rows
        self.linked[newest] = self.open & continues
        for env in (self.open & ~continues).nonzero()[0]:
            self.successor[newest, int(env)] = self._pending_successor(int(env))

    def evict(self, row: int) -> None:
        """
        :param row: the oldest row, which is about to be overwritten
        """
        for env in range(self.n_envs):
            self.successor.pop((row, env), None)

    def _pending_successor(self, env: int) -> np.ndarray:
        raise NotImplementedError()


class ImageStore(TransitionStore):
    """
    Observations as images: the newest frame of each in the arena, the older ones rebuilt from the rows before.

    A row whose older frames are not those of the row before (the first of an episode) keeps them
    aside as its *history*; the rows just after it rebuild from that as well.

    :param arena: the bytes to store in, shape ``(rows * n_envs * frame_bytes,)``
    :param rows: rows of the ring
    :param n_envs: transitions in a row
    :param n_stack: frames in an observation, oldest first
    """

    def __init__(self, arena: np.ndarray, rows: int, n_envs: int, n_stack: int):
        super().__init__(arena, rows, n_envs)
        self.n_stack = n_stack
        # age[r, e]: how many rows before row r hold frames of its stack (n_stack - 1: all of its older frames),
        # those that were overwritten since included
        self.age = np.zeros((rows, n_envs), dtype=np.int16)
        self.oldest = 0
        self.history: dict[tuple[int, int], np.ndarray] = {}
        # shifted[e]: `pending` is the newest row's stack, moved on by one frame
        self.shifted = np.zeros(n_envs, dtype=bool)
        self.offsets = np.arange(1 - n_stack, 1)

    @property
    def frames(self) -> np.ndarray:
        """the arena as frames, shape ``(rows, n_envs, frame_bytes)``"""
        return self.arena.reshape(self.rows, self.n_envs, -1)

    def clear(self) -> None:
        super().clear()
        self.history.clear()
        self.oldest = 0

    def evict(self, row: int) -> None:
        super().evict(row)
        after = self.oldest = (row + 1) % self.rows
        frames = self.frames
        for env in range(self.n_envs):
            # The oldest row has no row before it, so it always has a history (None: stacks of one frame have none)
            history = self.history.pop((row, env), None)  # [<= n_stack - 1, frame_bytes]
            if history is None or after == row or self.age[after, env] == 0:
                continue
            # The row after needs this frame: it gets a history of its own, one frame further on
            frame = frames[row, env]
            if len(history) == 0 and np.array_equal(frame, frames[after, env]):
                self.history[after, env] = history
            else:
                older = history[max(len(history) - (self.n_stack - 2), 0) :]
                self.history[after, env] = np.concatenate((older, frame[None]))

    def add(
        self, row: int, follows: np.ndarray, obs: np.ndarray, next_obs: np.ndarray, pending: np.ndarray, done: np.ndarray
    ) -> None:
        """
        :param row: the row to write
        :param follows: for each env, whether the row before is held and ``obs`` is what was expected after it
        :param obs: bytes of the observations, shape ``(n_envs, n_stack, frame_bytes)``
        :param next_obs: bytes of the next observations, same shape
        :param pending: bytes of the observations expected next, same shape; kept, not copied
        :param done: for each env, whether the episode ended
        """
        self.frames[row] = obs[:, -1]
        self.linked[row] = False
        if self.n_stack > 1:
            follows = follows & self.shifted
            self.age[row] = np.where(follows, np.minimum(self.age[row - 1] + 1, self.n_stack - 1), 0)
            for env in (~follows).nonzero()[0]:
                self.history[row, int(env)] = self._history_of(obs[env])
        shifted = same_bytes(next_obs[:, :-1], obs[:, 1:])
        for env in done.nonzero()[0]:
            self.successor[row, int(env)] = next_obs[env, -1 if shifted[env] else 0 :].copy()
        self.pending = pending
        self.open = ~done
        self.shifted = shifted & self.open

    def observations(self, rows: np.ndarray, envs: np.ndarray) -> np.ndarray:
        """
        :param rows: shape ``(batch_size,)``
        :param envs: shape ``(batch_size,)``
        :return: bytes of the observations, shape ``(batch_size, n_stack, frame_bytes)``
        """
        slots = (rows[:, None] + self.offsets) % self.rows * self.n_envs + envs[:, None]  # [batch_size, n_stack]
        # take() copies a frame at a time, several times faster than indexing with an array
        stacks = self.arena.reshape(self.rows * self.n_envs, -1).take(slots, axis=0)
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
            keys = [(int(row), env) for row in rows for env in range(self.n_envs) if (int(row), env) in self.successor]
            successors = np.stack([stacks[row - first, env] for row, env in keys]) if keys else flat[:0]
            for stack, key in zip(successors, keys, strict=True):
                self._to_successor(stack, *key)
            yield first, stacks, keys, successors

    def _history_of(self, stack: np.ndarray) -> np.ndarray:
        """The older frames of a stack, less those in front that only repeat the one after them (padding)."""
        first = 0
        while first < self.n_stack - 1 and np.array_equal(stack[first], stack[first + 1]):
            first += 1
        return stack[first:-1].copy()

    def _fill_history(self, stacks: np.ndarray, rows: np.ndarray, envs: np.ndarray) -> None:
        """Write the frames that the rows before do not hold into stacks of shape [batch_size, n_stack, frame_bytes]."""
        if self.n_stack == 1:
            return
        missing = self.n_stack - 1 - np.minimum(self.age[rows, envs], (rows - self.oldest) % self.rows)  # [batch_size]
        for i in missing.nonzero()[0]:
            n_missing = int(missing[i])
            first_row = (int(rows[i]) - (self.n_stack - 1 - n_missing)) % self.rows
            history = self.history[first_row, int(envs[i])]
            n_kept = min(len(history), n_missing)
            stacks[i, n_missing - n_kept : n_missing] = history[len(history) - n_kept :]
            stacks[i, : n_missing - n_kept] = stacks[i, n_missing - n_kept]

    def _to_successor(self, stack: np.ndarray, row: int, env: int) -> None:
        """Turn the observation of a row, shape [n_stack, frame_bytes], into its next observation, in place."""
        successor = self.successor.get((row, env))
        if successor is None:
            assert self.pending is not None  # the newest row
            stack[:] = self.pending[env]
        else:
            # One frame, or the whole stack where it is not the last one moved on by a frame
            stack[: -len(successor)] = stack[len(successor) :]
            stack[-len(successor) :] = successor

    def _pending_successor(self, env: int) -> np.ndarray:
        assert self.pending is not None
        return self.pending[env, -1 if self.shifted[env] else 0 :].copy()


class LatentStore(TransitionStore):
    """
    Observations as latents: K * N latents each, already encoded.

    :param arena: the bytes to store in; those past the last whole record stay unused
    :param rows: rows of the ring
    :param n_envs: transitions in a row
    :param dtype: of the stored numbers
    :param shape: (K, N, L)
    """

    def __init__(self, arena: np.ndarray, rows: int, n_envs: int, dtype: str, shape: tuple[int, int, int]):
        super().__init__(arena, rows, n_envs)
        self.dtype = np.dtype(dtype)
        self.shape = shape
        # Stored latents of `pending`
        self.pending_latents = np.zeros((n_envs, *shape), dtype=self.dtype)

    @property
    def records(self) -> np.ndarray:
        """the arena as latents, shape ``(rows, n_envs, K, N, L)``"""
        n_bytes = self.rows * self.n_envs * int(np.prod(self.shape)) * self.dtype.itemsize
        return self.arena[:n_bytes].view(self.dtype).reshape(self.rows, self.n_envs, *self.shape)

    def add(
        self,
        row: int,
        latents: np.ndarray,
        next_latents: np.ndarray,
        pending: np.ndarray,
        pending_latents: np.ndarray,
        done: np.ndarray,
    ) -> None:
        """
        :param row: the row to write
        :param latents: of the observations, shape ``(n_envs, K, N, L)``
        :param next_latents: of the next observations, same shape
        :param pending: bytes of the observations expected next, shape ``(n_envs, n_stack, frame_bytes)``; kept, not copied
        :param pending_latents: of those, shape ``(n_envs, K, N, L)``
        :param done: for each env, whether the episode ended
        """
        self.records[row] = latents
        self.linked[row] = False
        for env in done.nonzero()[0]:
            self.successor[row, int(env)] = next_latents[env].copy()
        self.pending, self.pending_latents = pending, pending_latents
        self.open = ~done

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
            latents[i] = self.successor.get((row, env), self.pending_latents[env])[copies[i]]
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

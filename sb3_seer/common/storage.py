"""
Observations once each, in one arena of bytes: as images before the freeze, as latents after it.

A ring has a slot for each step of every env. Here an episode ends with step 1, and step 3 is the newest::

    slot            0      1      2      3
    observation    o0     o1     p0     p1     in the ring
    is_linked     yes     no    yes     no     the next observation is the observation of the next slot
    extra_next            o2                   otherwise it is kept here, by slot and env,
    pending                             p2     or, of the newest step, here

A slot of images holds the newest frame of a stack. Its older frames come from

1. the ``n_before`` slots before it,
2. ``extra_frames``, kept for the first of these slots, where the episode began,
3. repetitions of the oldest frame found.
"""

from collections.abc import Callable

import numpy as np
from tqdm import tqdm

Encode = Callable[[np.ndarray], np.ndarray]


class ObservationStore:
    """
    A ring of observations.

    :param ring: where they are stored, shape ``(n_slots, n_envs, ...)``
    :param pending: room for the next observation of the newest step of each env, shape ``(n_envs, ...)``
    """

    def __init__(self, ring: np.ndarray, pending: np.ndarray):
        self.ring, self.pending = ring, pending
        self.newest, self.size = -1, 0  # slot of the newest step; slots in use
        # is_open[e]: the newest step of env e did not end its episode
        self.is_open = np.zeros(len(pending), dtype=bool)
        # is_linked[s, e]: the next observation of slot s is the observation of slot s + 1
        self.is_linked = np.zeros(ring.shape[:2], dtype=bool)
        # By slot and env, next observations that are not linked. The next observation of the newest step is `pending`
        self.extra_next: dict[tuple[int, int], np.ndarray] = {}

    @property
    def extra_bytes(self) -> int:
        """bytes kept beside the ring"""
        return sum(array.nbytes for array in self.extra_next.values())

    def slots(self, ages: np.ndarray) -> np.ndarray:
        """
        :param ages: of steps, 0 for the newest, 1 for the one before
        :return: where they are in the ring, same shape
        """
        return (self.newest - ages) % len(self.ring)

    @property
    def next_slot(self) -> int:
        """where the next step is to be written, before ``_advance()``"""
        return (self.newest + 1) % len(self.ring)

    def _advance(self, continues: np.ndarray) -> None:
        """
        Settle where the next observations of the newest step are, and make the next slot the newest.

        :param continues: for each env, whether the step in the next slot starts from the next observation of the newest one
        """
        for env in range(len(self.pending) if self.size > 0 else 0):
            self.is_linked[self.newest, env] = continues[env]
            if not continues[env]:
                self.extra_next[self.newest, env] = self._unlinked_next(env)
        self.newest = self.next_slot
        self.size = min(self.size + 1, len(self.ring))
        self.is_linked[self.newest] = False
        for env in range(len(self.pending)):
            self.extra_next.pop((self.newest, env), None)

    def _unlinked_next(self, env: int) -> np.ndarray:
        """:return: a copy of what ``extra_next`` keeps of the next observation of the newest step"""
        return self.pending[env].copy()


def older_frames(stack: np.ndarray) -> np.ndarray:
    """
    :param stack: frames, the newest last, shape ``(n_stack, frame_bytes)``
    :return: a copy of all but the newest, without padding: the first frames that repeat the one after them
    """
    first = 0
    while first < len(stack) - 1 and np.array_equal(stack[first], stack[first + 1]):
        first += 1
    return stack[first:-1].copy()


class ImageStore(ObservationStore):
    """
    Observations as images: of each the newest frame; its older frames are in the slots before.

    A stack that they do not make up (the first of an episode) has its older frames kept beside the ring, and the stacks
    just after it are rebuilt with them. The ring has ``n_stack - 1`` spare slots, for the older frames of the oldest step.

    :param arena: shape ``((n_rows + n_stack - 1) * n_envs * frame_bytes,)``
    :param n_rows: steps to hold
    :param n_envs: observations in a step
    :param n_stack: frames in an observation, the newest last
    """

    def __init__(self, arena: np.ndarray, n_rows: int, n_envs: int, n_stack: int):
        ring = arena.reshape(n_rows + n_stack - 1, n_envs, -1)  # [n_slots, n_envs, frame_bytes]
        super().__init__(ring, np.zeros((n_envs, n_stack, ring.shape[2]), dtype=np.uint8))
        self.n_stack = n_stack
        # n_before[s, e]: how many slots before s hold older frames of its stack
        self.n_before = np.zeros(ring.shape[:2], dtype=np.int16)
        # is_shifted[e]: `pending` is the newest stack shifted by a frame
        self.is_shifted = np.zeros(n_envs, dtype=bool)
        # By slot and env, older frames that are not in the slots before
        self.extra_frames: dict[tuple[int, int], np.ndarray] = {}

    @property
    def extra_bytes(self) -> int:
        """bytes kept beside the ring"""
        return super().extra_bytes + sum(frames.nbytes for frames in self.extra_frames.values())

    def add(self, obs: np.ndarray, next_obs: np.ndarray, done: np.ndarray, continues: np.ndarray) -> None:
        """
        Add a step of every env.

        :param obs: observations, shape ``(n_envs, n_stack, frame_bytes)``
        :param next_obs: next observations, same shape
        :param done: whether the episode ended, shape ``(n_envs,)``
        :param continues: whether ``obs`` is the next observation of the newest step, shape ``(n_envs,)``
        """
        slot = self.next_slot
        self.ring[slot] = obs[:, -1]
        for env in range(len(obs)):
            self.extra_frames.pop((slot, env), None)
            if continues[env] and self.is_shifted[env]:
                self.n_before[slot, env] = min(self.n_before[self.newest, env] + 1, self.n_stack - 1)
            else:
                self.n_before[slot, env] = 0
                if self.n_stack > 1:
                    self.extra_frames[slot, env] = older_frames(obs[env])
        self._advance(continues)
        for env in range(len(obs)):
            # Bytes are compared faster than arrays
            self.is_shifted[env] = obs[env, 1:].tobytes() == next_obs[env, :-1].tobytes()
        self.pending[:], self.is_open = next_obs, ~done

    def observations(self, slots: np.ndarray, envs: np.ndarray) -> np.ndarray:
        """
        :param slots: of steps, shape ``(batch_size,)``
        :param envs: shape ``(batch_size,)``
        :return: bytes of their observations, shape ``(batch_size, n_stack, frame_bytes)``
        """
        n_slots, n_envs, _ = self.ring.shape
        frames = (slots[:, None] + np.arange(1 - self.n_stack, 1)) % n_slots * n_envs + envs[:, None]  # [batch_size, n_stack]
        # take() copies a frame at a time, several times faster than indexing with an array
        stacks = self.ring.reshape(n_slots * n_envs, -1).take(frames, axis=0)
        n_before = self.n_before[slots, envs]
        for i in (n_before < self.n_stack - 1).nonzero()[0].tolist():
            extra = self.extra_frames[int(slots[i] - n_before[i]) % n_slots, int(envs[i])]
            # What the slots before and the extra frames leave open was padding: repetitions of the frame after it
            end = self.n_stack - 1 - int(n_before[i])
            start = max(end - len(extra), 0)
            stacks[i, start:end] = extra[len(extra) - (end - start) :]
            stacks[i, :start] = stacks[i, start]
        return stacks

    def next_observations(self, slots: np.ndarray, envs: np.ndarray) -> np.ndarray:
        """As ``observations()``, of the next observations."""
        is_linked = self.is_linked[slots, envs]
        stacks = self.observations((slots + is_linked) % len(self.ring), envs)
        for i in (~is_linked).nonzero()[0].tolist():
            env = int(envs[i])
            extra = self.extra_next.get((int(slots[i]), env), self.pending[env])
            # One frame where it is the observation shifted by a frame, otherwise the whole stack
            stacks[i, : -len(extra)] = stacks[i, len(extra) :]
            stacks[i, -len(extra) :] = extra
        return stacks

    def _unlinked_next(self, env: int) -> np.ndarray:
        return self.pending[env, -1 if self.is_shifted[env] else 0 :].copy()


class LatentStore(ObservationStore):
    """
    Observations as latents: K * N each.

    :param arena: bytes to store in; those past the last whole record stay unused
    :param n_rows: steps to hold
    :param n_envs: observations in a step
    :param dtype: of the stored numbers
    :param shape: (K, N, L)
    """

    def __init__(self, arena: np.ndarray, n_rows: int, n_envs: int, dtype: str, shape: tuple[int, int, int]):
        n_bytes = n_rows * n_envs * int(np.prod(shape)) * np.dtype(dtype).itemsize
        super().__init__(
            arena[:n_bytes].view(dtype).reshape(n_rows, n_envs, *shape),  # [n_slots, n_envs, K, N, L]
            np.zeros((n_envs, *shape), dtype=dtype),
        )

    def add(self, latents: np.ndarray, next_latents: np.ndarray, done: np.ndarray, continues: np.ndarray) -> None:
        """As ``ImageStore.add()``, with latents of shape ``(n_envs, K, N, L)``."""
        self.ring[self.next_slot] = latents
        self._advance(continues)
        self.pending, self.is_open = next_latents, ~done

    def latents(self, slots: np.ndarray, envs: np.ndarray, copies: np.ndarray) -> np.ndarray:
        """
        :param slots: of steps, shape ``(batch_size,)``
        :param envs: shape ``(batch_size,)``
        :param copies: which of the K augmented copies, shape ``(batch_size,)``
        :return: stored latents of their observations, shape ``(batch_size, N, L)``
        """
        _, n_envs, n_copies, *shape = self.ring.shape
        records = (slots * n_envs + envs) * n_copies + copies  # [batch_size]
        return self.ring.reshape(-1, *shape).take(records, axis=0)

    def next_latents(self, slots: np.ndarray, envs: np.ndarray, copies: np.ndarray) -> np.ndarray:
        """As ``latents()``, of the next observations."""
        is_linked = self.is_linked[slots, envs]
        latents = self.latents((slots + is_linked) % len(self.ring), envs, copies)
        for i in (~is_linked).nonzero()[0].tolist():
            env = int(envs[i])
            latents[i] = self.extra_next.get((int(slots[i]), env), self.pending[env])[copies[i]]
        return latents


def images_to_latents(images: ImageStore, latents: LatentStore, n_rows: int, encode: Encode, chunk: int) -> None:
    """
    Overwrite images with their latents, a chunk at a time, and open the ring after the newest step.

    Nothing is overwritten before it was read: latent i lies within the bytes of the first i + 1 images, and a chunk is written
    when the next one, whose stacks may reach ``n_stack - 1`` slots back, has been read.

    :param images: what is stored
    :param latents: an empty store in the same arena; a step of it takes at most the bytes of a step of images
    :param n_rows: steps to convert, the newest ones
    :param encode: turns bytes of images, shape ``(batch_size, n_stack, frame_bytes)``, into stored latents, shape
        ``(batch_size, K, N, L)``
    :param chunk: steps to read at a time
    """
    n_envs = images.ring.shape[1]
    ages = np.arange(n_rows)
    slots = np.sort(images.slots(ages))
    n_newer = int((slots <= images.newest).sum())  # slots up to the newest step. In a ring that is full the rest are older
    latents.newest, latents.size = n_newer - 1, n_rows
    latents.is_linked[latents.slots(ages)] = images.is_linked[images.slots(ages)]

    # First the few observations without a slot, while all their other frames are there
    latents.pending, latents.is_open = encode(images.pending), images.is_open
    keys = np.array(list(images.extra_next), dtype=int).reshape(-1, 2)
    keys = keys[np.isin(keys[:, 0], slots)]  # slots and envs
    for i in range(0, len(keys), chunk):
        some, envs = keys[i : i + chunk].T
        encoded = encode(images.next_observations(some, envs))
        new_slots = latents.slots((images.newest - some) % len(images.ring))
        latents.extra_next.update(zip(zip(new_slots.tolist(), envs.tolist(), strict=True), encoded.copy(), strict=True))

    chunk = max(chunk, images.n_stack - 1)

    def read(first: int) -> np.ndarray:
        some = slots[first : first + chunk]
        return images.observations(some.repeat(n_envs), np.tile(np.arange(n_envs), len(some)))

    with tqdm(total=n_rows * n_envs, desc="images to latents", delay=2) as bar:
        stacks = read(0)
        for first in range(0, n_rows, chunk):
            following = read(first + chunk)  # before its frames are overwritten
            encoded = encode(stacks).reshape(-1, *latents.ring.shape[1:])
            latents.ring[first : first + len(encoded)] = encoded
            bar.update(len(stacks))
            stacks = following

    gap, step = len(latents.ring) - n_rows, 1 + 2**20 // latents.ring[0].nbytes
    # The older steps move to the end of the ring. Last ones first, so that none is overwritten before it was moved
    for stop in range(n_rows, n_newer, -step):
        start = max(stop - step, n_newer)
        latents.ring[start + gap : stop + gap] = latents.ring[start:stop].copy()

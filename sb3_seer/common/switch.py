"""What the two stages of a replay buffer take, and the switch from the first to the second."""

import numpy as np
from tqdm import tqdm

from sb3_seer.common.codec import LatentCodec
from sb3_seer.common.encoding import MAX_ENCODER_INPUTS
from sb3_seer.common.memory import MemoryPlan
from sb3_seer.common.sampling import TransitionSampling
from sb3_seer.common.storage import ImageStore, LatentStore

# Observations that the range of uint8 latents is fitted on
MAX_FIT_OBSERVATIONS = 1024


class StageSwitch(TransitionSampling):
    """Mixin for a buffer of images: what they take, what latents would, and the switch from the ones to the others."""

    stage: str  # "images" or "latents"
    nbytes: int  # of the observations, in both stages
    latent_dtype: str
    max_latent_buffer_size: int | None
    encoder_fingerprint: str | None

    def plan(self) -> MemoryPlan:
        """
        :return: bytes and transitions of both stages
        """
        n_networks, latent_dim = self._known_latent_shape()
        return MemoryPlan(
            image_transitions=self.nbytes // self.layout.frame_bytes,
            n_envs=self.n_envs,
            frame_bytes=self.layout.frame_bytes,
            number_bytes=np.dtype(self.latent_dtype).itemsize,
            n_networks=n_networks,
            n_augmentations=self.n_augmentations,
            latent_dim=latent_dim,
            max_latent_transitions=self.max_latent_buffer_size,
            step_bytes=self._step_bytes(),
        )

    def check_capacity(self) -> None:
        """
        :raises ValueError: if the latents of an observation take more bytes than its newest frame
        """
        self.plan().check_capacity()

    def _step_bytes(self) -> int:
        """:return: bytes of a transition that are not its observation's images or latents"""
        n_bytes = self.action_dim * np.dtype(self._maybe_cast_dtype(self.action_space.dtype)).itemsize
        n_bytes += 3 * np.dtype(np.float32).itemsize  # reward, done, timeout
        n_bytes += np.dtype(bool).itemsize + np.dtype(np.int16).itemsize  # what a store knows of a row
        for key, space in self.layout.others.items():
            n_bytes += 2 * int(np.prod(self.obs_shape[key])) * np.dtype(self._maybe_cast_dtype(space.dtype)).itemsize
        return n_bytes + (self.priorities is not None) * 9

    def to_latents(self) -> None:
        """
        Turn every stored image into latents, in place, and let the buffer grow to what fits in the same bytes.

        :raises ValueError: if latents are larger than images, or if ``latent_dtype="uint8"`` has nothing to be fitted on
        """
        if self.stage == "latents":
            return
        self.check_capacity()
        images = self._store if self.n_valid > 0 else None
        assert not isinstance(images, LatentStore)
        codec = self.codec
        if self.codec is None:
            if images is None:
                raise ValueError(
                    'latent_dtype: "uint8" needs stored observations to fit its range on, and the buffer is empty: '
                    "set the attribute codec (a LatentCodec), or use another latent_dtype"
                )
            self.codec = self._fit_codec(images, self.n_valid)
        elif self.codec.scale is not None and self.codec.scale.shape != self._known_latent_shape():
            raise ValueError(
                f"codec: its scale has shape {self.codec.scale.shape}, allowed is {self._known_latent_shape()} (N, L)"
            )
        rows = self.plan().latent_transitions // self.n_envs
        if images is None:
            self._store = None  # allocated anew, if ever needed
            self.pos = 0
        else:
            # Once the ring has wrapped, the older rows are those from pos on: they move to its end, so that
            # it opens at the write head. In a ring that is just full, it is the write head that moves.
            self.pos = (self.pos or self.n_valid) % rows
            try:
                latents = self._latent_store(images.arena, rows)
                self._convert(images, latents, self.n_valid, self.pos)
                latents.linked = self._moved(images.linked, rows)
                for name in ("actions", "rewards", "dones", "timeouts"):
                    setattr(self, name, self._moved(getattr(self, name), rows))
                for key in self.others:
                    self.others[key] = self._moved(self.others[key], rows)
                if self.priorities is not None:
                    self.priorities.values = self._moved(self.priorities.values.reshape(-1, self.n_envs), rows).reshape(-1)
            except BaseException:
                self.reset()  # rather empty than half images, half latents
                self.codec = codec
                raise
            self._store = latents
        self.buffer_size, self.full = rows, self.n_valid == rows
        self.stage = "latents"

    def _moved(self, array: np.ndarray, rows: int) -> np.ndarray:
        """:return: an array of one entry a row, with its rows where they are in a ring of that many rows"""
        moved = np.zeros((rows, *array.shape[1:]), dtype=array.dtype)
        moved[: self.pos] = array[: self.pos]
        moved[self.pos + rows - self.n_valid :] = array[self.pos : self.n_valid]
        return moved

    def _convert(self, images: ImageStore, latents: LatentStore, n_rows: int, pos: int) -> None:
        """
        Write the latents of every row over its images, then open the ring at the write head.

        :param images: what is stored
        :param latents: an empty store in the same arena
        :param n_rows: rows that hold transitions
        :param pos: where the next row will be written; the rows from there on are older and move to the end of the ring
        """
        gap = latents.rows - n_rows
        chunk = max(MAX_ENCODER_INPUTS // (self.n_augmentations * self.n_envs), 1)
        with tqdm(total=n_rows * self.n_envs, desc="images to latents", delay=2) as bar:
            for first, stacks, keys, successors in images.drain(n_rows, chunk):
                encoded = self._encode(stacks.reshape(-1, *stacks.shape[2:]))
                # This chunk was copied, and a record is no larger than a frame: no image still to come is overwritten
                latents.records[first : first + len(stacks)] = encoded.reshape(len(stacks), self.n_envs, *latents.shape)
                for (row, env), successor in zip(keys, self._encode(successors), strict=True):
                    latents.successor[row + gap if row >= pos else row, env] = successor.copy()
                bar.update(len(encoded))
        latents.move_to_end(pos, n_rows)
        latents.open, latents.pending_bytes = images.open, images.pending_bytes
        stacks = images.pending_stacks
        latents.pending_latents = self._encode(stacks)
        to_act_on = self.layout.to_images(stacks)
        self.acting = to_act_on, self._encoder_or_raise().encode(self._center_crop(self._to_tensors(to_act_on)))

    def _fit_codec(self, images: ImageStore, n_rows: int) -> LatentCodec:
        total = n_rows * self.n_envs
        picks = np.linspace(0, total - 1, min(total, MAX_FIT_OBSERVATIONS)).astype(int)
        latents = []
        for some in np.array_split(picks, -(-len(picks) // MAX_ENCODER_INPUTS)):
            stacks = images.observations(some // self.n_envs, some % self.n_envs)
            inputs = self._network_inputs(self.layout.to_images(stacks), n_copies=1)
            latents.append(self._encoder_or_raise().encode(inputs).cpu().numpy())
        return LatentCodec.fit(np.concatenate(latents))

    def _latent_store(self, arena: np.ndarray, rows: int) -> LatentStore:
        # Not known any earlier: the weights of a model that is loaded come after its (empty) buffer
        self.encoder_fingerprint = self._encoder_or_raise().encoder_fingerprint()
        return LatentStore(arena, rows, self.n_envs, self.latent_dtype, (self.n_augmentations, *self._known_latent_shape()))

"""How many transitions fit in the same bytes, before and after the freeze."""

from dataclasses import dataclass, field

import numpy as np

LATENT_DTYPES = ("float32", "float16", "uint8")


@dataclass(frozen=True)
class MemoryPlan:
    """
    Transitions and bytes of a buffer, before and after the freeze.

    :param image_transitions: transitions held while images are stored (C)
    :param n_envs: number of parallel environments
    :param frame_bytes: bytes stored for the images of one observation: their newest frames (P)
    :param number_bytes: bytes of one number of a latent (b)
    :param n_networks: networks with their own latent (N)
    :param n_augmentations: augmented copies of each observation (K)
    :param latent_dim: numbers in a latent (L)
    :param max_latent_transitions: most transitions held once latents are stored, None: as many as fit
    :param step_bytes: bytes of the rest of a transition: action, reward, done...
    :param bytes_of: of several images in an observation, the part of ``frame_bytes`` of each, by key
    """

    image_transitions: int
    n_envs: int
    frame_bytes: int
    number_bytes: int
    n_networks: int
    n_augmentations: int
    latent_dim: int
    max_latent_transitions: int | None = None
    step_bytes: int = 0
    bytes_of: dict[str, int] = field(default_factory=dict)

    @property
    def image_bytes(self) -> int:
        """bytes of the images (``C * P``)"""
        return self.image_transitions * self.frame_bytes

    @property
    def record_bytes(self) -> int:
        """bytes of all the latents of one observation: b * N * K * L"""
        return self.number_bytes * self.n_networks * self.n_augmentations * self.latent_dim

    @property
    def latent_transitions(self) -> int:
        """transitions held once latents are stored (C_hat)"""
        rows = self.fitting(self.record_bytes) // self.n_envs
        if self.max_latent_transitions is not None:
            rows = min(rows, max(self.max_latent_transitions // self.n_envs, 1))
        return rows * self.n_envs

    @property
    def latent_bytes(self) -> int:
        """bytes of the same arena that the latents fill"""
        return self.latent_transitions * self.record_bytes

    @property
    def total_bytes(self) -> int:
        """
        the most that the buffer will ever hold, without the few extra frames and latents at the ends of episodes
        """
        return self.image_bytes + max(self.image_transitions, self.latent_transitions) * self.step_bytes

    def fitting(self, record_bytes: int) -> int:
        """
        :param record_bytes: bytes of all the latents of one observation
        :return: how many transitions of such latents fit in the bytes of the images
        """
        return self.image_bytes // (self.n_envs * record_bytes) * self.n_envs

    def check_capacity(self) -> None:
        """
        :raises ValueError: if the latents of an observation take more bytes than its newest frame
        """
        if self.latent_transitions >= self.image_transitions:
            return
        options: dict[str, int] = {}  # transitions that they hold
        for dtype in LATENT_DTYPES:
            number_bytes = np.dtype(dtype).itemsize
            if number_bytes < self.number_bytes:
                options[f"latent_dtype={dtype!r}"] = self.fitting(self.record_bytes // self.number_bytes * number_bytes)
        copy_bytes = self.record_bytes // self.n_augmentations
        n_copies = self.frame_bytes // copy_bytes
        if n_copies >= 1:
            options[f"n_augmentations={n_copies}"] = self.fitting(n_copies * copy_bytes)
        dim_bytes = self.record_bytes // self.latent_dim
        dim = self.frame_bytes // dim_bytes
        if dim >= 1:
            options[f"a features extractor whose latent has {dim} numbers"] = self.fitting(dim * dim_bytes)
        remedies = [f"{option} holds {n:,}" for option, n in options.items() if n >= self.image_transitions]
        raise ValueError(
            f"The latents of an observation ({self.record_bytes:,} bytes) are larger than its image "
            f"({self.frame_bytes:,} bytes): freezing would shrink buffer_size from {self.image_transitions:,} to "
            f"{self.latent_transitions:,} transitions. Instead: {'; '.join(remedies) or 'larger images'}."
        )

    def __str__(self) -> str:
        parts = " + ".join(f"{key} {n_bytes:,}" for key, n_bytes in self.bytes_of.items()) if len(self.bytes_of) > 1 else ""
        return (
            f"images: {self.image_transitions:,} transitions in {self.image_bytes / 1e6:,.1f} MB "
            f"({self.frame_bytes:,} bytes each{': ' + parts if parts else ''})\n"
            f"latents: {self.latent_transitions:,} transitions in {self.latent_bytes / 1e6:,.1f} MB "
            f"({self.record_bytes:,} bytes each: {self.number_bytes} bytes x N={self.n_networks} networks "
            f"x K={self.n_augmentations} copies x L={self.latent_dim} numbers)\n"
            f"at most {self.total_bytes / 1e6:,.1f} MB in all, with {self.step_bytes:,} bytes for the rest of each transition"
        )

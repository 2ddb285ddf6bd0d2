"""Stored latents as a data set of torch."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from torch.utils.data import Dataset

from sb3_seer.common.storage import LatentStore

if TYPE_CHECKING:
    from sb3_seer.common.replay import LatentReplayBuffer


class LatentsDataset(Dataset[dict[str, th.Tensor]]):
    """
    The transitions of a replay buffer in the latents stage, for a ``DataLoader``: of the first env from the oldest to the
    newest, then of the second... It is a view: items change when transitions are added to the buffer.

    An item has ``latents`` and ``next_latents`` of shape ``(K, N, L)``, in float32; ``actions``, ``rewards``, ``dones`` (of
    terminations alone) and ``timeouts``; ``continues``, whether the next item goes on from ``next_latents``; and of ``Dict``
    observations ``vector_obs`` and ``next_vector_obs``, by key. One step, not n, and not normalised.

    :param buffer: with at least one transition
    :raises ValueError: if it has images, or no transition
    """

    def __init__(self, buffer: "LatentReplayBuffer"):
        if not isinstance(buffer.store, LatentStore) or buffer.size() == 0:
            raise ValueError(f"`buffer` must hold latents, got {buffer.size()} transitions in the stage {buffer.stage!r}")
        self.buffer = buffer

    def __len__(self) -> int:
        return self.buffer.size() * self.buffer.n_envs

    def __getitem__(self, index: int) -> dict[str, Any]:
        """
        :param index: from 0 (or negative, from the end)
        :return: the transition
        """
        buffer, store = self.buffer, self.buffer.store
        assert isinstance(store, LatentStore)
        if not -len(self) <= index < len(self):
            raise IndexError(f"`index` must be from 0 to {len(self) - 1}, got {index}")
        env, step = divmod(index % len(self), buffer.size())
        row = (buffer.pos - buffer.size() + step) % buffer.buffer_size
        slot = int(buffer.slots_of(np.array(row)))
        n_copies = buffer.encoder.n_augmentations
        place = np.full(n_copies, slot), np.full(n_copies, env), np.arange(n_copies)
        timeout = buffer.timeouts[row, env]
        item: dict[str, Any] = dict(
            latents=buffer.decode(store.latents(*place)),
            next_latents=buffer.decode(store.next_latents(*place)),
            actions=buffer.to_torch(buffer.actions[row, env]),
            rewards=buffer.to_torch(buffer.rewards[row, env]),
            dones=buffer.to_torch(buffer.dones[row, env] * (1 - timeout)),
            timeouts=buffer.to_torch(timeout),
            continues=buffer.to_torch(store.is_linked[slot, env]),
        )
        if buffer.vector_obs:
            item["vector_obs"] = {key: buffer.to_torch(array[row, env, 0]) for key, array in buffer.vector_obs.items()}
            item["next_vector_obs"] = {key: buffer.to_torch(array[row, env, 1]) for key, array in buffer.vector_obs.items()}
        return item

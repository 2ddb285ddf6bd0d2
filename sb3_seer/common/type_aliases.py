"""Types shared by the replay buffer, which stores latents, and the networks, which read them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import TensorDict

Observations = np.ndarray | dict[str, np.ndarray]


@dataclass(frozen=True)
class Latents:
    """
    A batch of latents, tagged so that a network need not guess from a shape whether it was given images or latents.

    Networks have tensors of their own, so that the graph of one network's loss has no part of another's.

    :param by_network: for each of the N networks with its own latent, a float32 tensor of shape ``(batch_size, L)``
    :param vector_obs: of ``Dict`` observations, the keys without images
    :param by_target: the same for the target networks, None if they share the online networks' latents
    """

    by_network: tuple[th.Tensor, ...]
    vector_obs: TensorDict = field(default_factory=dict)
    by_target: tuple[th.Tensor, ...] | None = None

    @property
    def values(self) -> th.Tensor:
        """the latents of all networks, shape ``(batch_size, N, L)``"""
        return th.stack(self.by_network, dim=1)

    def of(self, index: int, is_target: bool) -> th.Tensor:
        """
        :param index: ``latent_index`` of a network
        :param is_target: whether it is a target network
        :return: a copy of its latents, as its head may work in place; shape ``(batch_size, L)``
        :raises ValueError: if the batch was not encoded for it
        """
        parts = self.by_target if is_target and self.by_target is not None else self.by_network
        if index >= len(parts):
            networks = "target" if is_target else "online"
            raise ValueError(
                f"These observations were not encoded for the {networks} networks. If train() needs them, set "
                "policy_kwargs=dict(tie_convolutions=False)"
            )
        return parts[index].clone()

    def first(self, n: int) -> "Latents":
        """:return: the first ``n`` latents of the batch"""
        return self._map(lambda part: part[:n])

    def detach(self) -> "Latents":
        """:return: the same latents without the graph that computed them"""
        return self._map(th.Tensor.detach)

    def _map(self, function: Callable[..., th.Tensor], *others: "Latents") -> "Latents":
        """:return: the function's results for each tensor, and the same tensor of the others"""
        batches = (self, *others)
        return Latents(
            tuple(map(function, *(batch.by_network for batch in batches))),
            {key: function(*(batch.vector_obs[key] for batch in batches)) for key in self.vector_obs},
            None if self.by_target is None else tuple(map(function, *(batch.by_target or () for batch in batches))),
        )

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> "Latents":
        """``th.cat([latents, others], dim=0)``, of which CrossQ's joint forward pass consists."""
        dim = (kwargs or {}).get("dim", args[1] if len(args) > 1 else 0)
        if function is not th.cat or dim != 0:
            return NotImplemented
        first, *others = args[0]
        return first._map(lambda *parts: th.cat(parts), *others)

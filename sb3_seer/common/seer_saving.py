"""How a SEER algorithm and its replay buffer are saved and loaded."""

import io
import pathlib
from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import partial
from typing import Any

import torch as th
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import TensorDict

from sb3_seer.common.buffer_file import load_buffer, replacing, save_buffer
from sb3_seer.common.replay import LatentReplayBuffer


class SEERSaving(OffPolicyAlgorithm):
    """
    Mixin for an algorithm with a ``LatentReplayBuffer``: files are whole or not replaced, and latents are never mixed up
    with another encoder's.
    """

    policy: Any  # a SEERPolicy if there is an encoder to freeze
    replay_buffer: LatentReplayBuffer | None  # if there is one
    freeze_after: int | float | None
    encoder_frozen: bool
    _make_replay_buffer: Callable[..., LatentReplayBuffer]

    def set_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        """
        Load parameters, see :meth:`~stable_baselines3.common.base_class.BaseAlgorithm.set_parameters`.

        :param load_path_or_dict: path of a saved model, or nested dictionary with the parameters of its modules
        :param exact_match: whether all parameters must be given, and no others
        :param device: device on which the code should run
        :raises ValueError: if the replay buffer holds latents, and they are not those of the encoder to be loaded;
            the model keeps its parameters then
        """
        if not self.encoder_frozen or self.replay_buffer is None or self.replay_buffer.size() == 0:
            super().set_parameters(load_path_or_dict, exact_match, device)
            return
        encoder = self.replay_buffer.encoder_fingerprint
        parameters: Any = deepcopy(self.get_parameters())
        try:
            super().set_parameters(load_path_or_dict, exact_match, device)
            if (loaded := self.policy.encoder_fingerprint()) != encoder:
                raise ValueError(
                    f"The replay buffer holds latents of encoder {encoder}, but the parameters are of encoder {loaded}"
                )
        except BaseException:
            super().set_parameters(parameters)
            raise

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save all the attributes of the object and the model parameters in a zip-file. A file at ``path`` is replaced once
        that is done: whatever happens, there is a whole file, the old one or the new one.

        :param path: path to the file where the rl agent should be saved
        :param exclude: name of parameters that should be excluded in addition to the default ones
        :param include: name of parameters that might be excluded but should be included anyway
        """
        with replacing(path, "zip") as file:
            super().save(file, exclude, include)

    def save_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase) -> None:
        """
        Save the replay buffer: an uncompressed zip of numpy's arrays, of what is filled. A file at ``path`` is replaced
        once that is done. (Without an encoder to freeze: a pickle, as in SB3.)

        :param path: path to the file where the replay buffer should be saved
        """
        if isinstance(self.replay_buffer, LatentReplayBuffer):
            save_buffer(self.replay_buffer, path, self.verbose)
            return
        with replacing(path, "pkl", self.verbose) as file:
            super().save_replay_buffer(file)

    def load_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase, truncate_last_traj: bool = True) -> None:
        """
        Load a replay buffer. One that holds images becomes one of latents if the encoder is frozen.

        :param path: path to a replay buffer that ``save_replay_buffer`` wrote, or that the SB3 class pickled
        :param truncate_last_traj: not used: a trajectory that is not continued is seen as truncated
        :raises ValueError: if the file is damaged or of a later version; if the buffer is of another kind or shape, holds
            the latents of another encoder, or holds latents while this model's encoder still learns. The model keeps
            the buffer that it had
        """
        if not isinstance(self.replay_buffer, LatentReplayBuffer):
            super().load_replay_buffer(path, truncate_last_traj)
            return
        ours = self.replay_buffer
        make_buffer = partial(self._make_replay_buffer, ours.encoder.augmentation)
        replay_buffer = load_buffer(path, ours, make_buffer, self.policy, self.encoder_frozen, self.verbose)
        if self.encoder_frozen and replay_buffer.stage == "images":
            replay_buffer.encoder.codec = ours.encoder.codec
            replay_buffer.to_latents()
        if self.freeze_after is not None:
            replay_buffer.check_capacity()
        self.replay_buffer = replay_buffer

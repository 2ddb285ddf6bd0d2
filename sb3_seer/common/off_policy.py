import warnings
from collections.abc import Iterable
from typing import Any, TypeVar

import torch as th
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import MaybeCallback

from sb3_seer.common.buffer_file import save_buffer
from sb3_seer.common.priorities import is_prioritized
from sb3_seer.common.process import zero_subnormals
from sb3_seer.common.replay import LatentReplayBuffer
from sb3_seer.common.save_util import PathOrFile, open_atomic

SelfOffPolicy = TypeVar("SelfOffPolicy", bound="OffPolicyMixin")


class OffPolicyMixin(OffPolicyAlgorithm):
    """
    Mixin for off-policy algorithms that make their own replay buffers: what SEER algorithms and Rainbow share.

    A file that is saved replaces the one at its path once it is complete: whatever happens, there is a whole file, the old
    one or the new one.
    """

    def _setup_model(self) -> None:
        with warnings.catch_warnings():
            if self.replay_buffer is not None:  # SB3 does not know that it was given its n_steps
                warnings.filterwarnings("ignore", message=r"`n_steps=\d+` is ignored")
            super()._setup_model()

    def learn(
        self: SelfOffPolicy,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfOffPolicy:
        name = tb_log_name or type(self).__name__
        return super().learn(total_timesteps, callback, log_interval, name, reset_num_timesteps, progress_bar)

    def _update_learning_rate(self, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer) -> None:
        # Each train() begins with this call
        super()._update_learning_rate(optimizers)
        zero_subnormals(self, optimizers)
        replay_buffer: Any = self.replay_buffer
        if is_prioritized(replay_buffer):
            replay_buffer.priorities.progress_remaining = self._current_progress_remaining

    def save(
        self,
        path: PathOrFile,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save all the attributes of the object and the model parameters in a zip-file, which replaces one at ``path`` once it is
        complete.

        :param path: path to the file where the rl agent should be saved
        :param exclude: name of parameters that should be excluded in addition to the default ones
        :param include: name of parameters that might be excluded but should be included anyway
        """
        with open_atomic(path, "zip") as file:
            super().save(file, exclude, include)

    def save_replay_buffer(self, path: PathOrFile) -> None:
        """
        Save the replay buffer: a ``LatentReplayBuffer`` as an uncompressed zip of numpy's arrays, of the rows that are filled,
        any other as a pickle. A file at ``path`` is replaced once the new one is complete.

        :param path: path to the file where the replay buffer should be saved
        """
        if isinstance(self.replay_buffer, LatentReplayBuffer):
            save_buffer(self.replay_buffer, path, self.verbose)
            return
        with open_atomic(path, "pkl", self.verbose) as file:
            super().save_replay_buffer(file)

    def load_replay_buffer(self, path: PathOrFile, truncate_last_traj: bool = True) -> None:
        """
        Load a replay buffer from a pickle file. It takes ``n_steps``, ``gamma`` and the exponents of priorities of the model.

        :param path: Path to the pickled replay buffer.
        :param truncate_last_traj: see the SB3 class
        :raises ValueError: if the buffer is of another class than the model's, which follows from ``n_steps`` and priorities.
            The model keeps the buffer that it had
        """
        ours: Any = getattr(self, "replay_buffer", None)  # users drop it to free its memory
        super().load_replay_buffer(path, truncate_last_traj)
        loaded: Any = self.replay_buffer
        if ours is None:
            return
        if type(loaded) is not type(ours):
            self.replay_buffer = ours
            raise ValueError(
                f"The replay buffer in {path} must be a {type(ours).__name__}, as in this model, got {type(loaded).__name__}"
            )
        for name in ("n_steps", "gamma"):
            if hasattr(ours, name):
                setattr(loaded, name, getattr(ours, name))
        if is_prioritized(ours):
            loaded.priorities.take_settings(ours.priorities)

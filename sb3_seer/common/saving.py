from collections.abc import Iterable

from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_seer.common.buffer_file import save_buffer
from sb3_seer.common.replay import LatentReplayBuffer
from sb3_seer.common.save_util import PathOrFile, open_atomic


class AtomicSaving(OffPolicyAlgorithm):
    """
    Mixin: a file that is saved replaces the one at its path once it is complete. Whatever happens, there is a whole file, the
    old one or the new one.
    """

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

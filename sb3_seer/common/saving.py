from collections.abc import Iterable

from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

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
        Save the replay buffer as a pickle file, which replaces one at ``path`` once it is complete.

        :param path: path to the file where the replay buffer should be saved
        """
        with open_atomic(path, "pkl", self.verbose) as file:
            super().save_replay_buffer(file)

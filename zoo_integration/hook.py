"""
The start-up hook: registers ``sb3_seer`` with RL Zoo when, and only when, RL Zoo is imported.

``python -m rl_zoo3.train --algo sac_seer`` must know the algorithm before it parses its arguments, and RL Zoo has
no plug-ins. So the file ``sb3_seer_zoo.pth``, in site-packages, waits in every interpreter for the import of RL Zoo,
and then calls :func:`install`. Whatever goes wrong here, RL Zoo goes on without us, and its user reads why, once.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

ZOO_MODULES = ("rl_zoo3", "rl_zoo3.hyperparams_opt", "rl_zoo3.exp_manager")
"""The modules that :mod:`zoo_integration.registration` adds to, each just after its own code has run."""


class ZooFinder:
    """Finds the modules of ``ZOO_MODULES`` through the other finders, and acts after their import."""

    def __init__(self) -> None:
        self.reported = False

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """
        :param name: full name of the module to import
        :param path: where to look for it
        :param target: the module to reload, if any
        :return: how to import it, or None to leave it to the other finders: so for all modules but RL Zoo's
        """
        if name not in ZOO_MODULES:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                try:
                    self._register_after_import(spec)
                except Exception as error:
                    self._report(error)
                return spec
        return None

    def _register_after_import(self, spec: ModuleSpec) -> None:
        loader = spec.loader
        assert loader is not None
        exec_module = loader.exec_module

        def exec_and_register(module: ModuleType) -> None:
            loader.exec_module = exec_module  # type: ignore[method-assign]
            exec_module(module)
            try:
                from zoo_integration.registration import register_in

                register_in(module)
            except Exception as error:
                self._report(error)

        loader.exec_module = exec_and_register  # type: ignore[method-assign]

    def _report(self, error: Exception) -> None:
        if not self.reported:
            self.reported = True
            print(
                f"sb3_seer could not register with RL Zoo: {type(error).__name__}: {error}\n"
                "SB3_SEER_NO_ZOO_HOOK=1 keeps it from trying.",
                file=sys.stderr,
            )


def install() -> ZooFinder:
    """
    Register with the modules of RL Zoo that are imported from now on. A second call changes nothing.

    :return: what finds them
    """
    for finder in sys.meta_path:
        if isinstance(finder, ZooFinder):
            return finder
    zoo_finder = ZooFinder()
    sys.meta_path.insert(0, zoo_finder)
    return zoo_finder

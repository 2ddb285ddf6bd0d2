"""
The start-up hook: registers ``sb3_seer`` with RL Zoo when, and only when, RL Zoo is imported.

``python -m rl_zoo3.train --algo sac_seer`` must know the algorithm before it parses its arguments, and RL Zoo has
no plug-ins. So ``sb3_seer_zoo.pth``, in site-packages, calls :func:`install` at the start of every interpreter. Until RL Zoo
is imported, this module imports nothing that Python has not already.
"""

import os
import sys

TYPE_CHECKING = False  # the module typing takes milliseconds
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType


class ZooFinder:
    """Finds ``rl_zoo3`` through the other finders, and registers once its code has run. Then it is gone."""

    @staticmethod
    def find_spec(name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None) -> "ModuleSpec | None":
        """
        :param name: full name of the module to import
        :param path: where to look for it
        :param target: the module to reload, if any
        :return: how to import ``rl_zoo3``; None for all other modules, which other finders find
        """
        if name != "rl_zoo3":
            return None
        from importlib.util import find_spec

        sys.meta_path.remove(ZooFinder)
        try:
            spec = find_spec(name)
        finally:
            sys.meta_path.insert(0, ZooFinder)
        if spec is not None and spec.loader is not None:
            exec_module = spec.loader.exec_module

            def exec_and_register(module: "ModuleType") -> None:
                exec_module(module)
                if ZooFinder in sys.meta_path:
                    sys.meta_path.remove(ZooFinder)
                _register()

            spec.loader.exec_module = exec_and_register  # type: ignore[method-assign]
        return spec


def install() -> type[ZooFinder]:
    """
    Register with RL Zoo once it is imported, unless ``SB3_SEER_NO_ZOO_HOOK=1`` is set. A second call changes nothing.

    :return: the finder, for the ``.pth`` file of 0.1.0, which an editable installation keeps
    """
    if os.environ.get("SB3_SEER_NO_ZOO_HOOK", "0") in ("", "0") and ZooFinder not in sys.meta_path:
        sys.meta_path.insert(0, ZooFinder)
    return ZooFinder


def _register() -> None:
    # Whatever goes wrong, RL Zoo goes on without us
    try:
        import zoo_integration.registration  # noqa: F401
    except Exception as error:
        print(
            f"sb3_seer could not register with RL Zoo: {type(error).__name__}: {error}\n"
            "SB3_SEER_NO_ZOO_HOOK=1 keeps it from trying.",
            file=sys.stderr,
        )

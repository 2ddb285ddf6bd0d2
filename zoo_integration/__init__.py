"""
RL Zoo knows the algorithms of ``sb3_seer``: nothing needs to be imported for it, see :mod:`zoo_integration.hook`.
"""

__all__ = ["register", "register_algorithm"]


def register() -> None:
    """
    Register the algorithms of ``sb3_seer`` and their hyperparameters with RL Zoo.

    The start-up hook does the same when ``rl_zoo3`` is imported, unless ``SB3_SEER_NO_ZOO_HOOK=1`` is set.
    A second call changes nothing.

    :raises ImportError: if RL Zoo is not installed
    """
    from importlib.util import find_spec

    if find_spec("rl_zoo3") is None:
        raise ImportError('RL Zoo is not installed: pip install "sb3_seer[zoo]"')
    import zoo_integration.registration  # noqa: F401


def register_algorithm(name: str, algorithm: type, base: str) -> None:
    """
    Register an algorithm of your own with RL Zoo, before its scripts run: ``--algo NAME`` then trains it, with the
    hyperparameters of ``-conf``. It may be a SEER algorithm or not.

    :param name: RL Zoo's name for it
    :param algorithm: its class
    :param base: RL Zoo's name of the algorithm that it extends: its hyperparameters are searched by ``-optimize``
    :raises ValueError: if RL Zoo has no such ``base``
    :raises ImportError: if RL Zoo is not installed
    """
    register()
    from zoo_integration.registration import add_to_tables

    add_to_tables(name, algorithm, base)

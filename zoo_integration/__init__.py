"""
RL Zoo knows the algorithms of ``sb3_seer``: nothing needs to be imported for it, see :mod:`zoo_integration.hook`.
"""

__all__ = ["register"]


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

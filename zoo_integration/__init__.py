"""
RL Zoo knows the algorithms of ``sb3_seer``: nothing needs to be imported for it, see :mod:`zoo_integration.hook`.
"""

__all__ = ["register"]


def register() -> None:
    """
    Register the algorithms, their hyperparameters and the environments of ``sb3_seer`` with RL Zoo, at once.

    The start-up hook does the same when ``rl_zoo3`` is imported, unless ``SB3_SEER_NO_ZOO_HOOK=1`` is set.
    A second call changes nothing.

    :raises ImportError: if RL Zoo is not installed
    """
    from zoo_integration.registration import register_all

    register_all()

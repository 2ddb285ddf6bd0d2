"""What ``-optimize`` searches over: what RL Zoo's sampler for the base algorithm does, T_f and K."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna

configured_hyperparams: ContextVar[dict[str, Any]] = ContextVar("configured_hyperparams")
"""The configured hyperparameters of the trial that this thread runs."""


def without_tau(function: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """
    :param function: RL Zoo's sampler or converter for an algorithm with a target network
    :return: the same for one without
    """

    def call(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return {name: value for name, value in function(*args, **kwargs).items() if name != "tau"}

    return call


def sample_with_configured_policy(
    sample_base_params: Callable[..., dict[str, Any]],
    trial: "optuna.Trial",
    *args: Any,
) -> dict[str, Any]:
    """
    Sampler for the hyperparameters of an algorithm that keeps what is configured of its policy, like the features extractor.

    :param sample_base_params: RL Zoo's sampler for the algorithm that is extended
    :param trial: Optuna's trial
    :param args: as for ``sample_base_params``
    :return: hyperparameters, to update the configured ones
    """
    hyperparams = sample_base_params(trial, *args)
    # The update is not deep: without this line, it would drop the configured features extractor
    configured = configured_hyperparams.get({}).get("policy_kwargs") or {}
    hyperparams["policy_kwargs"] = {**configured, **hyperparams["policy_kwargs"]}
    return hyperparams


def sample_seer_params(
    sample_base_params: Callable[..., dict[str, Any]],
    trial: "optuna.Trial",
    *args: Any,
) -> dict[str, Any]:
    """
    Sampler for the hyperparameters of a SEER algorithm.

    * T_f (``freeze_after``) from 5 to 60 % of a trial, around the 10 to 64 % of the paper (figures 2 and 3); not where
      the configuration says never (``freeze_after: null``), ``auto`` or from the first step (0), nor where a
      ``FreezeEncoderCallback`` among its callbacks takes the place of the parameter
    * K (``n_augmentations``) only where an augmentation is configured, from the configured ``n_views`` to the configured K:
      K latents must fit into the memory of an image, and the configured K is known to fit

    :param sample_base_params: RL Zoo's sampler for the algorithm that is extended
    :param trial: Optuna's trial
    :param args: as for ``sample_base_params``
    :return: hyperparameters, to update the configured ones
    """
    configured = configured_hyperparams.get({})
    hyperparams = sample_with_configured_policy(sample_base_params, trial, *args)

    has_callback = "FreezeEncoderCallback" in str(configured.get("callback"))
    if configured.get("freeze_after", 0.2) not in (None, "auto", 0) and not has_callback:
        hyperparams["freeze_after"] = trial.suggest_float("freeze_after", 0.05, 0.6, step=0.05)
    n_views, max_augmentations = configured.get("n_views", 1), configured.get("n_augmentations", 1)
    if max_augmentations > n_views:
        hyperparams["n_augmentations"] = trial.suggest_int("n_augmentations", n_views, max_augmentations)
    return hyperparams

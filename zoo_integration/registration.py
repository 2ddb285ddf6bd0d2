"""What RL Zoo is told about ``sb3_seer``. It has no plug-ins: its tables and one class are changed in place."""

import functools
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import gymnasium as gym
from gymnasium.error import DependencyNotInstalled

import sb3_seer
import sb3_seer.envs  # registers the ids of dm_control
from sb3_seer.common.seer import SEERMixin
from zoo_integration.hook import ZOO_MODULES
from zoo_integration.samplers import configured_hyperparams, sample_seer_params, sample_with_configured_policy

if TYPE_CHECKING:
    import optuna
    from rl_zoo3.exp_manager import ExperimentManager

ALGORITHMS = {
    # RL Zoo's name: the class, and RL Zoo's name of the algorithm that it extends
    "curl_seer": (sb3_seer.SEERCURL, "sac"),
    "dqn_seer": (sb3_seer.SEERDQN, "dqn"),
    "qrdqn_seer": (sb3_seer.SEERQRDQN, "qrdqn"),
    "rainbow": (sb3_seer.Rainbow, "dqn"),
    "rainbow_seer": (sb3_seer.SEERRainbow, "dqn"),
    "sac_seer": (sb3_seer.SEERSAC, "sac"),
}


def register_all() -> None:
    """
    Import RL Zoo and register with all of its modules.

    :raises ImportError: if RL Zoo is not installed
    """
    if importlib.util.find_spec("rl_zoo3") is None:
        raise ImportError('RL Zoo is not installed: pip install "sb3_seer[zoo]"')
    for name in ZOO_MODULES:
        register_in(importlib.import_module(name))


def register_in(module: ModuleType) -> None:
    """
    Register with one module of RL Zoo. A second call changes nothing.

    :param module: one of ``ZOO_MODULES``, imported
    """
    if not hasattr(module, "_registered_sb3_seer"):
        _REGISTER[module.__name__](module)
        module._registered_sb3_seer = True  # type: ignore[attr-defined]


def hyperparams_folder() -> Path:
    """
    :return: where the files of hyperparameters are: below this folder in the wheel, next to it in the repository
    """
    here = Path(__file__).parent
    return (here if (here / "hyperparams").is_dir() else here.parent) / "hyperparams"


def default_config(algo: str) -> Path:
    """
    :param algo: a name in ``ALGORITHMS``
    :return: the file of its hyperparameters
    """
    return hyperparams_folder() / f"{algo}.yml"


def find_config(config: str) -> str:
    """
    Find a file of hyperparameters by its name alone. One in the working directory comes first.

    :param config: what RL Zoo was given as ``-conf``
    :return: the file of this package with that name, if ``config`` is the name of a YAML file that is not in the working
        directory. Else ``config``: a path or a Python package, which are RL Zoo's to read
    :raises FileNotFoundError: if this package has no such file either
    """
    name = Path(config)
    if name.suffix not in (".yml", ".yaml") or name.name != config or name.exists():
        return config
    files = {file.name: file for file in sorted(hyperparams_folder().rglob("*.yml"))}
    if config not in files:
        raise FileNotFoundError(
            f"{config} is not in the working directory ({Path.cwd()}), and not one of the files that come with sb3_seer: "
            f"{', '.join(files)}"
        )
    return str(files[config])


def _add_algorithms(rl_zoo3: ModuleType) -> None:
    # ALGOS is one dict, which several modules import
    rl_zoo3.ALGOS.update({name: algorithm for name, (algorithm, _) in ALGORITHMS.items()})
    # -params policy_kwargs:"dict(features_extractor_class=sb3_seer.PixelEncoder)" is evaluated in this namespace
    rl_zoo3.utils.sb3_seer = sb3_seer
    _stand_in_for_atari()
    _mend_push_to_hub()


def _add_samplers(hyperparams_opt: ModuleType) -> None:
    for name, (algorithm, base) in ALGORITHMS.items():
        sample_params = sample_seer_params if issubclass(algorithm, SEERMixin) else sample_with_configured_policy
        sample_base_params = hyperparams_opt.HYPERPARAMS_SAMPLER[base]
        hyperparams_opt.HYPERPARAMS_SAMPLER[name] = functools.partial(sample_params, sample_base_params)
        # It leaves what it does not know, our parameters, as it is
        hyperparams_opt.HYPERPARAMS_CONVERTER[name] = hyperparams_opt.HYPERPARAMS_CONVERTER[base]


def _change_experiment_manager(exp_manager: ModuleType) -> None:
    # And so are the strings of a YAML file in this one
    exp_manager.sb3_seer = sb3_seer  # type: ignore[attr-defined]
    manager = exp_manager.ExperimentManager
    manager.__init__ = _find_configs(manager.__init__)
    manager.objective = _show_hyperparams_to_samplers(manager.objective)
    manager.read_hyperparameters = _keep_policy_kwargs(manager.read_hyperparameters)


_REGISTER: dict[str, Callable[[ModuleType], None]] = {
    "rl_zoo3": _add_algorithms,
    "rl_zoo3.hyperparams_opt": _add_samplers,
    "rl_zoo3.exp_manager": _change_experiment_manager,
}


def _find_configs(init: Callable[..., None]) -> Callable[..., None]:
    """RL Zoo looks for hyperparameters in its own package and in the working directory; those of our algorithms are here."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def __init__(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        algo = bound.arguments["algo"]
        if algo in ALGORITHMS:
            config = bound.arguments.get("config")
            bound.arguments["config"] = find_config(config) if config else str(default_config(algo))
        init(*bound.args, **bound.kwargs)

    return __init__


def _show_hyperparams_to_samplers(
    objective: "Callable[[ExperimentManager, optuna.Trial], float]",
) -> "Callable[[ExperimentManager, optuna.Trial], float]":
    """What a sampler returns replaces what is configured, which it is not given. Ours have to know."""

    @functools.wraps(objective)
    def wrapper(self: "ExperimentManager", trial: "optuna.Trial") -> float:
        token = configured_hyperparams.set(self._hyperparams)
        try:
            return objective(self, trial)
        finally:
            configured_hyperparams.reset(token)

    return wrapper


_Hyperparams = tuple[dict[str, Any], dict[str, Any]]


def _keep_policy_kwargs(
    read_hyperparameters: "Callable[[ExperimentManager], _Hyperparams]",
) -> "Callable[[ExperimentManager], _Hyperparams]":
    """The hyperparameters of an Optuna trial (``--trial-id``) replace all ``policy_kwargs``: keep the features extractor."""

    @functools.wraps(read_hyperparameters)
    def wrapper(self: "ExperimentManager") -> _Hyperparams:
        hyperparams, saved_hyperparams = read_hyperparameters(self)
        from_trial = self.storage and self.study_name and self.trial_id
        if self.algo in ALGORITHMS and from_trial and "policy_kwargs" not in (self.custom_hyperparams or {}):
            # Without a storage there is no trial: read the file alone
            storage, self.storage = self.storage, None
            with redirect_stdout(StringIO()):
                configured = read_hyperparameters(self)[0].get("policy_kwargs", "{}")
            self.storage = storage
            # A string, like in the file, that RL Zoo evaluates
            policy_kwargs = f"{{**{configured}, **{hyperparams['policy_kwargs']!r}}}"
            hyperparams["policy_kwargs"] = saved_hyperparams["policy_kwargs"] = policy_kwargs
        return hyperparams, saved_hyperparams

    return wrapper


def _mend_push_to_hub() -> None:
    # rl_zoo3 2.9.2 imports a function that sb3-team-hf-integration 3.2, which it asks for, has by another name and
    # with another type of result: python -m rl_zoo3.push_to_hub fails
    module: Any = importlib.import_module("huggingface_sb3.push_to_hub")
    if not hasattr(module, "generate_metadata") and hasattr(module, "_generate_metadata"):
        module.generate_metadata = lambda *args: module._generate_metadata(*args).to_dict()


class MissingAtariEnv(gym.Env):
    """
    Stands for an Atari game while ale-py is missing.

    :raises gymnasium.error.DependencyNotInstalled: always
    """

    def __init__(self, **kwargs: Any) -> None:
        raise DependencyNotInstalled('Atari games need ale-py: pip install "sb3_seer[atari]"')


def _stand_in_for_atari() -> None:
    # Without ale-py, RL Zoo would say of a game that it does not know it, and suggest an environment with a similar name
    if importlib.util.find_spec("ale_py") is None:
        for argument in sys.argv:
            if re.fullmatch(r"ALE/\w+-v\d|\w+NoFrameskip-v\d", argument) and argument not in gym.registry:
                gym.register(argument, "zoo_integration.registration:MissingAtariEnv")

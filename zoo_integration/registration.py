"""
Importing this module registers ``sb3_seer`` with RL Zoo. RL Zoo has no interface for plug-ins:
its tables, three methods of its ``ExperimentManager``, and two functions that write cards for the Hub are changed in place.
"""

import functools
import importlib
import sys
import weakref
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import optuna
import rl_zoo3.exp_manager
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from stable_baselines3.common.base_class import BaseAlgorithm

import sb3_seer
from sb3_seer.common.process import tune_process
from sb3_seer.common.seer import SEERMixin
from zoo_integration.hub import extend_card
from zoo_integration.samplers import configured_hyperparams, sample_seer_params, sample_with_configured_policy, without_tau

ALGORITHMS: dict[str, tuple[type[BaseAlgorithm], str]] = {
    # RL Zoo's name: the class, and RL Zoo's name of the algorithm that it extends
    "crossq_seer": (sb3_seer.SEERCrossQ, "crossq"),
    "curl_seer": (sb3_seer.SEERCURL, "sac"),
    "dqn_seer": (sb3_seer.SEERDQN, "dqn"),
    "qrdqn_seer": (sb3_seer.SEERQRDQN, "qrdqn"),
    "rainbow": (sb3_seer.Rainbow, "dqn"),
    "rainbow_seer": (sb3_seer.SEERRainbow, "dqn"),
    "sac_seer": (sb3_seer.SEERSAC, "sac"),
    "td3_seer": (sb3_seer.SEERTD3, "td3"),
    "tqc_seer": (sb3_seer.SEERTQC, "tqc"),
}

# ---- hyperparameters ----


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
        directory. Else ``config``: a path or a Python package, which RL Zoo reads
    :raises FileNotFoundError: if this package has no such file either
    """
    name = Path(config)
    if name.suffix not in (".yml", ".yaml") or name.name != config or name.exists():
        return config
    files = {file.name: file for file in sorted(hyperparams_folder().rglob("*.yml"))}
    if config not in files:
        raise FileNotFoundError(
            f"`-conf` must be a file in the working directory ({Path.cwd()}) or one of {', '.join(files)}, got {config}"
        )
    return str(files[config])


# ---- RL Zoo's tables ----

# It searches no hyperparameters of CrossQ. SAC's are the same but for the target
for table in (HYPERPARAMS_SAMPLER, HYPERPARAMS_CONVERTER):
    table.setdefault("crossq", without_tau(table["sac"]))


def add_to_tables(name: str, algorithm: type[BaseAlgorithm], base: str) -> None:
    """
    :param name: RL Zoo's name of an algorithm
    :param algorithm: its class
    :param base: RL Zoo's name of the algorithm that it extends
    :raises ValueError: if RL Zoo searches no hyperparameters of ``base``
    """
    if base not in HYPERPARAMS_SAMPLER:
        raise ValueError(f"`base` must be one of {', '.join(HYPERPARAMS_SAMPLER)}, got {base!r}")
    ALGORITHMS[name] = algorithm, base
    # One dict, which several modules import
    rl_zoo3.ALGOS[name] = algorithm
    sample_params = sample_seer_params if issubclass(algorithm, SEERMixin) else sample_with_configured_policy
    HYPERPARAMS_SAMPLER[name] = functools.partial(sample_params, HYPERPARAMS_SAMPLER[base])
    # It leaves our parameters as they are
    HYPERPARAMS_CONVERTER[name] = HYPERPARAMS_CONVERTER[base]


for algo, (algorithm, base) in list(ALGORITHMS.items()):
    add_to_tables(algo, algorithm, base)

# Strings of a YAML file, such as "dict(features_extractor_class=sb3_seer.PixelEncoder)", are evaluated in the first namespace,
# those after -params in the second
for zoo_module in (rl_zoo3.exp_manager, rl_zoo3.utils):
    zoo_module.sb3_seer = sb3_seer  # type: ignore[attr-defined]

# gymnasium knows an id of dm_control once shimmy is imported. As that takes a second, only if there is one on the command line
if any("dm_control/" in argument for argument in sys.argv):
    import sb3_seer.envs

# ---- RL Zoo's ExperimentManager ----

_init, _objective = ExperimentManager.__init__, ExperimentManager.objective
_read_hyperparameters = ExperimentManager.read_hyperparameters


@functools.wraps(_init)
def init(self: ExperimentManager, args: Any, algo: str, *others: Any, **kwargs: Any) -> None:
    """RL Zoo looks for hyperparameters in its own package and in the working directory; find the files of this package."""
    if algo in ALGORITHMS:
        config = kwargs.get("config")
        if config:
            kwargs["config"] = find_config(config)
        elif default_config(algo).is_file():
            kwargs["config"] = str(default_config(algo))
        tune_process()
    _init(self, args, algo, *others, **kwargs)


@functools.wraps(_objective)
def objective(self: ExperimentManager, trial: optuna.Trial) -> float:
    """RL Zoo does not show a sampler the configured hyperparameters, which its result replaces. Give them to our samplers."""
    token = configured_hyperparams.set({**self._hyperparams, "callback": self.specified_callbacks})
    try:
        return _objective(self, trial)
    finally:
        configured_hyperparams.reset(token)


@functools.wraps(_read_hyperparameters)
def read_hyperparameters(self: ExperimentManager) -> tuple[dict[str, Any], dict[str, Any]]:
    """The hyperparameters of an Optuna trial (``--trial-id``) replace all ``policy_kwargs``: keep the features extractor."""
    from_trial = self.storage and self.study_name and self.trial_id
    if self.algo not in ALGORITHMS or not from_trial or "policy_kwargs" in (self.custom_hyperparams or {}):
        return _read_hyperparameters(self)
    # Without a storage there is no trial: read the file alone. First, as RL Zoo changes the dict of a Python package in place
    storage, self.storage = self.storage, None
    with redirect_stdout(StringIO()):
        configured = _read_hyperparameters(self)[0].get("policy_kwargs", {})
    self.storage = storage
    hyperparams, saved_hyperparams = _read_hyperparameters(self)
    of_trial = hyperparams["policy_kwargs"]
    # A string, as in a YAML file, is evaluated by RL Zoo
    is_string = isinstance(configured, str)
    policy_kwargs = f"{{**{configured}, **{of_trial!r}}}" if is_string else {**configured, **of_trial}
    hyperparams["policy_kwargs"] = saved_hyperparams["policy_kwargs"] = policy_kwargs
    return hyperparams, saved_hyperparams


ExperimentManager.__init__ = init  # type: ignore[method-assign]
ExperimentManager.objective = objective  # type: ignore[method-assign]
ExperimentManager.read_hyperparameters = read_hyperparameters  # type: ignore[method-assign]

# ---- the Hub ----

# python -m rl_zoo3.push_to_hub fails with every algorithm without this: rl_zoo3 2.9.2 imports a function that
# sb3-team-hf-integration 3.2, the only version that it allows, has by another name and with another type of result
_hub: Any = importlib.import_module("huggingface_sb3.push_to_hub")  # not the function of that name
if not hasattr(_hub, "generate_metadata"):
    _hub.generate_metadata = lambda *args: _hub._generate_metadata(*args).to_dict()

# The script evaluates the agent, writes the card, and then its metadata: three functions, of which it imports two
_repocard: Any = importlib.import_module("huggingface_hub.repocard")
_evaluate_agent, _metadata_save = _hub._evaluate_agent, _repocard.metadata_save
_agents: weakref.WeakValueDictionary[Path, Any] = weakref.WeakValueDictionary()  # the script holds them


@functools.wraps(_evaluate_agent)
def evaluate_agent(model: Any, eval_env: Any, n_eval_episodes: int, is_deterministic: bool, local_path: Path) -> Any:
    """Keep the agent for its card."""
    _agents[Path(local_path)] = model
    return _evaluate_agent(model, eval_env, n_eval_episodes, is_deterministic, local_path)


@functools.wraps(_metadata_save)
def metadata_save(local_path: str | Path, data: dict[str, Any]) -> None:
    """Add the section on SEER to the model card before RL Zoo adds the metadata."""
    folder = Path(local_path).parent
    if folder in _agents:
        extend_card(folder, _agents.pop(folder))
    _metadata_save(local_path, data)


_hub._evaluate_agent, _repocard.metadata_save = evaluate_agent, metadata_save

"""RL Zoo's own scripts, run as a user runs them, on environments of a few pixels."""

import importlib.util
import runpy
import shutil
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import optuna
import pytest
import rl_zoo3.enjoy
import rl_zoo3.exp_manager
import rl_zoo3.hyperparams_opt
import rl_zoo3.train
import rl_zoo3.utils
import torch as th
import yaml
from requests.exceptions import HTTPError
from sb3_contrib import QRDQN, TQC, CrossQ
from stable_baselines3 import DQN, SAC, TD3
from stable_baselines3.common.vec_env import DummyVecEnv

import zoo_integration
from sb3_seer import (
    SEERCURL,
    SEERDQN,
    SEERQRDQN,
    SEERSAC,
    SEERTD3,
    SEERTQC,
    DataEfficientCNN,
    PixelEncoder,
    Rainbow,
    SEERCrossQ,
    SEERRainbow,
)
from sb3_seer.common.seer import SEERMixin
from tests.helpers import DialEnv, LightEnv, is_continuous
from zoo_integration import hub, registration
from zoo_integration.registration import ALGORITHMS, default_config

zoo_integration.register()

SCRIPTS = ("train", "enjoy", "record_video", "record_training", "push_to_hub", "load_from_hub")


class VideoLightEnv(LightEnv):
    """What RL Zoo's scripts may ask for: a render mode."""

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, render_mode: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.render_mode = render_mode

    def render(self) -> np.ndarray:
        return np.full((64, 64, 3), 60 * self.lamp, np.uint8)


class VideoDialEnv(DialEnv):
    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 10}


# Large enough for the encoders of the default hyperparameters
gym.register("Light-v0", VideoLightEnv, kwargs=dict(size=48))
gym.register("Dial-v0", VideoDialEnv, kwargs=dict(size=48))
SMALL_ENCODER = {
    "curl_seer": "dict(features_extractor_class=sb3_seer.PixelEncoder, features_extractor_kwargs=dict(n_filters=2))",
    **dict.fromkeys(
        ("crossq_seer", "td3_seer", "tqc_seer"),
        "dict(features_extractor_class=sb3_seer.PixelEncoder, features_extractor_kwargs=dict(n_filters=2), net_arch=[16])",
    ),
    "sac_seer": "dict(features_extractor_class=sb3_seer.PixelEncoder, features_extractor_kwargs=dict(n_filters=2))",
    "qrdqn_seer": "dict(features_extractor_class=sb3_seer.DataEfficientCNN)",
    "dqn_seer": "dict(features_extractor_class=sb3_seer.DataEfficientCNN)",
    "rainbow": "dict(features_extractor_class=sb3_seer.DataEfficientCNN)",
    "rainbow_seer": "dict(features_extractor_class=sb3_seer.DataEfficientCNN)",
}
ENV_ID = {algo: "Dial-v0" if is_continuous(algorithm) else "Light-v0" for algo, (algorithm, _) in ALGORITHMS.items()}
SEER_ALGORITHMS = [algo for algo, (algorithm, _) in ALGORITHMS.items() if issubclass(algorithm, SEERMixin)]


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs a script of RL Zoo in an empty folder, with arguments as on the command line."""

    def run(script: str, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        # As python -m does, but without the seconds that the imports take
        main = {"train": rl_zoo3.train.train, "enjoy": rl_zoo3.enjoy.enjoy}.get(script)
        if main is not None:
            main()
        else:
            runpy.run_module(f"rl_zoo3.{script}", run_name="__main__")

    monkeypatch.chdir(tmp_path)
    return run


def train(zoo: Callable[..., None], algo: str, *arguments: str, params: tuple[str, ...] = (), n: int = 60) -> None:
    if algo in SEER_ALGORITHMS:
        params = ("freeze_after:0.5", *params)
    params = (f"policy_kwargs:{SMALL_ENCODER[algo]}", "learning_starts:10", "buffer_size:100", *params)
    arguments = ("--env", ENV_ID[algo], "-n", str(n), "--eval-freq", "-1", "--seed", "1", *arguments)
    zoo("train", "--algo", algo, *arguments, "-params", *params)


def load(algo: str, run: int = 1) -> Any:
    algorithm, _ = ALGORITHMS[algo]
    return algorithm.load(f"logs/{algo}/{ENV_ID[algo]}_{run}/{ENV_ID[algo]}.zip")


def test_registered_with_all_of_rl_zoo() -> None:
    for name, algorithm, base in (
        ("sac_seer", SEERSAC, SAC),
        ("curl_seer", SEERCURL, SEERSAC),
        ("td3_seer", SEERTD3, TD3),
        ("tqc_seer", SEERTQC, TQC),
        ("crossq_seer", SEERCrossQ, CrossQ),
        ("qrdqn_seer", SEERQRDQN, QRDQN),
        ("dqn_seer", SEERDQN, DQN),
        ("rainbow", Rainbow, DQN),
        ("rainbow_seer", SEERRainbow, Rainbow),
    ):
        assert rl_zoo3.ALGOS[name] is algorithm
        assert issubclass(algorithm, base)
        assert rl_zoo3.exp_manager.ALGOS is rl_zoo3.enjoy.ALGOS is rl_zoo3.ALGOS
        assert name in rl_zoo3.hyperparams_opt.HYPERPARAMS_SAMPLER
        assert name in rl_zoo3.hyperparams_opt.HYPERPARAMS_CONVERTER
        assert default_config(name).is_file()


def test_registering_again_changes_nothing() -> None:
    manager = rl_zoo3.exp_manager.ExperimentManager
    before = dict(vars(manager)), dict(rl_zoo3.ALGOS), dict(rl_zoo3.hyperparams_opt.HYPERPARAMS_SAMPLER)
    zoo_integration.register()
    assert before == (dict(vars(manager)), dict(rl_zoo3.ALGOS), dict(rl_zoo3.hyperparams_opt.HYPERPARAMS_SAMPLER))


def test_registering_without_rl_zoo_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "sb3_seer\[zoo\]"'):
        zoo_integration.register()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_misspelt_algorithm_is_answered_with_the_list(
    script: str, zoo: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        zoo(script, "--algo", "sac_sear", "--env", "Dial-v0", "-f", "logs")
    error = capsys.readouterr().err
    assert "invalid choice: 'sac_sear'" in error
    for name in ALGORITHMS:
        assert name in error


@pytest.mark.parametrize("algo", SEER_ALGORITHMS)
def test_train_continue_and_enjoy(algo: str, zoo: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    train(zoo, algo, "--save-replay-buffer", "-P")
    output = capsys.readouterr().out
    assert f"Loading hyperparameters from: {default_config(algo)}" in output
    model = load(algo)
    assert model.encoder_frozen
    folder = Path(f"logs/{algo}/{ENV_ID[algo]}_1")

    # -i continues with the model and the replay buffer that lies next to it
    train(zoo, algo, "-i", str(folder / f"{ENV_ID[algo]}.zip"), "--save-replay-buffer")
    assert "Loading replay buffer" in capsys.readouterr().out
    continued = load(algo, run=2)
    assert continued.encoder_frozen
    observations = np.stack([model.observation_space.sample() for _ in range(4)])
    th.testing.assert_close(continued.encode(observations), model.encode(observations), rtol=0, atol=0)
    assert continued._n_updates > model._n_updates
    continued.load_replay_buffer(f"logs/{algo}/{ENV_ID[algo]}_2/replay_buffer.pkl")
    assert continued.replay_buffer.stage == "latents"
    assert continued.replay_buffer.size() == 120

    zoo("enjoy", "--algo", algo, "--env", ENV_ID[algo], "-f", "logs", "--no-render", "-n", "25")
    assert "Mean episode length: 10.00" in capsys.readouterr().out


def test_train_continue_and_enjoy_without_a_freeze(zoo: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    train(zoo, "rainbow", "--save-replay-buffer")
    train(zoo, "rainbow", "-i", "logs/rainbow/Light-v0_1/Light-v0.zip", "--save-replay-buffer")
    assert "Loading replay buffer" in capsys.readouterr().out
    model, continued = load("rainbow"), load("rainbow", run=2)
    assert continued._n_updates > model._n_updates > 0
    continued.load_replay_buffer("logs/rainbow/Light-v0_2/replay_buffer.pkl")
    assert continued.replay_buffer.size() == 100
    zoo("enjoy", "--algo", "rainbow", "--env", "Light-v0", "-f", "logs", "--no-render", "-n", "25")
    assert "Mean episode length: 10.00" in capsys.readouterr().out


def test_the_default_hyperparameters_serve_an_environment_of_images(
    zoo: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    for algo in ALGORITHMS:
        zoo("train", "--algo", algo, "--env", ENV_ID[algo], "-n", "8", "--eval-freq", "4", "--eval-episodes", "1")
        assert "Using 'default' hyperparameters" in capsys.readouterr().out
    # Where SB3's default is no encoder for control
    for algo in ("sac_seer", "curl_seer", "td3_seer", "tqc_seer", "crossq_seer"):
        assert load(algo).policy_kwargs["features_extractor_class"] is PixelEncoder


def test_hyperparameters_given_win_over_the_default(zoo: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yml").write_text("Light-v0: {policy: CnnPolicy, n_timesteps: 5, buffer_size: 50, gamma: 0.5}")
    zoo("train", "--algo", "dqn_seer", "--env", "Light-v0", "-conf", "mine.yml", "--eval-freq", "-1")
    assert "Loading hyperparameters from: mine.yml" in capsys.readouterr().out
    assert load("dqn_seer").gamma == 0.5


def test_auto_is_a_time_to_freeze(zoo: Callable[..., None]) -> None:
    train(zoo, "dqn_seer", params=("freeze_after:'auto'",))
    assert load("dqn_seer").freeze_after == "auto"
    assert load("dqn_seer").encoder_frozen


def test_enjoy_does_not_allocate_the_replay_buffer(zoo: Callable[..., None]) -> None:
    # 2.3 GB
    train(zoo, "dqn_seer", params=("buffer_size:1000000",))
    tracemalloc.start()
    zoo("enjoy", "--algo", "dqn_seer", "--env", "Light-v0", "-f", "logs", "--no-render", "-n", "5")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e9


def test_record_video(zoo: Callable[..., None]) -> None:
    pytest.importorskip("moviepy", reason="It is in the extra that has RL Zoo")
    train(zoo, "dqn_seer")
    zoo("record_video", "--algo", "dqn_seer", "--env", "Light-v0", "-f", "logs", "-n", "5")
    assert list(Path("logs/dqn_seer/Light-v0_1/videos").glob("*.mp4"))


class FakeHub:
    """The Hugging Face Hub, in a folder: what was uploaded can be downloaded again."""

    def create_repo(self, **kwargs: Any) -> str:
        return "the url"

    def snapshot_download(self, repo_id: str, local_dir: Path) -> None:
        local_dir.mkdir(parents=True)

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
        shutil.copytree(folder_path, Path("remote") / repo_id)

    @staticmethod
    def load_from_hub(repo_id: str, filename: str) -> str:
        path = Path("remote") / repo_id / filename
        if not path.exists():
            raise HTTPError(filename)
        return str(path)


def test_push_to_hub_and_load_from_hub(zoo: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    monkeypatch.setattr("huggingface_sb3.load_from_hub", FakeHub.load_from_hub)
    train(zoo, "qrdqn_seer", "--eval-freq", "20", "--eval-episodes", "1")
    zoo("push_to_hub", "--algo", "qrdqn_seer", "--env", "Light-v0", "-f", "logs", "-orga", "someone", "--no-render")
    zoo("load_from_hub", "--algo", "qrdqn_seer", "--env", "Light-v0", "-f", "downloads", "-orga", "someone")
    model = SEERQRDQN.load("downloads/qrdqn_seer/Light-v0_1/Light-v0.zip")
    assert model.encoder_frozen

    (card,) = Path("remote/someone").glob("*/README.md")
    text = card.read_text()
    assert text.startswith("---\n") and "# **SEERQRDQN** Agent playing **Light-v0**" in text  # RL Zoo's part
    for row in (
        "| T_f (`freeze_after`) | 0.5: step 30 |",
        "| encoder | `DataEfficientCNN`, frozen |",
        "| latents | 64 numbers, float32, for 1 network |",
        "| K (`n_augmentations`) | 1, augmentation: None |",
        "| replay buffer | 100 transitions as images, 900 as latents, in the same 0.2 MB |",
        f"| operations | {model.flops_count.flops:.3g} (",
        "![Return of the evaluations](curve.png)",
    ):
        assert row in text
    assert (card.parent / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "The encoder was trained until T_f and then frozen" in text
    # Of a training that goes on from here and counts from 0 again, it is not known when that was
    model.set_env(DummyVecEnv([lambda: VideoLightEnv(size=48)]))
    assert "0.5 |" in hub.describe(model.learn(10))
    model.freeze_after = 0
    assert "The encoder was frozen from the first step" in hub.describe(model)
    model.encoder_frozen = False
    assert "The encoder was not frozen" in hub.describe(model)


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["sac_seer", "crossq_seer", "qrdqn_seer"])
def test_optimize_and_train_with_the_result(algo: str, zoo: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    study_arguments = ("--storage", "study.log", "--study-name", "study")
    optimize = ("-optimize", "--n-trials", "2", "--n-evaluations", "1", "--eval-episodes", "1", "--no-optim-plots")
    # K is searched up to what is configured
    params = ("augmentation:'random_shift'", "augmentation_kwargs:None", "n_augmentations:2")
    train(zoo, algo, *optimize, *study_arguments, "--optimization-log-path", "trials", params=params, n=20)

    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend("study.log"))
    trials = optuna.load_study(study_name="study", storage=storage).trials
    assert [trial.state for trial in trials] == [optuna.trial.TrialState.COMPLETE] * 2
    extractor = DataEfficientCNN if algo == "qrdqn_seer" else PixelEncoder
    net_archs = {"small": [64, 64], "medium": [256, 256], "big": [400, 300]}
    algorithm, _ = ALGORITHMS[algo]
    for trial in trials:
        assert 0.05 <= trial.params["freeze_after"] <= 0.6
        assert trial.params["n_augmentations"] in (1, 2)
        model = algorithm.load(f"trials/trial_{trial.number}/best_model.zip")
        assert model.freeze_after == trial.params["freeze_after"]
        assert model.n_augmentations == trial.params["n_augmentations"]
        # What is sampled is added to what is configured
        assert model.policy_kwargs["features_extractor_class"] is extractor
        assert model.policy_kwargs["net_arch"] == net_archs[trial.params["net_arch"]]

    # The same where a trial is read back. Its YAML is the file's alone: -params policy_kwargs would win over the trial
    Path("mine.yml").write_text(
        yaml.dump({ENV_ID[algo]: dict(policy="CnnPolicy", n_timesteps=10, policy_kwargs=SMALL_ENCODER[algo])})
    )
    shutil.rmtree("logs")
    arguments = ("--env", ENV_ID[algo], "--eval-freq", "-1", "-conf", "mine.yml", *study_arguments, "--trial-id", "1")
    zoo("train", "--algo", algo, *arguments, "-params", "augmentation:'random_shift'", "buffer_size:100")
    model = load(algo)
    assert model.policy_kwargs["features_extractor_class"] is extractor
    assert model.policy_kwargs["net_arch"] == net_archs[trials[1].params["net_arch"]]
    assert model.freeze_after == trials[1].params["freeze_after"]

    # From a Python package, whose hyperparameters RL Zoo changes in place
    Path("mine.py").write_text(
        f"import sb3_seer\nhyperparams = {{{ENV_ID[algo]!r}: dict(policy='CnnPolicy', n_timesteps=10, "
        f"policy_kwargs={SMALL_ENCODER[algo]})}}"
    )
    monkeypatch.syspath_prepend(Path.cwd())
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    arguments = ("mine" if argument == "mine.yml" else argument for argument in arguments)
    zoo("train", "--algo", algo, *arguments, "-params", "augmentation:'random_shift'", "buffer_size:100")
    model = load(algo, run=2)
    assert model.policy_kwargs["features_extractor_class"] is extractor
    assert model.policy_kwargs["net_arch"] == net_archs[trials[1].params["net_arch"]]


def test_samplers_search_no_copies_and_no_freeze_where_none_is_configured() -> None:
    sample = rl_zoo3.hyperparams_opt.HYPERPARAMS_SAMPLER["sac_seer"]
    arguments = (1, 1, dict(using_her_replay_buffer=False, her_kwargs={}))
    trial = optuna.create_study().ask()
    assert "n_augmentations" not in sample(trial, *arguments)
    for n_augmentations, expected in ((2, None), (3, (2, 3))):  # of at least two views
        token = registration.configured_hyperparams.set(dict(n_views=2, n_augmentations=n_augmentations))
        try:
            trial = optuna.create_study().ask()
            sample(trial, *arguments)
            searched = trial.distributions.get("n_augmentations")
            assert (searched and (searched.low, searched.high)) == expected
        finally:
            registration.configured_hyperparams.reset(token)
    freezes = [{"sb3_seer.FreezeEncoderCallback": dict(freeze_after=30)}]
    for configured in (dict(freeze_after=None), dict(freeze_after="auto"), dict(freeze_after=0), dict(callback=freezes)):
        token = registration.configured_hyperparams.set(configured)
        try:
            assert "freeze_after" not in sample(optuna.create_study().ask(), *arguments)
        finally:
            registration.configured_hyperparams.reset(token)


def test_crossq_is_searched_like_sac_but_for_the_target() -> None:
    sample, convert = (
        table["crossq_seer"]
        for table in (rl_zoo3.hyperparams_opt.HYPERPARAMS_SAMPLER, rl_zoo3.hyperparams_opt.HYPERPARAMS_CONVERTER)
    )
    trial = optuna.create_study().ask()
    hyperparams = sample(trial, 1, 1, dict(using_her_replay_buffer=False, her_kwargs={}))
    assert "tau" in trial.params and "tau" not in hyperparams and "tau" not in convert(trial.params)
    SEERCrossQ("CnnPolicy", DialEnv(size=48), buffer_size=100, **hyperparams)


def test_the_sampler_of_an_algorithm_without_seer_searches_no_freeze_and_keeps_the_encoder() -> None:
    sample = rl_zoo3.hyperparams_opt.HYPERPARAMS_SAMPLER["rainbow"]
    token = registration.configured_hyperparams.set(dict(policy_kwargs=dict(sigma0=0.1, net_arch=[1])))
    try:
        hyperparams = sample(optuna.create_study().ask(), 1, 1, dict(using_her_replay_buffer=False, her_kwargs={}))
    finally:
        registration.configured_hyperparams.reset(token)
    assert "freeze_after" not in hyperparams
    assert hyperparams["policy_kwargs"]["sigma0"] == 0.1 and hyperparams["policy_kwargs"]["net_arch"] != [1]

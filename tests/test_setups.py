"""The experiments of the papers, each run by naming a file: ``-conf curl_small_buffer.yml``."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import rl_zoo3.exp_manager
import rl_zoo3.train
import yaml
from stable_baselines3 import SAC
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack

import zoo_integration
from sb3_seer.common.seer import SEERMixin
from tests.helpers import DialEnv, LightEnv
from zoo_integration.registration import ALGORITHMS, default_config, find_config, hyperparams_folder

zoo_integration.register()

FILES = sorted(hyperparams_folder().glob("*.yml"))

# Tables 4 and 5 of the papers. C and T_f with a small buffer: figures 5 and 4
ACTION_REPEAT = {"cartpole-swingup": 8, "finger-spin": 2, "reacher-easy": 4, "cheetah-run": 4, "walker-walk": 2}
FIGURE_5 = {
    "cartpole-swingup": (1_000, 10_000),
    "finger-spin": (1_000, 50_000),
    "reacher-easy": (2_000, 30_000),
    "cheetah-run": (1_000, 80_000),
    "walker-walk": (2_000, 80_000),
}
FIGURE_4 = {
    "Alien": 100_000,
    "Amidar": 50_000,
    "BankHeist": 50_000,
    "CrazyClimber": 100_000,
    "Krull": 50_000,
    "PrivateEye": 150_000,
    "Qbert": 100_000,
    "Seaquest": 150_000,
}
# What the latents stage holds (C_hat)
HELD_AFTER_THE_FREEZE = {1_000: 18_750, 2_000: 37_500, 10_000: 30_625}

Blocks = dict[str, dict[str, Any]]


def tasks(changes: Callable[[str], dict[str, Any]]) -> Blocks:
    return {f"dm_control/{task}-v0": changes(task) for task in ACTION_REPEAT}


def games(changes: Callable[[str], dict[str, Any]]) -> Blocks:
    return {f"{game}NoFrameskip-v4": changes(game) for game in FIGURE_4}


def small_images(task: str) -> dict[str, Any]:
    repeat = {"sb3_seer.envs.ActionRepeat": dict(repeat=ACTION_REPEAT[task])}
    pixels = {"sb3_seer.envs.DMControlPixels": dict(height=50, width=50, camera_id=0)}
    return dict(env_wrapper=[repeat, pixels], augmentation_kwargs=dict(size=42))


def never_frozen(task: str) -> dict[str, Any]:
    return dict(freeze_after=None, buffer_size=500_000 // ACTION_REPEAT[task])


def small_buffer(task: str) -> dict[str, Any]:
    return dict(zip(("buffer_size", "freeze_after"), FIGURE_5[task], strict=True))


def half_resolution(task: str) -> dict[str, Any]:
    # As many images as it takes until their latents hold the training: 500,000 / repeat / 4.6875, if that is more than T_f
    buffer_size = {"cartpole-swingup": dict(buffer_size=13_400), "finger-spin": dict(buffer_size=53_400)}
    return {**small_images(task), **buffer_size.get(task, {})}


def batch(size: int) -> Blocks:
    return {"dm_control/cheetah-run-v0": dict(batch_size=size, **never_frozen("cheetah-run"))}


small_games = dict(env_wrapper=[{"stable_baselines3.common.atari_wrappers.AtariWrapper": dict(screen_size=42)}])

# By name: the algorithm, and all that differs from its default file
SETUPS: dict[str, tuple[str, Blocks]] = {
    "curl": ("curl_seer", tasks(never_frozen)),
    "curl_small_buffer": ("curl_seer", tasks(lambda task: {**small_buffer(task), "freeze_after": None})),
    "curl_half_resolution": ("curl_seer", tasks(lambda task: {**small_images(task), **never_frozen(task)})),
    "curl_batch_128": ("curl_seer", batch(128)),
    "curl_batch_256": ("curl_seer", batch(256)),
    "curl_seer_small_buffer": ("curl_seer", tasks(small_buffer)),
    "curl_seer_half_resolution": ("curl_seer", tasks(half_resolution)),
    "sac_seer_small_buffer": ("sac_seer", tasks(small_buffer)),
    "sac_seer_half_resolution": ("sac_seer", tasks(half_resolution)),
    "rainbow_small_buffer": ("rainbow", games(lambda game: dict(buffer_size=10_000))),
    "rainbow_half_resolution": ("rainbow", games(lambda game: small_games)),
    "rainbow_seer_small_buffer": (
        "rainbow_seer",
        games(lambda game: dict(buffer_size=10_000, freeze_after=FIGURE_4[game])),
    ),
    "rainbow_seer_half_resolution": ("rainbow_seer", games(lambda game: small_games)),
}


def algorithm_of(file: Path) -> str:
    return SETUPS[file.stem][0] if file.stem in SETUPS else file.stem


def read(file: Path, env_id: str) -> dict[str, Any]:
    """The block that RL Zoo reads: that of the environment, or that of all Atari games."""
    blocks = yaml.safe_load(file.read_text())
    return blocks[env_id] if env_id in blocks else blocks["atari"]


# ---- what the files say ----


def test_there_is_a_file_for_each_setup() -> None:
    assert {file.stem for file in FILES} == {*SETUPS, *ALGORITHMS}


@pytest.mark.parametrize("setup", SETUPS)
def test_a_setup_differs_from_the_default_in_nothing_else(setup: str) -> None:
    algo, changes = SETUPS[setup]
    file = hyperparams_folder() / f"{setup}.yml"
    for env_id, changed in changes.items():
        default = read(default_config(algo), env_id)
        assert all(default[key] != value for key, value in changed.items() if key != "freeze_after"), env_id
        assert read(file, env_id) == {**default, **changed}, env_id
    assert set(yaml.safe_load(file.read_text())) <= {*changes, "atari"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_block_of_hyperparameters_is_valid(file: Path) -> None:
    """All blocks reach the constructor of their algorithm as RL Zoo would hand them over, with images of their size."""
    algorithm, _ = ALGORITHMS[algorithm_of(file)]
    for env_id, block in yaml.safe_load(file.read_text()).items():
        wrappers: dict[str, dict[str, Any]] = {}
        for wrapper in block.pop("env_wrapper", ()):
            wrappers.update(wrapper if isinstance(wrapper, dict) else {wrapper: {}})
        pixels = wrappers.get("sb3_seer.envs.DMControlPixels", {})
        warped = wrappers.get("stable_baselines3.common.atari_wrappers.AtariWrapper", {})
        size = pixels.get("height", 96 if env_id == "CarRacing-v3" else warped.get("screen_size", 84))
        n_channels = 3 if issubclass(algorithm, SAC) else 1
        env = (DialEnv if issubclass(algorithm, SAC) else LightEnv)(size=size)
        env.observation_space = gym.spaces.Box(0, 255, (n_channels, size, size), np.uint8)
        stacked = VecFrameStack(DummyVecEnv([lambda env=env: env]), block.pop("frame_stack", 1), channels_order="first")
        n_timesteps = block.pop("n_timesteps")
        block.pop("callback", None)
        for key in ("policy_kwargs", "replay_buffer_class"):
            if key in block:
                block[key] = eval(block[key], vars(rl_zoo3.exp_manager))
        model = algorithm(env=stacked, **block)

        is_frozen = issubclass(algorithm, SEERMixin) and block["freeze_after"] is not None
        assert model.replay_buffer.nbytes <= 7.6e9, env_id
        assert model.replay_buffer.nbytes == block["buffer_size"] * n_channels * size**2
        held = model.replay_buffer.plan().latent_transitions if is_frozen else block["buffer_size"]
        if "small_buffer" in file.stem:
            assert not is_frozen or held == HELD_AFTER_THE_FREEZE[block["buffer_size"]], env_id
        elif env_id.startswith("dm_control/") or env_id == "atari" or "NoFrameskip" in env_id:
            # A large buffer never overwrites a transition, before the freeze and after it
            assert held >= n_timesteps, env_id
            assert not is_frozen or block["buffer_size"] >= block["freeze_after"], env_id


# ---- how they are found ----


def test_a_file_in_the_working_directory_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("curl.yml") == str(hyperparams_folder() / "curl.yml")
    (tmp_path / "curl.yml").touch()
    assert find_config("curl.yml") == "curl.yml"


def test_paths_and_packages_are_left_to_rl_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for config in ("./curl.yml", "somewhere/curl.yml", str(tmp_path / "curl.yml"), "curl.py", "my_package.hyperparams"):
        assert find_config(config) == config


Train = Callable[..., Any]


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Runs RL Zoo's train script in an empty folder, with a file by its name, and gives back the saved model."""
    monkeypatch.chdir(tmp_path)

    def run(setup: str, algo: str, env_id: str, n: int, **params: Any) -> Any:
        arguments = ("--algo", algo, "--env", env_id, "-conf", setup, "-n", str(n), "--eval-freq", "-1", "--seed", "1")
        pairs = [f"{key}:{value!r}" for key, value in params.items()]
        monkeypatch.setattr(sys, "argv", ["train", *arguments, "--save-replay-buffer", "-P", "-params", *pairs])
        rl_zoo3.train.train()
        name = env_id.replace("/", "-")
        model = ALGORITHMS[algo][0].load(f"logs/{algo}/{name}_1/{name}.zip")
        model.load_replay_buffer(f"logs/{algo}/{name}_1/replay_buffer.pkl")
        return model

    return run


def test_an_unknown_name_is_answered_with_the_list(train: Train) -> None:
    gym.register("AnyLight-v0", LightEnv)
    try:
        with pytest.raises(FileNotFoundError, match=r"curl_smal\.yml is not in the working directory") as error:
            train("curl_smal.yml", "curl_seer", "AnyLight-v0", n=1, gamma=0.9)
        for name in (*SETUPS, *ALGORITHMS):
            assert f"{name}.yml" in str(error.value)
        # The files are for our algorithms: of others RL Zoo says what it always says
        with pytest.raises(FileNotFoundError, match=r"No such file or directory: 'curl\.yml'"):
            train("curl.yml", "sac", "AnyLight-v0", n=1, gamma=0.9)
    finally:
        del gym.registry["AnyLight-v0"]


# ---- each kind in its real environment ----


@pytest.fixture
def cartpole() -> str:
    env_id = "dm_control/cartpole-swingup-v0"
    try:
        env = gym.make(env_id)
        env.reset()
        env.unwrapped.physics.render(height=50, width=50, camera_id=0)  # type: ignore[attr-defined]
    except Exception as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"Nothing can be drawn on this machine: {error!r}")
    return env_id


@pytest.fixture
def alien() -> str:
    pytest.importorskip("ale_py", reason="It is in an extra")
    return "AlienNoFrameskip-v4"


def test_a_small_buffer_wraps_and_then_grows(cartpole: str, train: Train) -> None:
    params = dict(buffer_size=50, freeze_after=70, learning_starts=60, batch_size=4)
    model = train("curl_seer_small_buffer.yml", "curl_seer", cartpole, 100, **params)
    assert model.encoder_frozen
    assert model.replay_buffer.stage == "latents"
    # The freeze comes before step 70 is stored: 50 of 69 were left. From then on none is lost
    assert model.replay_buffer.buffer_size == 937
    assert model.replay_buffer.size() == 50 + 31


def test_half_the_resolution_of_control(cartpole: str, train: Train) -> None:
    model = train("sac_seer_half_resolution.yml", "sac_seer", cartpole, 60, freeze_after=40, learning_starts=30, batch_size=4)
    assert model.encoder_frozen
    assert model.observation_space.shape == (9, 50, 50)
    assert model.augmentation_kwargs == dict(size=42)
    assert model.replay_buffer.size() == 60
    assert model.encode(model.observation_space.sample()[None]).shape == (1, 2, 50)


def test_half_the_resolution_of_games(alien: str, train: Train) -> None:
    model = train("rainbow_seer_half_resolution.yml", "rainbow_seer", alien, 120, freeze_after=80, learning_starts=50)
    assert model.encoder_frozen
    assert model.observation_space.shape == (4, 42, 42)
    assert model.encode(model.observation_space.sample()[None]).shape == (1, 1, 64)


def test_curl_is_never_frozen(cartpole: str, train: Train) -> None:
    model = train("curl_small_buffer.yml", "curl_seer", cartpole, 40, learning_starts=30, batch_size=4)
    assert not model.encoder_frozen
    assert model.replay_buffer.stage == "images"
    assert model._n_updates > 0

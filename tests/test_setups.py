"""The experiments of the papers, each run by naming a file: ``-conf curl_small_buffer.yml``."""

import os
import runpy
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
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack

import sb3_seer.envs  # noqa: F401  # registers dm_control's environments
import zoo_integration
from sb3_seer.common.seer import SEERMixin
from tests.helpers import DialEnv, LightEnv, is_continuous
from zoo_integration.registration import ALGORITHMS, find_config, hyperparams_folder

zoo_integration.register()

FILES = sorted(hyperparams_folder().rglob("*.yml"))
GENERATOR = hyperparams_folder() / "papers" / "generate.py"

# What the latents stage holds (C_hat)
HELD_AFTER_THE_FREEZE = {1_000: 18_750, 2_000: 37_500, 10_000: 30_625}


def algorithm_of(file: Path) -> str:
    """``curl_seer_small_buffer.yml`` is for ``curl_seer``, and what has the name of no algorithm is CURL."""
    names = [name for name in ALGORITHMS if file.stem.startswith(name)]
    return max(names, key=len, default="curl_seer")


def blocks_of(name: str) -> dict[str, dict[str, Any]]:
    return yaml.safe_load(Path(find_config(f"{name}.yml")).read_text())


# ---- what the files say ----


def test_there_is_a_file_for_each_algorithm() -> None:
    assert {file.stem for file in FILES if file.parent == hyperparams_folder()} == set(ALGORITHMS)


def test_the_generated_files_are_up_to_date() -> None:
    """Else: ``python hyperparams/papers/generate.py``."""
    generator = runpy.run_path(str(GENERATOR))
    for name in generator["EXPERIMENTS"]:
        assert (GENERATOR.parent / f"{name}.yml").read_text() == generator["text"](name), name
    by_hand = {"curl_seer_paper", "sac_seer_paper"}
    experiments = set(generator["EXPERIMENTS"]) - {"../curl_seer"}
    assert {file.stem for file in GENERATOR.parent.glob("*.yml")} == experiments | by_hand


def test_an_experiment_changes_what_the_paper_says_and_nothing_else() -> None:
    def changes(name: str, base: str, env_id: str) -> dict[str, Any]:
        block, before = blocks_of(name)[env_id], blocks_of(base)[env_id]
        assert block.keys() == before.keys()
        return {key: value for key, value in block.items() if value != before[key]}

    cheetah, game = "dm_control/cheetah-run-v0", "atari"
    pixels = {"sb3_seer.envs.DMControlPixels": dict(height=50, width=50, camera_id=0)}
    half = dict(env_wrapper=[{"sb3_seer.envs.ActionRepeat": dict(repeat=4)}, pixels], augmentation_kwargs=dict(size=42))
    large = dict(freeze_after=None, buffer_size=125_000)
    small_game = [{"stable_baselines3.common.atari_wrappers.AtariWrapper": dict(screen_size=42)}]
    assert changes("curl", "curl_seer_paper", cheetah) == large
    assert changes("curl_batch_128", "curl_seer_paper", cheetah) == dict(large, batch_size=128)
    assert changes("curl_batch_256", "curl_seer_paper", cheetah) == dict(large, batch_size=256)
    assert changes("curl_half_resolution", "curl_seer_paper", cheetah) == {**half, **large}
    assert changes("curl_small_buffer", "curl_seer_paper", cheetah) == dict(buffer_size=1_000, freeze_after=None)
    for algo in ("curl_seer", "sac_seer"):
        # T_f with a small buffer is the same as with the large one
        assert changes(f"{algo}_small_buffer", f"{algo}_paper", cheetah) == dict(buffer_size=1_000)
        assert changes(f"{algo}_half_resolution", f"{algo}_paper", cheetah) == half
    shifted = {"sb3_seer.envs.DMControlPixels": dict(height=50, width=50, camera_id=0, shadows=False)}
    assert changes("sac_seer_small_images", "sac_seer", cheetah) == dict(
        env_wrapper=[{"sb3_seer.envs.ActionRepeat": dict(repeat=4)}, shifted], augmentation_kwargs=dict(pad=2)
    )
    assert changes("td3_seer_small_images", "td3_seer", cheetah) == dict(
        env_wrapper=[{"sb3_seer.envs.ActionRepeat": dict(repeat=2)}, shifted], augmentation_kwargs=dict(pad=2)
    )
    assert changes("rainbow_small_buffer", "rainbow", game) == dict(buffer_size=10_000)
    assert changes("rainbow_half_resolution", "rainbow", game) == dict(env_wrapper=small_game)
    assert changes("rainbow_seer_small_buffer", "rainbow_seer", game) == dict(buffer_size=10_000)
    assert changes("rainbow_seer_half_resolution", "rainbow_seer", game) == dict(env_wrapper=small_game)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_block_of_hyperparameters_is_valid(file: Path) -> None:
    """All blocks reach the constructor of their algorithm as RL Zoo would hand them over, with images of their size."""
    algorithm, _ = ALGORITHMS[algorithm_of(file)]
    for env_id, block in yaml.safe_load(file.read_text()).items():
        wrappers: dict[str, dict[str, Any]] = {}
        for wrapper in block.pop("env_wrapper", None) or ():
            wrappers.update(wrapper if isinstance(wrapper, dict) else {wrapper: {}})
        pixels = wrappers.get("sb3_seer.envs.DMControlPixels") or wrappers.get("sb3_seer.envs.MujocoPixels", {})
        warped = wrappers.get("stable_baselines3.common.atari_wrappers.AtariWrapper", {})
        size = pixels.get("height", 96 if env_id == "CarRacing-v3" else warped.get("screen_size", 84))
        resized = wrappers.get("sb3_seer.envs.ResizeImages", dict(height=60, width=80) if "MiniWorld" in env_id else {})
        height, width = resized.get("height", size), resized.get("width", size)
        n_channels = 3 if is_continuous(algorithm) or "MiniWorld" in env_id else 1
        env = (DialEnv if is_continuous(algorithm) else LightEnv)(size=size)
        env.observation_space = gym.spaces.Box(0, 255, (n_channels, height, width), np.uint8)
        stacked = VecFrameStack(DummyVecEnv([lambda env=env: env]), block.pop("frame_stack", 1), channels_order="first")
        n_timesteps = block.pop("n_timesteps")
        for key in ("callback", "vec_env_wrapper"):
            block.pop(key, None)
        for key in ("policy_kwargs", "replay_buffer_class"):
            if key in block:
                block[key] = eval(block[key], vars(rl_zoo3.exp_manager))
        model = algorithm(env=stacked, **block)

        is_frozen = issubclass(algorithm, SEERMixin) and block["freeze_after"] is not None
        assert model.replay_buffer.nbytes <= 7.6e9, env_id
        assert model.replay_buffer.nbytes == block["buffer_size"] * n_channels * height * width
        held = model.replay_buffer.plan().latent_transitions if is_frozen else block["buffer_size"]
        if "small_buffer" in file.stem:
            assert not is_frozen or held == HELD_AFTER_THE_FREEZE[block["buffer_size"]], env_id
        elif env_id.startswith("dm_control/") or env_id == "atari" or "NoFrameskip" in env_id:
            # A large buffer never overwrites a transition, before the freeze and after it
            assert held >= n_timesteps, env_id
            assert not is_frozen or block["buffer_size"] >= block["freeze_after"], env_id


def test_no_block_names_a_wrapper_and_has_none() -> None:
    """RL Zoo's train takes ``vec_env_wrapper: null``, its enjoy does not."""
    for file in FILES:
        for env_id, block in yaml.safe_load(file.read_text()).items():
            assert all(block.get(key, True) for key in ("env_wrapper", "vec_env_wrapper", "callback")), (file, env_id)


# ---- how they are found ----


def test_a_file_in_the_working_directory_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("sac_seer.yml") == str(hyperparams_folder() / "sac_seer.yml")
    assert find_config("curl.yml") == str(hyperparams_folder() / "papers" / "curl.yml")
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
        with pytest.raises(FileNotFoundError, match=r"`-conf` must be a file .*, got curl_smal\.yml") as error:
            train("curl_smal.yml", "curl_seer", "AnyLight-v0", n=1, gamma=0.9)
        for file in FILES:
            assert file.name in str(error.value)
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


def test_small_images_with_the_settings_of_the_default_file(cartpole: str, train: Train) -> None:
    model = train("sac_seer_small_images.yml", "sac_seer", cartpole, 60, freeze_after=40, learning_starts=30, batch_size=4)
    assert model.encoder_frozen
    assert model.observation_space.shape == (9, 50, 50)
    assert (model.n_views, model.n_augmentations) == (2, 4)
    assert model.policy.ortho_init and model.policy.log_std_bounds == (-10, 2)


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

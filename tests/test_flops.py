"""The FLOPs meter: the papers' numbers, counted from real networks, and what happens in a training."""

import csv
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import TD3
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sb3_seer import SEERCURL, SEERDQN, SEERQRDQN, SEERSAC, DataEfficientCNN, PixelEncoder, Rainbow, SEERRainbow
from sb3_seer.common.flops import (
    FlopsCallback,
    FlopsFormula,
    FlopsRow,
    Passes,
    count_networks,
    estimate_flops,
    find_passes,
    multiply_adds,
    read_rows,
)
from tests.helpers import DialEnv, LightEnv, TinyEncoder

# ---- the papers' numbers ----


class ImageEnv(gym.Env):
    """Never stepped: only its spaces count."""

    def __init__(self, shape: tuple[int, int, int], action_space: spaces.Space) -> None:
        self.observation_space = spaces.Box(0, 255, shape, np.uint8)
        self.action_space = action_space


def rainbow(cls: type[Rainbow] = SEERRainbow, **kwargs: Any) -> Rainbow:
    """Data-efficient Rainbow with 9 actions (CrazyClimber), as in the papers."""
    kwargs = dict(batch_size=32, buffer_size=100, **kwargs)
    env = ImageEnv((4, 84, 84), spaces.Discrete(9))
    return cls("CnnPolicy", env, policy_kwargs=dict(features_extractor_class=DataEfficientCNN, net_arch=[256]), **kwargs)


def control(**kwargs: Any) -> SEERSAC:
    """SAC from pixels with one action (cartpole), as in the papers."""
    return SEERSAC(
        "CnnPolicy",
        ImageEnv((9, 100, 100), spaces.Box(-1, 1, (1,))),
        batch_size=128,
        buffer_size=100,
        augmentation="random_crop",
        augmentation_kwargs=dict(size=84),
        n_augmentations=4,
        policy_kwargs=dict(
            features_extractor_class=PixelEncoder, net_arch=[1024, 1024], share_features_extractor=False, n_critics=2
        ),
        **kwargs,
    )


def test_convolutions_of_control_are_those_of_table_2() -> None:
    encoder = PixelEncoder(spaces.Box(0, 255, (9, 84, 84), np.uint8))
    counts = multiply_adds(encoder, th.zeros(1, 9, 84, 84))
    convolutions = [count for layer, count in counts.items() if isinstance(layer, nn.Conv2d)]
    assert convolutions == [4_357_152, 14_017_536, 12_616_704, 11_289_600]
    assert sum(convolutions) == 42_280_992
    assert counts[encoder.projection] == 1_960_050


def test_convolutions_of_atari_are_those_of_table_3() -> None:
    encoder = DataEfficientCNN(spaces.Box(0, 255, (4, 84, 84), np.uint8))
    counts = multiply_adds(encoder, th.zeros(1, 4, 84, 84))
    assert list(counts.values()) == [819_200, 460_800]


def test_networks_of_control_are_those_of_table_2() -> None:
    formula = FlopsFormula.of(control())
    assert formula.encoder == 42_280_992 + 1_960_050
    critic, actor = 53_248 + 1_049_600 + 1_025, 52_224 + 1_049_600 + 2_050
    assert formula.heads == 2 * critic + actor
    assert (formula.n_augmentations, formula.n_networks) == (4, 2)
    # Three passes of the encoder and one back, then none
    heads = 5 * 128 * formula.heads
    assert formula.update(128, frozen=False) == 5 * 128 * formula.encoder + heads
    assert formula.update(128, frozen=True) == heads
    assert formula.storing(10) == formula.encoder * 4 * 2 * 10


def test_curl_as_released_costs_25_times_less_after_the_freeze() -> None:
    numbers = FlopsFormula.of(control())
    # Six passes of the encoder, and two back. Its heads: the actor's updates are half as many as here
    curl = FlopsFormula(numbers.encoder, numbers.heads, Passes(3, 1, 3, 1), n_augmentations=4, n_networks=2)
    before, after = curl.update(128, frozen=False), curl.update(128, frozen=True) + curl.storing(1)
    assert before == pytest.approx(5.88e10, rel=0.01)
    assert after == pytest.approx(2.32e9, rel=0.08)
    assert before / after == pytest.approx(25, rel=0.06)


@pytest.mark.parametrize("cls", [SEERRainbow, Rainbow])
def test_rainbow_costs_what_the_paper_says(cls: type[Rainbow]) -> None:
    formula = FlopsFormula.of(rainbow(cls))
    assert (formula.encoder, formula.heads) == (1_280_000, 425_472)
    before, after = formula.update(32, frozen=False), formula.update(32, frozen=True) + formula.storing(1)
    assert before == pytest.approx(2.7288e8, rel=1e-4)
    assert after == pytest.approx(6.9356e7, rel=1e-4)


@pytest.mark.parametrize("freeze_after, total", [(50_000, 4.492e13), (100_000, 5.516e13), (None, 1.364e14)])
def test_rainbow_costs_45_trillion_in_500_thousand_steps(freeze_after: int | None, total: float) -> None:
    model = rainbow(freeze_after=freeze_after, learning_starts=0, train_freq=1, n_steps=20)
    model.buffer_size = 500_000  # without its memory
    assert estimate_flops(model, np.array([500_000])) == pytest.approx(total, rel=5e-4)


def test_passes_of_the_algorithms() -> None:
    assert find_passes(rainbow(Rainbow)) == (3, 1, 0, 0)
    assert find_passes(rainbow(Rainbow, double_q=False)) == (2, 1, 0, 0)
    assert find_passes(train(SEERQRDQN, steps=0)) == (2, 1, 0, 0)
    assert find_passes(control()) == (3, 1, 0, 0)
    assert find_passes(train(SEERCURL, steps=0)) == (3, 1, 2, 1)
    assert find_passes(train(SEERCURL, steps=0, cpc_update_freq=None)) == (3, 1, 0, 0)

    class MySAC(SEERSAC):
        flops_passes = Passes(6, 2)

    assert find_passes(train(MySAC, steps=0)) == (6, 2, 0, 0)


def test_an_algorithm_whose_passes_are_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`model` must be a DQN.* `flops_passes`, got TD3"):
        TD3("MlpPolicy", "Pendulum-v1", buffer_size=10).learn(1, callback=FlopsCallback())


# ---- a training ----


def train(cls: type, steps: int, n_envs: int = 1, callback: Any = None, **kwargs: Any) -> Any:
    """A tiny agent, trained from seed 0."""
    env = make_vec_env(DialEnv if issubclass(cls, SEERSAC) else LightEnv, n_envs=n_envs, seed=0)
    settings = dict(buffer_size=200, learning_starts=20, batch_size=16, train_freq=1, gradient_steps=1, seed=0)
    policy_kwargs = dict(features_extractor_class=TinyEncoder, net_arch=[16])
    model = cls("CnnPolicy", env, policy_kwargs=policy_kwargs, **{**settings, **kwargs})
    return model.learn(steps, callback=callback) if steps > 0 else model


def test_operations_are_counted_as_they_happen() -> None:
    # Learning starts after step 20: updates after steps 21 to 59 with images, and after steps 60 to 100 with latents
    model = train(SEERDQN, 100, freeze_after=60)
    # 16x16 pixels: a 4x4 convolution to 8 channels of 4x4, and 128 -> 8; then 8 -> 16 -> 4, with biases
    encoder, heads = 8 * 4 * 4 * 16 + 129 * 8, 9 * 16 + 17 * 4
    # F + 2 B = 4
    assert model.flops_count.flops == 39 * 4 * 16 * (encoder + heads) + 41 * 4 * 16 * heads + 100 * encoder


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(freeze_after=None),
        dict(freeze_after=0.5),
        dict(freeze_after=70, train_freq=4, gradient_steps=2),
        dict(freeze_after=31, train_freq=3, gradient_steps=-1, n_envs=2),
        dict(freeze_after=90, buffer_size=40, learning_starts=0),
        dict(freeze_after=0),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:The encoder is frozen at step 0")
def test_the_meter_and_the_estimate_agree(kwargs: dict[str, Any]) -> None:
    model = train(SEERDQN, 120, **kwargs)
    # All that was before step 121: the last update comes after step 120
    assert model.flops_count.flops == estimate_flops(model, np.array([121]))[0] > 0


def test_the_estimate_does_not_guess_episodes() -> None:
    model = train(SEERDQN, 0, train_freq=(1, "episode"))
    with pytest.raises(ValueError, match="must be in steps"):
        estimate_flops(model, np.array([10]))


@pytest.mark.parametrize("name", ["batch_size_after_freeze", "gradient_steps_after_freeze"])
def test_the_estimate_does_not_guess_settings_before_the_freeze(name: str) -> None:
    model = train(SEERDQN, 0, **{name: 2})
    with pytest.raises(ValueError, match=f"`{name}` must be None, got 2"):
        estimate_flops(model, np.array([10]))


@pytest.mark.parametrize("first", [40, 80])
def test_the_count_goes_on_after_loading(first: int, tmp_path: Path) -> None:
    """Saved before and after the freeze."""
    model = train(SEERRainbow, first, freeze_after=60)
    model.save(tmp_path / "model.zip")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = SEERRainbow.load(tmp_path / "model.zip", env=model.get_env())
    loaded.load_replay_buffer(tmp_path / "buffer")
    loaded.learn(120 - first, reset_num_timesteps=False)
    whole = train(SEERRainbow, 120, freeze_after=60)
    assert loaded.flops_count.flops == whole.flops_count.flops
    assert loaded.flops_count.seconds > model.flops_count.seconds


def test_a_freeze_between_two_trainings_is_counted() -> None:
    model = train(SEERDQN, 40, freeze_after=None)
    before, formula = model.flops_count.flops, FlopsFormula.of(model)
    model.freeze_encoder()
    model.learn(10, reset_num_timesteps=False)
    assert model.flops_count.flops == before + 10 * formula.update(16, frozen=True) + formula.storing(40 + 10)


# ---- compared with PyTorch's counter ----


@pytest.mark.parametrize("cls", [SEERDQN, SEERQRDQN, SEERSAC, SEERCURL])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.filterwarnings("ignore:The encoder is frozen at step 10, before")
def test_the_formula_is_near_what_pytorch_counts(cls: type, frozen: bool) -> None:
    model = train(cls, 30, freeze_after=10 if frozen else None, learning_starts=12)
    with FlopCounterMode(display=False) as counter:
        model.train(gradient_steps=1, batch_size=16)
    # What the formula has on top: biases, and a gradient for the pixels
    assert counter.get_total_flops() / 2 == pytest.approx(FlopsFormula.of(model).update(16, frozen), rel=0.2)


def test_the_meter_changes_nothing() -> None:
    with_meter = train(Rainbow, 60, callback=FlopsCallback())
    without = train(Rainbow, 60)
    for name, weights in without.policy.state_dict().items():
        assert th.equal(weights, with_meter.policy.state_dict()[name]), name


def test_counting_draws_no_random_numbers() -> None:
    """The actor of SAC draws an action."""
    policy, state = train(SEERSAC, 0).policy, th.random.get_rng_state()
    count_networks(policy)
    assert th.equal(th.random.get_rng_state(), state)


# ---- what is logged ----


class SlowEnv(LightEnv):
    """Takes 10 ms a step."""

    def step(self, action: Any) -> Any:
        time.sleep(0.01)
        return super().step(action)


def evaluated(folder: Path, env: gym.Env | None = None) -> EvalCallback:
    return EvalCallback(
        Monitor(env or LightEnv()), n_eval_episodes=1, eval_freq=50, log_path=str(folder), verbose=0, warn=False
    )


def test_flops_are_logged_beside_the_return(tmp_path: Path) -> None:
    model = train(SEERDQN, 0, freeze_after=60)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(100, callback=evaluated(tmp_path / "evaluations"), log_interval=1)
    with (tmp_path / "progress.csv").open() as file:
        rows = list(csv.DictReader(file))
    formula = FlopsFormula.of(model)
    by_step = {int(row["time/total_timesteps"]): row for row in rows if row["eval/mean_reward"]}
    # Updates after steps 21 to 49
    assert float(by_step[50]["seer/flops"]) == 29 * formula.update(16, frozen=False)
    assert all(row["seer/flops"] for row in rows)


def test_a_file_tells_of_each_evaluation_and_of_the_freeze(tmp_path: Path) -> None:
    model = train(SEERDQN, 120, freeze_after=60, callback=evaluated(tmp_path))
    rows = read_rows(tmp_path / "flops.csv")
    assert [(row.timesteps, row.frozen) for row in rows] == [(0, 0), (50, 0), (60, 1), (100, 1)]
    assert [row.flops for row in rows] == estimate_flops(model, np.array([1, 50, 60, 100])).tolist()
    assert sorted(row.seconds for row in rows) == [row.seconds for row in rows]


def test_the_time_of_evaluations_does_not_count(tmp_path: Path) -> None:
    start = time.perf_counter()
    model = train(SEERDQN, 120, freeze_after=60, callback=evaluated(tmp_path, SlowEnv()))
    seconds = time.perf_counter() - start
    # Two evaluations of ten steps
    assert 0 < model.flops_count.seconds < seconds - 2 * 10 * 0.01


def test_the_time_of_a_freeze_counts_beside_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = train(SEERDQN, 0, freeze_after=50)
    freeze = model.freeze_encoder
    monkeypatch.setattr(model, "freeze_encoder", lambda: (time.sleep(0.5), freeze()))
    model.learn(55, callback=evaluated(tmp_path))
    assert model.flops_count.seconds > 0.5


def test_the_file_goes_on_where_a_training_does(tmp_path: Path) -> None:
    callback = evaluated(tmp_path)
    model = train(SEERDQN, 60, freeze_after=None, callback=callback)
    model.learn(60, callback=callback, reset_num_timesteps=False)
    assert [row.timesteps for row in read_rows(tmp_path / "flops.csv")] == [0, 50, 60, 100]
    # A new one begins at 0
    train(SEERDQN, 60, freeze_after=None, callback=evaluated(tmp_path))
    assert [row.timesteps for row in read_rows(tmp_path / "flops.csv")] == [0, 50]


def test_other_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "flops.csv"
    assert read_rows(file) == []
    file.write_text("step,flops\n1,2\n")
    with pytest.raises(ValueError, match="must have the columns timesteps, flops, seconds, frozen, got step, flops"):
        read_rows(file)
    assert FlopsRow._fields == ("timesteps", "flops", "seconds", "frozen")


def test_one_meter_is_enough() -> None:
    given = train(SEERDQN, 60, freeze_after=None, callback=[FlopsCallback()])
    assert given.flops_count.flops == train(SEERDQN, 60, freeze_after=None).flops_count.flops

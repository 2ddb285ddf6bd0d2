"""The FLOPs meter: the papers' numbers, counted from real networks, and what happens in a training."""

import csv
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.callbacks import EvalCallback, EveryNTimesteps
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from torch.utils.flop_counter import FlopCounterMode

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
from sb3_seer.common.flops import FlopsCallback, FlopsFormula, FlopsRow, Passes, count_networks, find_passes
from sb3_seer.plots import Run
from tests.helpers import DialEnv, LightEnv, TinyEncoder, is_continuous

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


def control(freeze_at: str = "fc1", **kwargs: Any) -> SEERSAC:
    """SAC from pixels with one action (cartpole), as in the papers."""
    policy_kwargs: dict[str, Any] = dict(net_arch=[1024, 1024], share_features_extractor=False, n_critics=2)
    policy_kwargs.update(features_extractor_class=PixelEncoder, features_extractor_kwargs=dict(freeze_at=freeze_at))
    kwargs = dict(n_augmentations=4, batch_size=128, buffer_size=100) | kwargs
    kwargs.update(augmentation="random_crop", augmentation_kwargs=dict(size=84), policy_kwargs=policy_kwargs)
    return SEERSAC("CnnPolicy", ImageEnv((9, 100, 100), spaces.Box(-1, 1, (1,))), **kwargs)


def test_networks_of_control_are_those_of_table_2() -> None:
    formula = FlopsFormula.of(control())
    assert formula.encoder == 4_357_152 + 14_017_536 + 12_616_704 + 11_289_600 + 39_200 * 50
    critic, actor = 51 * 1024 + 1024 * 1024 + 1024, 50 * 1024 + 1024 * 1024 + 2 * 1024
    assert formula.heads == 2 * critic + actor
    # The table also has the biases of linear layers
    assert formula.encoder == pytest.approx(42_280_992 + 1_960_050, rel=2e-6)
    assert formula.heads == pytest.approx(2 * (53_248 + 1_049_600 + 1_025) + 52_224 + 1_049_600 + 2_050, rel=2e-3)
    assert (formula.n_augmentations, formula.n_networks) == (4, 2)
    # Three passes of the encoder and one back, then none
    heads = 5 * 128 * formula.heads
    assert formula.update(128, frozen=False) == 5 * 128 * formula.encoder + heads
    assert formula.update(128, frozen=True) == heads
    assert formula.storing(10) == formula.encoder * 4 * 2 * 10


def test_what_comes_after_freeze_at_belongs_to_the_heads() -> None:
    whole = FlopsFormula.of(control(n_augmentations=1, freeze_after=None))
    up_to_conv4 = FlopsFormula.of(control(n_augmentations=1, freeze_after=None, freeze_at="conv4"))
    assert up_to_conv4.encoder == 42_280_992
    # The linear layers of actor and critic
    assert up_to_conv4.heads == whole.heads + 2 * 39_200 * 50


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
    assert (formula.encoder, formula.heads) == (819_200 + 460_800, 425_472)
    before, after = formula.update(32, frozen=False), formula.update(32, frozen=True) + formula.storing(1)
    assert before == pytest.approx(2.7288e8, rel=1e-4)
    assert after == pytest.approx(6.9356e7, rel=1e-4)


@pytest.mark.parametrize("freeze_after, total", [(50_000, 4.492e13), (100_000, 5.516e13), (None, 1.364e14)])
def test_rainbow_costs_45_trillion_in_500_thousand_steps(freeze_after: int | None, total: float) -> None:
    formula, n_steps = FlopsFormula.of(rainbow()), 500_000
    n_before = n_steps if freeze_after is None else freeze_after
    flops = n_before * formula.update(32, frozen=False) + (n_steps - n_before) * formula.update(32, frozen=True)
    assert flops + (n_steps if freeze_after else 0) * formula.storing(1) == pytest.approx(total, rel=5e-4)


def test_passes_of_the_algorithms() -> None:
    assert find_passes(rainbow(Rainbow)) == (3, 1, 0, 0)
    assert find_passes(rainbow(Rainbow, double_q=False)) == (2, 1, 0, 0)
    assert find_passes(train(SEERQRDQN, steps=0)) == (2, 1, 0, 0)
    assert find_passes(control()) == (3, 1, 0, 0)
    assert find_passes(train(SEERCURL, steps=0)) == (3, 1, 2, 1)
    assert find_passes(train(SEERCURL, steps=0, cpc_update_freq=None)) == (3, 1, 0, 0)
    assert find_passes(train(SEERTD3, steps=0)) == (2, 1, 0, 0)
    assert find_passes(train(SEERTQC, steps=0)) == (3, 2, 0, -1)

    class MySAC(SEERSAC):
        flops_passes = Passes(6, 2)

    assert find_passes(train(MySAC, steps=0)) == (6, 2, 0, 0)


def test_an_algorithm_whose_passes_are_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="`model` must be a DQN, QRDQN or SAC, or have `flops_passes`, got TD3"):
        TD3("MlpPolicy", "Pendulum-v1", buffer_size=10).learn(1, callback=FlopsCallback())


# ---- a training ----


def train(cls: type, steps: int, n_envs: int = 1, callback: Any = None, **kwargs: Any) -> Any:
    """A tiny agent, trained from seed 0."""
    env = make_vec_env(DialEnv if is_continuous(cls) else LightEnv, n_envs=n_envs, seed=0)
    settings = dict(buffer_size=200, learning_starts=20, batch_size=16, train_freq=1, gradient_steps=1, seed=0)
    policy_kwargs = dict(features_extractor_class=TinyEncoder, net_arch=[16], **kwargs.pop("policy_kwargs", {}))
    model = cls("CnnPolicy", env, policy_kwargs=policy_kwargs, **{**settings, **kwargs})
    return model.learn(steps, callback=callback) if steps > 0 else model


def test_operations_are_counted_as_they_happen() -> None:
    # Learning starts after step 20: updates after steps 21 to 59 with images, and after steps 60 to 100 with latents
    model = train(SEERDQN, 100, freeze_after=60)
    formula = FlopsFormula.of(model)
    before, after = 39 * formula.update(16, frozen=False), 41 * formula.update(16, frozen=True)
    assert model.flops_count.flops == before + after + formula.storing(100)


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(freeze_after=None),
        dict(freeze_after=0.5),
        dict(freeze_after=70, train_freq=4, gradient_steps=2),
        dict(freeze_after=31, train_freq=3, gradient_steps=-1, n_envs=2),
        dict(freeze_after=90, buffer_size=40, learning_starts=0),
        dict(freeze_after=0),
        dict(freeze_after=60, batch_size_after_freeze=8, gradient_steps_after_freeze=3),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:The encoder is frozen at step 0")
def test_the_count_is_of_the_updates_and_of_the_latents_that_were_stored(kwargs: dict[str, Any]) -> None:
    model = train(SEERDQN, 0, **kwargs)
    counts: dict[str, int] = defaultdict(int)
    update, to_latents, add = model.train, model.replay_buffer.to_latents, model.replay_buffer.add

    def count_updates(gradient_steps: int, batch_size: int) -> None:
        counts["after" if model.encoder_frozen else "before"] += gradient_steps * batch_size
        update(gradient_steps, batch_size)

    def count_held() -> None:
        counts["stored"] += model.replay_buffer.size() * model.n_envs
        to_latents()

    def count_added(*args: Any) -> None:
        counts["stored"] += (model.replay_buffer.stage == "latents") * model.n_envs
        add(*args)

    model.train, model.replay_buffer.to_latents, model.replay_buffer.add = count_updates, count_held, count_added
    model.learn(120)
    # 16x16 pixels: a 4x4 convolution to 8 channels of 4x4, and 128 -> 8; then 8 -> 16 -> 4
    encoder, heads = 8 * 4 * 4 * 16 + 128 * 8, 8 * 16 + 16 * 4
    # F + 2 B = 4
    flops = 4 * (counts["before"] * (encoder + heads) + counts["after"] * heads) + counts["stored"] * encoder
    assert model.flops_count.flops == flops > 0


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


@pytest.mark.parametrize(
    "cls, ties",
    [
        *((cls, None) for cls in (SEERDQN, SEERQRDQN, SEERSAC, SEERCURL)),
        *((cls, ties) for cls in (SEERTD3, SEERTQC, SEERCrossQ) for ties in (True, False)),
    ],
)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.filterwarnings("ignore:The encoder is frozen at step 10, before")
def test_the_formula_is_near_what_pytorch_counts(cls: type, ties: bool | None, frozen: bool) -> None:
    policy_kwargs = {} if ties is None else dict(tie_convolutions=ties)
    model = train(cls, 30, freeze_after=10 if frozen else None, learning_starts=12, policy_kwargs=policy_kwargs)
    n_steps = getattr(model, "policy_delay", 1)  # the actor learns in one of them
    with FlopCounterMode(display=False) as counter:
        model.train(gradient_steps=n_steps, batch_size=16)
    # What the formula has on top: a gradient for the pixels
    assert counter.get_total_flops() / 2 == pytest.approx(n_steps * FlopsFormula.of(model).update(16, frozen), rel=0.2)


@pytest.mark.parametrize("shared", [False, True])
def test_the_formula_of_sb3s_sac_is_near_what_pytorch_counts(shared: bool) -> None:
    policy_kwargs = dict(features_extractor_class=TinyEncoder, share_features_extractor=shared, net_arch=[16])
    model: Any = SAC("CnnPolicy", DialEnv(), policy_kwargs=policy_kwargs, buffer_size=100, learning_starts=12, device="cpu")
    model.learn(30, callback=FlopsCallback())
    formula = FlopsFormula.of(model)
    assert model.flops_count.flops == 18 * formula.update(256, frozen=False)
    with FlopCounterMode(display=False) as counter:
        model.train(gradient_steps=1, batch_size=256)
    assert counter.get_total_flops() / 2 == pytest.approx(formula.update(256, frozen=False), rel=0.2)


def test_the_meter_changes_nothing() -> None:
    with_meter = train(Rainbow, 60, callback=FlopsCallback())
    without = train(Rainbow, 60)
    for name, weights in without.policy.state_dict().items():
        assert th.equal(weights, with_meter.policy.state_dict()[name]), name


def test_vectors_in_a_dict_have_no_encoder() -> None:
    env = ImageEnv((3, 16, 16), spaces.Box(-1, 1, (1,)))
    env.observation_space = spaces.Dict(a=spaces.Box(-1, 1, (2,)), b=spaces.Discrete(3))
    encoder, heads = count_networks(SAC("MultiInputPolicy", env, buffer_size=10).policy)
    assert encoder == 0 and heads > 0


def test_counting_draws_no_random_numbers() -> None:
    """The actor of SAC draws an action."""
    policy, state = train(SEERSAC, 0).policy, th.random.get_rng_state()
    count_networks(policy)
    assert th.equal(th.random.get_rng_state(), state)


# ---- what is logged ----


class Clock:
    """Stands still, but for what a test says takes time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.seconds)

    def slow_down(self, function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        def slow(*args: Any, **kwargs: Any) -> Any:
            self.seconds += seconds
            return function(*args, **kwargs)

        return slow


def evaluated(folder: Path | None, env: gym.Env | None = None) -> EvalCallback:
    log_path = None if folder is None else str(folder)
    return EvalCallback(Monitor(env or LightEnv()), n_eval_episodes=1, eval_freq=50, log_path=log_path, verbose=0, warn=False)


def read_rows(folder: Path) -> list[FlopsRow]:
    return Run(folder).rows


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
    rows = read_rows(tmp_path)
    assert [(row.timesteps, row.frozen) for row in rows] == [(0, 0), (50, 0), (60, 1), (100, 1)]
    # Updates after steps 21 to 49, to 59 and to 99. The transition of the step of a freeze is stored after it
    formula = FlopsFormula.of(model)
    before = formula.update(16, frozen=False)
    after = 39 * before + 40 * formula.update(16, frozen=True) + formula.storing(99)
    assert [row.flops for row in rows] == [0, 29 * before, 39 * before, after]
    assert sorted(row.seconds for row in rows) == [row.seconds for row in rows]


@pytest.mark.parametrize("is_logged", [True, False])
@pytest.mark.parametrize("freeze_after", [50, 60])
def test_the_time_of_a_freeze_counts_but_not_of_evaluations(
    freeze_after: int, is_logged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    model = train(SEERDQN, 0, freeze_after=freeze_after)
    monkeypatch.setattr(model.replay_buffer, "to_latents", clock.slow_down(model.replay_buffer.to_latents, 7))
    callback = evaluated(tmp_path if is_logged else None)
    callback.eval_env.step = clock.slow_down(callback.eval_env.step, 1000)
    monkeypatch.setattr(model, "train", clock.slow_down(model.train, 1))
    model.learn(120, callback=callback)
    assert model.flops_count.seconds == 7 + 100
    model.learn(60, callback=callback, reset_num_timesteps=False)
    assert model.flops_count.seconds == 7 + 100 + 60


def test_the_file_goes_on_where_a_training_does(tmp_path: Path) -> None:
    callback = evaluated(tmp_path)
    model = train(SEERDQN, 60, freeze_after=30, callback=callback)
    model.save(tmp_path / "model")
    model.learn(60, callback=callback, reset_num_timesteps=False)
    assert [row.timesteps for row in read_rows(tmp_path)] == [0, 30, 50, 60, 100]
    # Resumed from the file, in another folder, with all that was before
    loaded = SEERDQN.load(tmp_path / "model", env=model.get_env())
    loaded.learn(60, callback=evaluated(tmp_path / "resumed"), reset_num_timesteps=False)
    assert [row.timesteps for row in read_rows(tmp_path / "resumed")] == [0, 30, 50, 60, 110]
    # A new one begins at 0
    train(SEERDQN, 60, freeze_after=None, callback=evaluated(tmp_path))
    assert [row.timesteps for row in read_rows(tmp_path)] == [0, 50]


def test_other_files_are_refused(tmp_path: Path) -> None:
    assert read_rows(tmp_path) == []
    (tmp_path / "flops.csv").write_text("step,flops\n1,2\n")
    with pytest.raises(ValueError, match="must have the columns timesteps, flops, seconds, frozen, got step, flops"):
        read_rows(tmp_path)
    assert FlopsRow._fields == ("timesteps", "flops", "seconds", "frozen")


def test_one_meter_is_enough() -> None:
    given = train(SEERDQN, 60, freeze_after=None, callback=[FlopsCallback()])
    assert given.flops_count.flops == train(SEERDQN, 60, freeze_after=None).flops_count.flops


def test_a_meter_that_would_not_see_each_step_is_refused() -> None:
    model = SAC("MlpPolicy", DialEnv(), buffer_size=10, device="cpu")
    with pytest.raises(ValueError, match="must be given to learn\\(\\) itself, got one inside of EveryNTimesteps"):
        model.learn(10, callback=EveryNTimesteps(5, FlopsCallback()))

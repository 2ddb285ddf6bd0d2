"""``freeze_after="auto"``: when it freezes, what it logs and costs, and that it disturbs nothing."""

import csv

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, EveryNTimesteps
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.torch_layers import CombinedExtractor

from sb3_seer import SEERCURL, SEERDQN, SEERSAC, FreezeEncoderCallback, SEERRainbow
from sb3_seer.analysis import debiased_cka
from sb3_seer.common import auto_freeze
from sb3_seer.common.auto_freeze import AutoFreeze, FreezeCheck
from sb3_seer.common.regression import linear_predictability
from tests import dict_helpers
from tests.helpers import ALGORITHMS, TinyEncoder, assert_same, make_model

# ---- the measure ----


def test_predictability_of_linear_maps_and_of_noise():
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(512, 20)), rng.normal(size=(512, 5))
    y = x @ rng.normal(size=(20, 5)) / 20**0.5
    assert linear_predictability(x, y) > 0.999
    assert linear_predictability(x, noise) < 0.05
    assert linear_predictability(x, y + noise) == pytest.approx(0.5, abs=0.1)
    assert linear_predictability(x, 1000 + 3 * y) > 0.999
    assert linear_predictability(noise, y, more=x) > 0.999
    assert linear_predictability(x, np.ones((512, 5))) == linear_predictability(np.ones((512, 5)), np.ones((512, 5))) == 1
    assert linear_predictability(np.ones((512, 5)), y) < 0.01


def test_units_that_are_seldom_active_are_no_trouble():
    """Scaled to unit variance, such a unit would outweigh all others on the samples that it was not fitted on."""
    rng = np.random.default_rng(0)
    latents = np.maximum(rng.normal(size=(512, 20)) @ rng.normal(size=(20, 576)), 0)
    latents[:, :200] = 0
    latents[:, 200:300] *= rng.random((512, 100)) < 0.003
    assert linear_predictability(latents, latents) > 0.999
    assert linear_predictability(latents, latents + 0.01 * rng.normal(size=latents.shape)) > 0.9


def test_a_direction_with_much_variance_does_not_hide_the_rest():
    rng = np.random.default_rng(0)
    shared, (x, y) = 9 * rng.normal(size=(512, 1)), rng.normal(size=(2, 512, 9)) / 3
    x, y = np.hstack([shared, x]), np.hstack([shared, y])
    assert debiased_cka(x, y) > 0.99
    assert linear_predictability(x, y) == pytest.approx(0.1, abs=0.03)


# ---- when it freezes ----


@pytest.fixture
def small_checks(monkeypatch):
    """Checks that updates of a few samples pay for."""
    monkeypatch.setattr(auto_freeze, "N_TRANSITIONS", 32)
    monkeypatch.setattr(auto_freeze, "MAX_COST", 1000)


def frozen_at(model, total_timesteps, *callbacks, **kwargs) -> int | None:
    model.learn(total_timesteps, callback=list(callbacks), **kwargs)
    return next((row.timesteps for row in model.flops_count.rows if row.frozen), None)


@pytest.mark.parametrize(
    "algorithm, min_fraction, expected",
    [(SEERSAC, 0.05, 48), (SEERCURL, 0.05, 48), (SEERRainbow, 0.05, 48), (SEERDQN, 0.05, 48), (SEERDQN, 0.3, 72)],
)
def test_an_encoder_that_never_changes_is_frozen_at_the_first_check(algorithm, min_fraction, expected, small_checks):
    """Of 40 checks in 240 steps, the first one with a snapshot to compare with is the second after ``learning_starts``."""
    rates = dict(learning_rate=0.0)
    if algorithm is SEERCURL:
        rates.update(encoder_learning_rate=0.0, cpc_learning_rate=0.0)
    model = make_model(algorithm, freeze_after=None, learning_starts=40, buffer_size=240, **rates)
    assert frozen_at(model, 240, FreezeEncoderCallback(when="auto", min_fraction=min_fraction)) == expected


class NewEncoderEachStep(BaseCallback):
    def _on_step(self) -> bool:
        if not self.model.encoder_frozen:
            for network in self.model.policy.encoder_networks:
                for module in network.encoder_modules():
                    for parameter in module.parameters():
                        th.nn.init.normal_(parameter.data, std=0.1)
        return True


@pytest.mark.parametrize("algorithm", [SEERSAC, SEERDQN])
def test_an_encoder_that_always_changes_is_frozen_at_the_bound(algorithm, small_checks, monkeypatch):
    monkeypatch.setattr(auto_freeze, "N_TRANSITIONS", 128)
    model = make_model(algorithm, freeze_after=None, buffer_size=240)
    auto = FreezeEncoderCallback(when="auto", max_fraction=0.75)
    assert frozen_at(model, 240, NewEncoderEachStep(), auto) == 180


@pytest.mark.parametrize("extractor", [dict_helpers.TinyDictEncoder, CombinedExtractor])
def test_images_of_dict_observations_and_several_environments(extractor, small_checks):
    env = make_vec_env(dict_helpers.make_env, 3, env_kwargs=dict(algorithm=SEERDQN, size=48))
    kwargs = dict(freeze_after="auto", learning_rate=0.0, learning_starts=39, buffer_size=240, gradient_steps=-1)
    model = dict_helpers.make_model(SEERDQN, extractor, env=env, **kwargs)
    assert frozen_at(model, 120) == 48


def test_without_an_upper_bound_it_may_never_freeze(small_checks, monkeypatch):
    monkeypatch.setattr(auto_freeze, "N_TRANSITIONS", 128)
    model = make_model(SEERDQN, freeze_after=None)
    assert frozen_at(model, 200, NewEncoderEachStep(), FreezeEncoderCallback(when="auto", max_fraction=1)) is None


def test_a_callback_that_calls_it_now_and_then_misses_no_check(small_checks):
    model = make_model(SEERDQN, freeze_after=None, learning_starts=40, buffer_size=240, learning_rate=0.0)
    # A check is due every 6 steps
    assert frozen_at(model, 240, EveryNTimesteps(7, FreezeEncoderCallback(when="auto"))) == 49


def test_an_encoder_that_gets_better_at_the_dynamics_is_not_settled():
    assert FreezeCheck(drift=0.01, dynamics=0.5, dynamics_gain=0.0).is_settled
    assert FreezeCheck(drift=0.01, dynamics=0.5, dynamics_gain=-0.1).is_settled
    assert not FreezeCheck(drift=0.01, dynamics=0.5, dynamics_gain=0.1).is_settled
    assert not FreezeCheck(drift=0.5, dynamics=0.5, dynamics_gain=0.0).is_settled


def test_the_parameter_and_the_callback_do_the_same(small_checks):
    steps = [
        frozen_at(make_model(SEERDQN, freeze_after=freeze_after, learning_rate=0.0), 100, *callbacks)
        for freeze_after, callbacks in (
            ("auto", []),
            (None, [FreezeEncoderCallback(when="auto")]),
            (0.9, [FreezeEncoderCallback("auto")]),
        )
    ]
    assert len(set(steps)) == 1 and steps[0] is not None


def test_bounds_are_fractions_of_all_steps_until_the_end_of_learn(small_checks):
    model = make_model(SEERDQN, freeze_after=None)
    model.learn(60)
    auto = FreezeEncoderCallback(when="auto", max_fraction=0.8)
    assert frozen_at(model, 60, NewEncoderEachStep(), auto, reset_num_timesteps=False) == 96


def test_no_check_before_the_first_gradient_step(small_checks):
    """An encoder that did not have the chance to change has not settled."""
    model = make_model(SEERDQN, freeze_after="auto", learning_starts=1000, buffer_size=200)
    with pytest.warns(UserWarning, match="before its first gradient step"):
        assert frozen_at(model, 100) == 50
    assert model.auto_freeze is None


# ---- what it leaves alone, costs and logs ----


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_watching_changes_nothing(algorithm, small_checks, monkeypatch):
    monkeypatch.setattr(auto_freeze, "MAX_DRIFT", -1.0)
    states, randoms = [], []
    for callbacks in ([], [FreezeEncoderCallback(when="auto", max_fraction=1)]):
        model = make_model(algorithm, freeze_after=None, augmentation="random_shift", augmentation_kwargs=dict(pad=1))
        model.learn(100, callback=callbacks)
        states.append(model.policy.state_dict())
        randoms.append((np.random.random(), th.rand(1).item()))
    assert model.auto_freeze.snapshot is not None
    assert_same(*states)
    assert randoms[0] == randoms[1]


@pytest.mark.parametrize("algorithm", [SEERSAC, SEERDQN])
def test_checks_cost_less_than_a_hundredth_of_the_updates_and_are_counted(algorithm, monkeypatch):
    monkeypatch.setattr(auto_freeze, "MAX_DRIFT", -1.0)
    checks = []
    compare = AutoFreeze.compare
    monkeypatch.setattr(AutoFreeze, "compare", lambda *args: checks.append(None) or compare(*args))
    flops = []
    for callbacks in ([], [FreezeEncoderCallback(when="auto", max_fraction=1)]):
        model = make_model(algorithm, freeze_after=None, batch_size=256, buffer_size=500)
        model.learn(500, callback=callbacks)
        flops.append(model.flops_count.flops)
    assert len(checks) >= 2
    encoder, _ = model.flops_count.networks
    assert flops[1] - flops[0] == len(checks) * 4 * auto_freeze.N_TRANSITIONS * encoder
    assert flops[1] - flops[0] <= 0.01 * flops[0]


def test_what_it_measures_is_logged(small_checks, monkeypatch, tmp_path):
    monkeypatch.setattr(auto_freeze, "MAX_DRIFT", -1.0)
    model = make_model(SEERDQN, freeze_after="auto")
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(200, log_interval=1)
    with open(tmp_path / "progress.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["seer/drift"]]
    assert len(rows) > 2
    for row in rows:
        assert 0 <= float(row["seer/drift"]) and float(row["seer/dynamics"]) <= 1 and row["seer/dynamics_gain"]


def test_it_says_why_it_freezes(small_checks, monkeypatch, capsys):
    make_model(SEERDQN, freeze_after="auto", learning_rate=0.0, verbose=1).learn(100)
    assert "steps: drift 0.000, dynamics " in capsys.readouterr().out
    monkeypatch.setattr(auto_freeze, "MAX_DRIFT", -1.0)
    make_model(SEERDQN, freeze_after="auto", verbose=1).learn(100)
    assert "Encoder frozen after 50 steps: at max_fraction=0.5" in capsys.readouterr().out


def test_what_has_no_effect_is_said():
    with pytest.warns(UserWarning, match="buffer_size is 100: the encoder is frozen at max_fraction=0.5"):
        assert frozen_at(make_model(SEERDQN, freeze_after="auto", buffer_size=100), 100) == 50
    with pytest.raises(ValueError, match='only for "auto", got freeze_after=30'):
        FreezeEncoderCallback(30, max_fraction=0.8)


# ---- saving and loading ----


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_loaded_model_measures_what_the_saved_one_would_have(algorithm, small_checks, monkeypatch, tmp_path):
    monkeypatch.setattr(auto_freeze, "MAX_DRIFT", -1.0)
    model = make_model(algorithm, freeze_after="auto", buffer_size=300)
    model.learn(100, callback=FreezeEncoderCallback(when="auto", max_fraction=1))
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = algorithm.load(tmp_path / "model", env=model.get_env(), device="cpu")
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert loaded.auto_freeze.flops == model.auto_freeze.flops > 0
    assert loaded.auto_freeze.compare(loaded) == model.auto_freeze.compare(model)
    assert loaded.auto_freeze.rng.random() == model.auto_freeze.rng.random()


def test_a_training_that_goes_on_is_frozen_at_the_same_step(small_checks, monkeypatch, tmp_path):
    monkeypatch.setattr(auto_freeze, "MAX_DRIFT", -1.0)
    checks = []
    compare = AutoFreeze.compare
    monkeypatch.setattr(AutoFreeze, "compare", lambda self, model: checks.append(model.num_timesteps) or compare(self, model))
    model = make_model(SEERDQN, freeze_after="auto", learning_starts=40, buffer_size=400)
    model.learn(400)
    at_once, checks[:] = checks[:], []
    model = make_model(SEERDQN, freeze_after=None, learning_starts=40, buffer_size=400)
    never = FreezeEncoderCallback(when="auto", max_fraction=1)

    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return self.num_timesteps < 125

    model.learn(400, callback=[never, Stop()])
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = SEERDQN.load(tmp_path / "model", env=model.get_env(), device="cpu", freeze_after="auto")
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert frozen_at(loaded, 400 - 125, reset_num_timesteps=False) == 200
    assert checks == at_once


def test_nothing_is_kept_after_the_freeze(small_checks):
    model = make_model(SEERDQN, freeze_after="auto")
    model.learn(60)
    assert model.encoder_frozen and model.auto_freeze is None
    model.learn(60, reset_num_timesteps=False)
    assert model.auto_freeze is None


# ---- bad input ----


def test_bad_input():
    with pytest.raises(ValueError, match="two names of one parameter, got 100 and 'auto'"):
        FreezeEncoderCallback(100, when="auto")
    for make in (lambda: make_model(SEERDQN, freeze_after="never"), lambda: FreezeEncoderCallback(when="never")):
        with pytest.raises(ValueError, match=r'`freeze_after` must be .*"auto" or None \(never\), got \'never\''):
            make()
    for bounds, message in (
        (dict(min_fraction=-0.1), "`min_fraction` must be between 0 and 1, got -0.1"),
        (dict(min_fraction="0.1"), "`min_fraction` must be between 0 and 1, got '0.1'"),
        (dict(max_fraction=1.1), "`max_fraction` must be between 0.05 and 1, got 1.1"),
        (dict(min_fraction=0.6), "`max_fraction` must be between 0.6 and 1, got 0.5"),
        (dict(max_fraction=float("nan")), "`max_fraction` must be between 0.05 and 1, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            FreezeEncoderCallback(when="auto", **bounds)


def test_a_model_without_images():
    with pytest.raises(ValueError, match=r'`freeze_after` must not be "auto" where there is no encoder to freeze'):
        SEERSAC("MlpPolicy", "Pendulum-v1", freeze_after="auto")
    with pytest.warns(UserWarning, match="no encoder to freeze"):
        model = SEERSAC("MlpPolicy", "Pendulum-v1")
    with pytest.raises(ValueError, match="has no encoder to freeze"):
        model.learn(10, callback=FreezeEncoderCallback(when="auto"))


def test_images_are_given_as_they_were_added():
    model = make_model(SEERDQN, freeze_after=None, extractor=TinyEncoder, buffer_size=20)
    model.learn(50)
    buffer = model.replay_buffer
    observations, next_observations, actions = buffer.images_at(np.arange(20))
    assert observations.shape == next_observations.shape == (20, 1, 16, 16)
    # Rows follow each other but at the write head and at the ends of episodes
    follows = [np.array_equal(observations[i + 1], next_observations[i]) for i in range(19)]
    assert follows == [not buffer.dones[i, 0] and i != buffer.pos - 1 for i in range(19)]
    assert np.array_equal(actions, buffer.actions[:, 0])
    model.freeze_encoder()
    with pytest.raises(ValueError, match="needs the stage 'images'"):
        buffer.images_at(np.arange(20))

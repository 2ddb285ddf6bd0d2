"""Exploration noise that falls over a schedule, as in DrQ-v2."""

import warnings

import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import TD3
from stable_baselines3.common.callbacks import BaseCallback, EveryNTimesteps
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise

from sb3_seer import SEERDQN, SEERTD3
from sb3_seer.common.callbacks import NoiseScheduleCallback
from tests.helpers import DialEnv, make_model


class Recorder(BaseCallback):
    """Notes the standard deviation with which each rollout explores."""

    def __init__(self) -> None:
        super().__init__()
        self.stds: list[float] = []

    def _on_step(self) -> bool:
        noise = self.locals["action_noise"]
        noise = getattr(noise, "noises", [noise])[0]
        self.stds.append(float(noise._sigma[0]))
        assert noise._sigma.shape == self.training_env.action_space.shape
        return True


def test_actions_without_noise_are_refused():
    model = make_model(SEERDQN, freeze_after=None)
    with pytest.raises(ValueError, match="`action_space` must be a Box"):
        model.learn(10, callback=NoiseScheduleCallback())


@pytest.mark.parametrize("end, last", [(50, 50), (0.25, 25)])
def test_the_noise_falls_linearly_to_its_last_value(end, last):
    model, recorder = make_model(SEERTD3, freeze_after=None, learning_starts=1000), Recorder()
    model.learn(100, callback=[NoiseScheduleCallback(1.0, 0.1, end=end), recorder])
    expected = 1.0 - 0.9 * np.minimum(np.arange(100) / last, 1.0)
    np.testing.assert_allclose(recorder.stds, expected)


def test_a_callback_that_calls_it_now_and_then_is_enough():
    model = make_model(SEERTD3, freeze_after=None, learning_starts=1000)
    model.learn(60, callback=EveryNTimesteps(10, NoiseScheduleCallback(1.0, 0.0, end=50)))
    assert model.action_noise._sigma.tolist() == [0.0, 0.0]


def test_a_fraction_is_of_each_learn():
    model = make_model(SEERTD3, freeze_after=None, learning_starts=10)
    model.learn(40, callback=NoiseScheduleCallback(1.0, 0.1, end=0.5))
    recorder = Recorder()
    with pytest.warns(UserWarning, match=r"end=0\.5 is a fraction of each learn\(\), .*: the noise falls from 1\.0 again"):
        model.learn(60, callback=[NoiseScheduleCallback(1.0, 0.1, end=0.5), recorder], reset_num_timesteps=False)
    np.testing.assert_allclose(recorder.stds, 1.0 - 0.9 * np.minimum(np.arange(60) / 30, 1.0))


def test_several_environments_and_an_algorithm_without_seer():
    model = TD3("MlpPolicy", make_vec_env("Pendulum-v1", n_envs=2), learning_starts=1000, train_freq=5, device="cpu")
    recorder = Recorder()
    model.learn(40, callback=[NoiseScheduleCallback(0.5, 0.0, end=20), recorder])
    assert recorder.stds == pytest.approx([0.5] * 5 + [0.25] * 5 + [0.0] * 10)


def test_several_environments_have_noise_of_their_own_also_after_an_episode():
    class MatrixEnv(DialEnv):
        def __init__(self) -> None:
            super().__init__()
            self.action_space = spaces.Box(-1, 1, (1, 2), np.float32)

    model = make_model(SEERTD3, env=make_vec_env(MatrixEnv, n_envs=2), learning_starts=10, freeze_after=30)
    model.learn(60, callback=NoiseScheduleCallback(end=np.int64(60)))
    assert model.action_noise().shape == (2, 1, 2)
    assert all(noise._sigma == pytest.approx(0.1) for noise in model.action_noise.noises)


@pytest.mark.parametrize(
    "kwargs", [dict(end=0), dict(end=1.5), dict(end=True), dict(initial_std=np.nan), dict(final_std=-0.1)]
)
def test_values_that_are_refused(kwargs):
    (name,) = kwargs
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        NoiseScheduleCallback(**kwargs)


def test_noise_that_was_given_is_replaced_with_a_warning():
    noise = NormalActionNoise(np.zeros(1), np.ones(1))
    model = make_model(SEERTD3, freeze_after=None, learning_starts=1000, action_noise=noise)
    with pytest.warns(UserWarning, match=r"NoiseScheduleCallback replaces action_noise=NormalActionNoise\("):
        model.learn(5, callback=NoiseScheduleCallback(end=40))
    with warnings.catch_warnings():  # its own noise is no surprise
        warnings.simplefilter("error")
        model.learn(5, callback=NoiseScheduleCallback(end=40), reset_num_timesteps=False)


def test_it_is_saved_and_goes_on_with_the_model(tmp_path):
    model = make_model(SEERTD3, freeze_after=30).learn(20, callback=NoiseScheduleCallback(end=40))
    model.save(tmp_path / "model")
    loaded, recorder = SEERTD3.load(tmp_path / "model", env=DialEnv(), device="cpu"), Recorder()
    loaded.learn(10, callback=[NoiseScheduleCallback(end=40), recorder], reset_num_timesteps=False)
    np.testing.assert_allclose(recorder.stds, 1.0 - 0.9 * np.arange(20, 30) / 40)
    with pytest.warns(UserWarning, match=r"The noise falls from 1\.0 again in this learn\(\), after \d+ gradient steps"):
        loaded.learn(10, callback=NoiseScheduleCallback(end=40))

"""When the encoder is frozen, and that everything around it works as in SB3."""

import csv
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    StopTrainingOnMaxEpisodes,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecNormalize

from sb3_seer import SEERDQN, SEERQRDQN, SEERSAC, FreezeEncoderCallback, LatentReplayBuffer
from sb3_seer.common.flops import FlopsFormula
from tests.helpers import ALGORITHMS, DialEnv, LightEnv, TinyEncoder, is_continuous, make_model


class StageRecorder(BaseCallback):
    """Remembers the number of steps at which it first saw latents."""

    frozen_at: int | None = None

    def _on_step(self) -> bool:
        if self.frozen_at is None and self.model.replay_buffer.stage == "latents":
            self.frozen_at = self.num_timesteps
        return True


def frozen_at(model, total_timesteps: int, **kwargs) -> int | None:
    recorder = StageRecorder()
    callbacks = kwargs.pop("callback", [])
    model.learn(total_timesteps, callback=[*callbacks, recorder], **kwargs)
    # The recorder sees the step after the freeze, as it comes before the callback of the algorithm
    assert model.encoder_frozen == (model.replay_buffer.stage == "latents")
    return recorder.frozen_at


@pytest.mark.parametrize(
    "algorithm, freeze_after, expected",
    [(algorithm, 30, 31) for algorithm in ALGORITHMS]
    + [(SEERDQN, 0.5, 51), (SEERDQN, 1.0, None), (SEERDQN, None, None), (SEERDQN, 500, None), (SEERDQN, np.int64(30), 31)],
)
def test_freezes_at_the_step_asked_for(algorithm, freeze_after, expected):
    model = make_model(algorithm, freeze_after=freeze_after)
    assert frozen_at(model, 100) == expected
    assert model.encoder_frozen == (expected is not None or freeze_after == 1.0)


def test_freeze_at_zero_stores_latents_from_the_first_step():
    model = make_model(SEERQRDQN, freeze_after=0)
    with pytest.warns(UserWarning, match="at step 0, before its first gradient step"):
        assert frozen_at(model, 30) == 1
    assert model.replay_buffer.size() == 30


def test_the_range_of_uint8_is_fitted_on_the_ends_of_episodes_too():
    model = make_model(SEERDQN, freeze_after=None, latent_dtype="uint8")
    dark, bright = np.zeros((1, 1, 16, 16), np.uint8), np.full((1, 1, 16, 16), 255, np.uint8)
    for step in range(1, 41):
        ends = step % 20 == 0
        model.replay_buffer.add(dark, bright if ends else dark, np.zeros(1), np.zeros(1), np.array([ends]), [{}])
    model.freeze_encoder()
    assert model.replay_buffer.encoder.n_clipped == 0


def test_a_freeze_waits_for_observations_to_fit_the_range_of_uint8_on(tmp_path):
    """A callback that saves at T_f sees the step before the freeze. Resumed without its buffer, the model has no images."""
    model = make_model(SEERDQN, freeze_after=30, latent_dtype="uint8", buffer_size=20)
    model.learn(31, callback=CheckpointCallback(30, str(tmp_path)))
    assert model.encoder_frozen
    loaded = SEERDQN.load(tmp_path / "rl_model_30_steps", env=LightEnv(), device="cpu")
    with pytest.warns(UserWarning, match="waits until 20 observations"):
        assert frozen_at(loaded, 40, reset_num_timesteps=False) == 30 + 20 + 2
    assert loaded.replay_buffer.size() == 40


def test_default_freezes_after_a_fifth():
    assert frozen_at(make_model(SEERDQN), 100) == 21


def test_fraction_counts_the_steps_of_this_learn():
    model = make_model(SEERQRDQN, freeze_after=None)
    model.learn(100)
    model.freeze_after = 0.5
    assert frozen_at(model, 100, reset_num_timesteps=False) == 151


def test_learning_goes_on_after_a_second_learn():
    model = make_model(SEERSAC, freeze_after=0.5)
    model.learn(60)
    capacity, updates = model.replay_buffer.buffer_size, model._n_updates
    model.learn(60, reset_num_timesteps=False)
    assert model.num_timesteps == 120
    assert model.replay_buffer.size() == 120
    model.learn(60)  # resets the environment in the middle of an episode
    assert model.num_timesteps == 60
    assert model.replay_buffer.size() == 180
    assert model.replay_buffer.buffer_size == capacity > 200
    assert model._n_updates > updates


@pytest.mark.parametrize("wrap", [lambda callback: callback, lambda callback: CallbackList([callback])])
def test_a_callback_takes_the_place_of_the_parameter(wrap):
    model = make_model(SEERQRDQN, freeze_after=0.1)
    assert frozen_at(model, 100, callback=[wrap(FreezeEncoderCallback(freeze_after=60))]) == 60


@pytest.mark.parametrize("latent_dtype", ["float32", "uint8"])
def test_the_log_says_what_the_buffer_holds(latent_dtype, tmp_path):
    model = make_model(SEERDQN, freeze_after=40, latent_dtype=latent_dtype)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(100, log_interval=1)
    with open(tmp_path / "progress.csv") as file:
        rows = [{key: value for key, value in row.items() if key.startswith("seer/")} for row in csv.DictReader(file)]
    first, last, buffer = rows[0], rows[-1], model.replay_buffer
    assert (int(first["seer/encoder_frozen"]), int(last["seer/encoder_frozen"])) == (0, 1)
    assert (int(first["seer/transitions"]), int(last["seer/transitions"])) == (10, 100)
    assert (int(first["seer/capacity"]), int(last["seer/capacity"])) == (200, buffer.buffer_size)
    assert int(first["seer/bytes"]) == int(last["seer/bytes"]) == buffer.nbytes == 200 * 256
    assert 0 < int(last["seer/extra_bytes"]) == buffer.extra_bytes < buffer.nbytes
    assert int(first["seer/clipped"]) == 0 and int(last["seer/clipped"]) == buffer.encoder.n_clipped
    assert latent_dtype == "float32" or buffer.encoder.n_clipped > 0


def test_callbacks_of_every_kind_are_kept(tmp_path):
    for callback in (
        None,
        lambda locals_, globals_: True,
        EvalCallback(LightEnv(), eval_freq=20, log_path=str(tmp_path), verbose=0),
    ):
        model = make_model(SEERQRDQN, freeze_after=30)
        model.learn(40, callback=callback)
        assert model.encoder_frozen
    assert len(np.load(tmp_path / "evaluations.npz")["timesteps"]) == 2


def test_a_users_callback_may_have_attributes_like_a_list_of_callbacks():
    class Mine(BaseCallback):
        callbacks, callback = 3, "reward"

        def _on_step(self) -> bool:
            return True

    assert frozen_at(make_model(SEERDQN, freeze_after=30), 40, callback=[Mine()]) == 31


def test_callback_needs_a_seer_algorithm():
    from stable_baselines3 import DQN

    with pytest.raises(ValueError, match="must be a SEER algorithm, got DQN"):
        DQN("CnnPolicy", LightEnv(size=48), buffer_size=10).learn(1, callback=FreezeEncoderCallback())


@pytest.mark.parametrize(
    "algorithm, vec_env_cls", [*((algorithm, DummyVecEnv) for algorithm in ALGORITHMS), (SEERSAC, SubprocVecEnv)]
)
def test_several_environments_with_stacked_frames(algorithm, vec_env_cls):
    env_class = DialEnv if is_continuous(algorithm) else LightEnv
    env = VecFrameStack(make_vec_env(env_class, n_envs=3, vec_env_cls=vec_env_cls), 3, channels_order="first")
    model = algorithm(
        "CnnPolicy", env, buffer_size=90, learning_starts=12, batch_size=8, train_freq=2, gradient_steps=-1, freeze_after=45,
        policy_kwargs=dict(features_extractor_class=TinyEncoder), augmentation="random_crop",
        augmentation_kwargs=dict(size=12), n_augmentations=2, device="cpu",
    )  # fmt: skip
    assert model.n_stack == 3
    model.learn(300)
    env.close()
    n_networks = 2 if is_continuous(algorithm) else 1
    # C = 90 frames of 256 bytes hold 30 rows; a transition of K = 2 latents of 8 float32 holds 64 or 128 bytes
    assert model.replay_buffer.buffer_size == 30 * 256 // (4 * n_networks * 2 * 8)
    assert model.replay_buffer.nbytes == 90 * 256
    assert model.encode(model._last_obs).shape == (3, n_networks, 8)
    assert model.encode(model._last_obs).dtype == th.float32
    assert model._n_updates > 0


def test_frames_stacked_by_gymnasium_are_found():
    env = gym.wrappers.ReshapeObservation(LightEnv(), (16, 16))
    model = SEERQRDQN(
        "CnnPolicy", gym.wrappers.FrameStackObservation(env, 4), buffer_size=50, learning_starts=5, freeze_after=20,
        policy_kwargs=dict(features_extractor_class=TinyEncoder), device="cpu",
    )  # fmt: skip
    assert model.n_stack == 4
    model.learn(30)
    assert model.replay_buffer.nbytes == 50 * 16 * 16


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(train_freq=(1, "episode"), gradient_steps=-1),
        dict(action_noise=NormalActionNoise(np.zeros(2), 0.1 * np.ones(2))),
        dict(use_sde=True, sde_sample_freq=4, use_sde_at_warmup=True),
        dict(ent_coef=0.1, target_update_interval=2),
        dict(n_steps=3),
        dict(optimize_memory_usage=True),
        dict(augmentation=th.nn.Identity(), n_augmentations=2, latent_dtype="float16"),
        dict(latent_dtype="uint8", max_latent_buffer_size=230),
    ],
)
def test_options_of_sac(kwargs):
    model = make_model(SEERSAC, **{"freeze_after": 40, **kwargs})
    model.learn(100)
    assert model.encoder_frozen
    assert model._n_updates > 0
    assert np.isfinite(model.policy.parameters_to_vector()).all()


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("split_extractor", [True, False])
def test_sac_networks_with_a_latent_of_their_own(share, split_extractor):
    model = make_model(
        SEERSAC, TinyEncoder if split_extractor else None, size=16 if split_extractor else 48, freeze_after=None,
    )  # fmt: skip
    policy_kwargs = {**model.policy_kwargs, "share_features_extractor": share}
    model = SEERSAC(
        "CnnPolicy", model.get_env(), policy_kwargs=policy_kwargs, buffer_size=100, freeze_after=None, device="cpu"
    )
    own = split_extractor and not share
    assert model.policy.latent_shape[0] == (2 if own else 1)
    actor, critic = model.actor.features_extractor, model.critic.features_extractor
    assert (actor is critic) != own
    if own:
        assert actor.trunk is critic.trunk
        assert actor.projection is not critic.projection and actor.head is not critic.head


def test_vec_normalize_of_rewards():
    env = VecNormalize(make_vec_env(LightEnv, n_envs=2), norm_obs=False)
    model = SEERQRDQN(
        "CnnPolicy", env, buffer_size=100, learning_starts=10, freeze_after=40, exploration_final_eps=1, device="cpu",
        policy_kwargs=dict(features_extractor_class=TinyEncoder),
    )  # fmt: skip
    model.learn(80)  # with random actions: some earn nothing, some 1
    rewards = model.replay_buffer.sample(50).rewards.unique()
    assert set(rewards.tolist()) == {0.0, 1.0}  # stored as they were
    normalized = model.replay_buffer.sample(50, env=env).rewards.unique()
    assert not set(normalized.tolist()) <= {0.0, 1.0}


def test_the_plan_is_printed_once(capsys):
    make_model(SEERQRDQN, freeze_after=50, verbose=1)
    out = capsys.readouterr().out
    assert out.count("images: 200 transitions") == 1
    assert out.count("latents: 1,600 transitions") == 1


def test_an_encoder_that_was_not_frozen_is_mentioned(capsys):
    make_model(SEERDQN, freeze_after=50, verbose=1).learn(20)
    assert "Encoder not frozen after 20 steps: freeze_after=50" in capsys.readouterr().out


def test_without_images_it_says_so_once_and_trains():
    with pytest.warns(UserWarning, match="no encoder to freeze") as record:
        model = SEERDQN("MlpPolicy", "CartPole-v1", learning_starts=10, device="cpu")
        model.learn(30)
    assert len([w for w in record if "no encoder" in str(w.message)]) == 1
    assert not model.encoder_frozen


# ---- other settings after the freeze ----


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_batches_and_gradient_steps_of_their_own_after_the_freeze(algorithm):
    model = make_model(algorithm, freeze_after=40, batch_size_after_freeze=16, gradient_steps_after_freeze=3)
    sizes = []
    sample = model.replay_buffer.sample
    model.replay_buffer.sample = lambda batch_size, **kwargs: sizes.append(batch_size) or sample(batch_size, **kwargs)
    model.learn(60)
    # Learning starts after step 10. The encoder is frozen within step 40
    assert sizes == 29 * [8] + 21 * 3 * [16]
    assert model._n_updates == 29 + 21 * 3
    formula = FlopsFormula.of(model)
    flops = 29 * formula.update(8, frozen=False) + 63 * formula.update(16, frozen=True) + formula.storing(60)
    assert model.flops_count.flops == flops


def test_as_many_gradient_steps_as_steps_after_the_freeze():
    model = make_model(SEERDQN, freeze_after=40, train_freq=4, gradient_steps=1, gradient_steps_after_freeze=-1)
    model.learn(60)
    # After steps 12, 16... 36, then after steps 40, 44... 60
    assert model._n_updates == 7 + 6 * 4


def test_settings_after_the_freeze_are_saved_and_loaded(tmp_path):
    settings = dict(batch_size_after_freeze=16, gradient_steps_after_freeze=3)
    model = make_model(SEERDQN, freeze_after=40, **settings)
    model.learn(30)
    model.save(tmp_path / "before")
    model.learn(30, reset_num_timesteps=False)
    model.save(tmp_path / "after")
    before = SEERDQN.load(tmp_path / "before", env=model.get_env(), device="cpu")
    assert (before.batch_size, before.gradient_steps) == (8, 1)
    before.learn(30, reset_num_timesteps=False)
    # RL Zoo gives what its YAML file says again
    again = dict(batch_size=8, gradient_steps=1, **settings)
    with pytest.warns(UserWarning, match="batch_size=8 has no effect: .*, and batch_size_after_freeze=16 replaces it"):
        after = SEERDQN.load(tmp_path / "after", env=model.get_env(), device="cpu", **again)
    for loaded in (before, after):
        assert loaded.encoder_frozen and (loaded.batch_size, loaded.gradient_steps) == (16, 3)


@pytest.mark.filterwarnings("ignore:.*no encoder to freeze")
@pytest.mark.parametrize("kwargs", [dict(batch_size_after_freeze=16), dict(gradient_steps_after_freeze=2)])
def test_settings_after_the_freeze_are_refused_without_an_encoder(kwargs):
    with pytest.raises(ValueError, match="_after_freeze` must be None where there is no encoder to freeze, got"):
        SEERSAC("MlpPolicy", "Pendulum-v1", **kwargs)


# ---- habits ----


def test_a_later_freeze_of_a_frozen_encoder_is_warned_of(tmp_path):
    model = make_model(SEERDQN, freeze_after=20)
    model.learn(30)
    model.save(tmp_path / "model")
    with pytest.warns(UserWarning, match="freeze_after=40 has no effect: the encoder is frozen already"):
        SEERDQN.load(tmp_path / "model", env=model.env, freeze_after=40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SEERDQN.load(tmp_path / "model", env=model.env)


def test_learn_in_a_loop_does_not_freeze_at_once_in_silence():
    """freeze_after is a fraction of the first, short learn()."""
    model = make_model(SEERDQN, freeze_after=0.9)
    model.learn(30)
    with pytest.warns(
        UserWarning, match=r"freeze_after=0\.9 is a fraction of each learn\(\).* is frozen already\. .*number of"
    ):
        model.learn(30, reset_num_timesteps=False)
    model = make_model(SEERDQN, freeze_after=0.9)
    model.learn(30, callback=StopTrainingOnMaxEpisodes(2))
    with pytest.warns(UserWarning, match="will be frozen at step 47"):
        model.learn(30, reset_num_timesteps=False)
    model = make_model(SEERDQN, freeze_after=40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            model.learn(30, reset_num_timesteps=False)


def test_counting_steps_from_0_again_warns_that_it_moves_the_freeze():
    """As RL Zoo's ``-i`` does."""
    model = make_model(SEERDQN, freeze_after="auto").learn(1_000, callback=StopTrainingOnMaxEpisodes(2))
    with pytest.warns(UserWarning, match="freeze_after='auto' is counted from the start"):
        model.learn(50)
    model = make_model(SEERDQN, freeze_after=40).learn(30)
    with pytest.warns(UserWarning, match=r"freeze_after=40 is counted from the start of this learn\(\), after \d+ gradient"):
        model.learn(50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(30)  # frozen


def test_a_subclass_of_the_buffer_is_allowed(tmp_path):
    class Mine(LatentReplayBuffer):
        pass

    model = make_model(SEERDQN, freeze_after=30, replay_buffer_class=Mine)
    assert type(model.replay_buffer) is Mine
    model.learn(40)
    model.save_replay_buffer(tmp_path / "buffer")
    model.load_replay_buffer(tmp_path / "buffer")
    assert type(model.replay_buffer) is Mine and model.replay_buffer.stage == "latents"


@pytest.mark.parametrize("n_stack", [1, 3])
def test_attributes_that_look_like_those_of_a_frame_stack_are_not(n_stack):
    class Tower(LightEnv):
        """Its images have three channels, and a stack_size that means something else."""

        stack_size = n_stack = 3

        def __init__(self) -> None:
            super().__init__()
            self.observation_space = gym.spaces.Box(0, 255, (3, 16, 16), np.uint8)

        def _draw(self, lamp: int) -> np.ndarray:
            return self.np_random.integers(0, 256, (3, 16, 16), dtype=np.uint8)

    model = make_model(SEERDQN, env=Tower() if n_stack == 1 else VecFrameStack(DummyVecEnv([Tower]), 3, "first"))
    assert model.n_stack == n_stack


@pytest.mark.parametrize("algorithm", [SEERDQN, SEERQRDQN, SEERSAC])
def test_n_step_returns_are_no_reason_to_warn(algorithm):
    """SB3 warns of a replay_buffer_class that it would not give n_steps to."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make_model(algorithm, n_steps=3).replay_buffer.n_steps == 3

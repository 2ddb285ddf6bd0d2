"""Saving and loading before, at and after the freeze."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import DQN, TD3
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.save_util import save_to_pkl
from stable_baselines3.common.vec_env import VecFrameStack
from stable_baselines3.dqn.policies import CnnPolicy

from sb3_seer import SEERDQN, SEERQRDQN, SEERSAC, SEERTD3, LatentReplayBuffer, SEERRainbow
from sb3_seer.common.buffer_file import describe
from tests.helpers import ALGORITHMS, DialEnv, LightEnv, TinyEncoder, assert_same, encoder_state, make_model, train_on


@pytest.mark.parametrize("total_timesteps", [30, 40, 60])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_resumes_exactly_before_at_and_after_the_freeze(algorithm, total_timesteps, tmp_path):
    kwargs = dict(augmentation="random_crop", augmentation_kwargs=dict(size=12), n_augmentations=2)
    model = make_model(algorithm, freeze_after=40, **kwargs)
    model.learn(total_timesteps)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")

    loaded = algorithm.load(tmp_path / "model", env=model.get_env(), device="cpu")
    assert loaded.encoder_frozen == model.encoder_frozen == (total_timesteps >= 40)
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert_same(model.policy.state_dict(), loaded.policy.state_dict())
    assert loaded.replay_buffer.stage == model.replay_buffer.stage
    assert loaded.replay_buffer.size() == model.replay_buffer.size() == total_timesteps
    observation = model._last_obs
    expected, _ = model.predict(observation, deterministic=True)
    np.testing.assert_allclose(loaded.predict(observation, deterministic=True)[0], expected, rtol=1e-5)

    encoder = encoder_state(model)
    assert_same(train_on(model), train_on(loaded))
    if model.encoder_frozen:
        assert_same(encoder, encoder_state(loaded))
    # and on through the freeze, if that is still to come
    loaded.learn(30, reset_num_timesteps=False)
    assert loaded.encoder_frozen
    assert loaded.replay_buffer.size() == total_timesteps + 30


def test_a_model_loaded_to_predict_allocates_no_buffer(tmp_path):
    import tracemalloc

    model = make_model(SEERQRDQN, freeze_after=20)
    model.learn(30)
    model.save(tmp_path / "model")
    tracemalloc.start()
    loaded = SEERQRDQN.load(tmp_path / "model", device="cpu", buffer_size=50_000_000)
    loaded.predict(model._last_obs)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert loaded.replay_buffer.nbytes == 50_000_000 * 256
    assert peak < 20e6


@pytest.mark.parametrize("latent_dtype", ["float32", "float16", "uint8"])
def test_a_frozen_model_loads_without_its_buffer_and_goes_on(latent_dtype, tmp_path):
    model = make_model(SEERSAC, freeze_after=30, latent_dtype=latent_dtype)
    model.learn(50)
    model.save(tmp_path / "model")
    encoder = encoder_state(model)
    loaded = SEERSAC.load(tmp_path / "model", env=DialEnv(), device="cpu")
    loaded.learn(40)
    assert loaded.replay_buffer.stage == "latents"
    assert_same(encoder, encoder_state(loaded))
    loaded.save(tmp_path / "again")
    loaded.save_replay_buffer(tmp_path / "buffer")
    again = SEERSAC.load(tmp_path / "again", env=DialEnv(), device="cpu")
    again.load_replay_buffer(tmp_path / "buffer")
    assert again.replay_buffer.size() == 40


def test_images_become_latents_in_a_frozen_model(tmp_path):
    model = make_model(SEERQRDQN, freeze_after=None)
    model.learn(50)
    model.save_replay_buffer(tmp_path / "buffer")
    model.freeze_encoder()
    model.save(tmp_path / "model")
    loaded = SEERQRDQN.load(tmp_path / "model", env=model.get_env(), device="cpu")
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert loaded.replay_buffer.stage == "latents"
    assert_same(train_on(model), train_on(loaded))


def test_latents_of_another_encoder_are_refused(tmp_path):
    model, other = make_model(SEERQRDQN, freeze_after=30), make_model(SEERQRDQN, freeze_after=30, seed=1)
    model.learn(40)
    other.learn(40)
    model.save_replay_buffer(tmp_path / "buffer")
    saved = (tmp_path / "buffer.pkl").read_bytes()
    kept = other.replay_buffer
    names = f"{model.policy.encoder_fingerprint()}.*{other.policy.encoder_fingerprint()}"
    with pytest.raises(ValueError, match=names):
        other.load_replay_buffer(tmp_path / "buffer")
    assert other.replay_buffer is kept
    assert (tmp_path / "buffer.pkl").read_bytes() == saved


def test_latents_are_refused_while_the_encoder_learns(tmp_path):
    model = make_model(SEERQRDQN, freeze_after=30)
    model.learn(40)
    model.save_replay_buffer(tmp_path / "buffer")
    learning = make_model(SEERQRDQN, freeze_after=30)
    with pytest.raises(ValueError, match="of this model is not frozen"):
        learning.load_replay_buffer(tmp_path / "buffer")
    assert learning.replay_buffer.stage == "images"


def test_buffers_of_another_kind_or_shape_are_refused(tmp_path):
    make_model(SEERQRDQN, size=20).save_replay_buffer(tmp_path / "larger")
    DQN("CnnPolicy", LightEnv(size=48), buffer_size=10).save_replay_buffer(tmp_path / "sb3")
    save_to_pkl(tmp_path / "dict", dict(observations=1))
    (tmp_path / "text.pkl").write_text("transitions")
    model = make_model(SEERQRDQN)
    model.save(tmp_path / "model")
    kept = model.replay_buffer
    for name, message in (
        ("larger", r"`observation_space` .*larger.* must be Box\(0, 255, \(1, 16, 16\).*got Box\(0, 255, \(1, 20, 20\)"),
        ("sb3", r"`observation_space` .*sb3.* must be Box\(0, 255, \(1, 16, 16\).*got Box\(0, 255, \(1, 48, 48\)"),
        ("dict", "dict.* must hold a replay buffer of .*got dict"),
        ("text", "text.* is neither a replay buffer of sb3_seer nor a pickle"),
        ("model.zip", r"model\.zip is damaged or not a replay buffer"),
    ):
        with pytest.raises(ValueError, match=message):
            model.load_replay_buffer(tmp_path / name)
    assert model.replay_buffer is kept


def test_another_encoders_weights_are_refused_while_there_are_latents():
    model, other = make_model(SEERQRDQN, freeze_after=30), make_model(SEERQRDQN, freeze_after=30, seed=1)
    model.learn(40)
    before = copy.deepcopy(model.get_parameters())
    model.set_parameters(other.get_parameters())
    with pytest.raises(ValueError, match="latents of encoder"):
        model.learn(10)
    model.set_parameters(before)
    model.learn(10)


def test_upstream_weights_load_into_seer(tmp_path):
    """A project that changes its import keeps its trained agents: the names of the weights are the same."""
    upstream = DQN("CnnPolicy", LightEnv(size=48), buffer_size=50, learning_starts=10)
    upstream.learn(30)
    upstream.save(tmp_path / "dqn")
    model = SEERDQN("CnnPolicy", LightEnv(size=48), buffer_size=50, device="cpu")
    model.set_parameters(tmp_path / "dqn")
    assert_same(model.policy.state_dict(), upstream.policy.state_dict())


def test_a_buffer_that_was_reset_takes_another_encoder(tmp_path):
    model, other = make_model(SEERDQN, freeze_after=30), make_model(SEERDQN, freeze_after=30, seed=1)
    model.learn(40)
    model.replay_buffer.reset()
    model.set_parameters(other.get_parameters())
    model.save_replay_buffer(tmp_path / "empty")
    model.learn(20, reset_num_timesteps=False)
    assert model.replay_buffer.encoder_fingerprint == model.policy.encoder_fingerprint()
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = SEERDQN.load(tmp_path / "model", env=model.get_env(), device="cpu")
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert loaded.replay_buffer.size() == 20
    # An empty buffer fits every encoder
    for loads in (loaded, make_model(SEERDQN, freeze_after=None)):
        loads.load_replay_buffer(tmp_path / "empty")
        loads.learn(20)
        assert loads.replay_buffer.size() == 20


def test_a_buffer_can_be_saved_within_the_model(tmp_path):
    """As in SB3, if somebody asks for it."""
    model = make_model(SEERDQN, freeze_after=30)
    model.learn(40)
    model.save(tmp_path / "model", include=["replay_buffer"])
    loaded = SEERDQN.load(tmp_path / "model", env=model.get_env(), device="cpu")
    assert loaded.replay_buffer.size() == 40 and loaded.replay_buffer.stage == "latents"
    assert_same(train_on(model), train_on(loaded))


def test_what_a_file_holds_is_compared_with_the_model_that_is_to_load_it(tmp_path):

    def stacked(n_envs: int, **kwargs) -> SEERDQN:
        env = VecFrameStack(make_vec_env(LightEnv, n_envs), 4)
        policy_kwargs = dict(features_extractor_class=TinyEncoder)
        kwargs = {**dict(buffer_size=200, freeze_after=None, device="cpu", policy_kwargs=policy_kwargs), **kwargs}
        return SEERDQN("CnnPolicy", env, **kwargs)

    stacked(2).learn(40).save_replay_buffer(tmp_path / "stack")
    for model, message in (
        (make_model(SEERDQN), "`observation_space` .*stack.* must be Box.*, got Box"),
        (stacked(1), "`n_envs` .*stack.* must be 1, .*got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            model.load_replay_buffer(tmp_path / "stack")


def test_spaces_are_compared_to_the_last_bound():
    """gymnasium's words for a space leave out most bounds if there are many."""
    low = np.zeros((3, 40, 40), dtype=np.float32)
    high = low + np.arange(40, dtype=np.float32) + 1.0
    other = high.copy()
    other[1, 20, 20] += 1.0
    boxes = [spaces.Dict(image=spaces.Box(low, bound)) for bound in (high, high.copy(), other)]
    assert str(boxes[0]) == str(boxes[2])
    assert describe(boxes[0]) == describe(boxes[1]) != describe(boxes[2])


def test_a_bound_may_be_printed_otherwise(tmp_path):
    """numpy 2.0 prints 1048576.0 where numpy 2.4 prints 1.048576e+06. Other bounds are refused all the same."""
    model = make_model(SEERDQN)
    model.learn(20)
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    with np.load(tmp_path / "buffer.pkl") as file:
        arrays = dict(file)
    meta = json.loads(str(arrays["meta"]))
    assert "Box(0, 255, " in meta["observation_space"]
    for bounds, checksum in (("0.0, 2.55e+02", ""), ("0, 255", "1")):
        changed = {**meta, "observation_space": meta["observation_space"].replace("0, 255", bounds) + checksum}
        with open(tmp_path / "other.pkl", "wb") as stream:
            np.savez(stream, **{**arrays, "meta": np.array(json.dumps(changed))})
        if checksum:
            with pytest.raises(ValueError, match="`observation_space` of the replay buffer"):
                model.load_replay_buffer(tmp_path / "other.pkl")
        else:
            model.load_replay_buffer(tmp_path / "other.pkl")
            assert model.replay_buffer.size() == 20


def test_latents_of_two_encoders_never_mix(tmp_path):
    """Weights may also come from the policy's own methods: the next learn() refuses them."""
    model, other = (make_model(SEERDQN, seed=seed, freeze_after=40).learn(60) for seed in (0, 1))
    kept = copy.deepcopy(model.policy.state_dict())
    model.policy.load_state_dict(other.policy.state_dict())
    with pytest.raises(ValueError, match=r"latents of encoder \w+, but the weights are of encoder \w+\. Call .*reset"):
        model.learn(20, reset_num_timesteps=False)
    model.policy.load_state_dict(kept)
    model.learn(20, reset_num_timesteps=False)
    # Or the next update, if a callback did it
    model.policy.load_state_dict(other.policy.state_dict())
    with pytest.raises(ValueError, match="latents of encoder"):
        model.train(gradient_steps=1, batch_size=8)
    # Without latents, another encoder is welcome
    model.replay_buffer.reset()
    model.policy.load_state_dict(other.policy.state_dict())
    model.learn(20, reset_num_timesteps=False)
    assert model.replay_buffer.encoder_fingerprint == model.policy.encoder_fingerprint()


@pytest.mark.parametrize("latent_dtype", ["float32", "uint8"])
@pytest.mark.parametrize("total_timesteps", [30, 60])
def test_a_dropped_buffer_can_be_loaded_again(total_timesteps, latent_dtype, tmp_path):
    """SB3's users drop a buffer to free its memory."""
    kwargs = dict(augmentation="random_crop", augmentation_kwargs=dict(size=12), n_augmentations=2)
    model = make_model(SEERDQN, freeze_after=40, latent_dtype=latent_dtype, **kwargs).learn(total_timesteps)
    expected, indices = model.replay_buffer, np.arange(10)
    model.save_replay_buffer(tmp_path / "buffer")
    model.replay_buffer = None
    model.load_replay_buffer(tmp_path / "buffer")
    assert (model.replay_buffer.stage, model.replay_buffer.size()) == (expected.stage, total_timesteps)
    th.testing.assert_close(model.replay_buffer._get_samples(indices).rewards, expected._get_samples(indices).rewards)
    del model.replay_buffer
    model.load_replay_buffer(tmp_path / "buffer")
    model.learn(30, reset_num_timesteps=False)
    assert model.encoder_frozen and model.replay_buffer.size() == total_timesteps + 30


def test_weights_of_networks_that_share_convolutions_must_be_equal():
    kwargs: dict[str, Any] = dict(buffer_size=10, device="cpu")
    theirs = TD3("CnnPolicy", DialEnv(size=36), **kwargs)
    weights = {"policy": theirs.get_parameters()["policy"]}
    tied, apart = (
        SEERTD3("CnnPolicy", DialEnv(size=36), freeze_after=None, policy_kwargs=dict(tie_convolutions=tied), **kwargs)
        for tied in (True, False)
    )
    before = copy.deepcopy(dict(tied.policy.state_dict()))
    with pytest.raises(ValueError, match=r"actor\.features_extractor\.\S+ and critic\.\S+ must be equal"):
        tied.set_parameters(weights, exact_match=False)
    assert_same(dict(tied.policy.state_dict()), before)
    apart.set_parameters(weights, exact_match=False)
    assert_same(dict(apart.policy.state_dict()), dict(theirs.policy.state_dict()))


@pytest.mark.filterwarnings("ignore:.*no encoder to freeze")
def test_a_dropped_buffer_without_images_can_be_loaded_again(tmp_path):
    model = SEERSAC("MlpPolicy", "Pendulum-v1", buffer_size=100, learning_starts=10, device="cpu").learn(20)
    model.save_replay_buffer(tmp_path / "buffer")
    del model.replay_buffer
    model.load_replay_buffer(tmp_path / "buffer")
    assert model.replay_buffer.size() == 20


def test_the_message_names_the_file_to_move_away(tmp_path):
    """RL Zoo's -i loads a checkpoint from before the freeze, with the buffer of the end of the training beside it."""
    model = make_model(SEERDQN, freeze_after=30).learn(20)
    model.save(tmp_path / "checkpoint")
    model.learn(20, reset_num_timesteps=False).save_replay_buffer(tmp_path / "replay_buffer.pkl")
    loaded = SEERDQN.load(tmp_path / "checkpoint", env=model.get_env(), device="cpu")
    with pytest.raises(ValueError, match=r"replay_buffer\.pkl holds latents .* is not frozen\. .* or move this file away"):
        loaded.load_replay_buffer(tmp_path / "replay_buffer.pkl")
    loaded.learn(20, reset_num_timesteps=False)


def test_a_frozen_model_of_version_0_1_0_loads():
    """It has uint8 latents of cropped images. What it says of some images was written by 0.1.0."""
    data = Path(__file__).parent / "data"
    model = SEERRainbow.load(data / "0.1.0_model.zip", env=LightEnv(size=24), device="cpu")
    observations = np.random.default_rng(0).integers(0, 256, (5, 1, 24, 24), dtype=np.uint8)
    with np.load(data / "0.1.0_model_expected.npz") as expected:
        np.testing.assert_allclose(model.encode(observations).numpy(), expected["latents"], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(model.predict(observations, deterministic=True)[0], expected["actions"])
    assert model.encoder_frozen and model.replay_buffer.encoder.codec.scale.shape == (1, 4)
    model.learn(30, reset_num_timesteps=False)


@pytest.mark.filterwarnings("ignore:.*no encoder to freeze")
def test_a_buffer_of_images_is_loaded_without_an_encoder_to_freeze(tmp_path):
    kwargs: dict[str, Any] = dict(replay_buffer_class=LatentReplayBuffer, learning_starts=10, device="cpu", buffer_size=100)
    model = SEERDQN(CnnPolicy, LightEnv(size=36), **kwargs)
    model.learn(30)
    model.save_replay_buffer(tmp_path / "buffer")
    # It is one kind of file, with an encoder and without
    for policy in (CnnPolicy, "CnnPolicy"):
        other = SEERDQN(policy, LightEnv(size=36), freeze_after=None, **kwargs)
        other.load_replay_buffer(tmp_path / "buffer")
        assert other.replay_buffer.size() == model.replay_buffer.size() == 32
        np.testing.assert_array_equal(*(each.replay_buffer.images_at(np.arange(32))[0] for each in (model, other)))
        other.learn(20)
    # As 0.1.0 saved it without
    save_to_pkl(tmp_path / "pickle.pkl", model.replay_buffer)
    with pytest.raises(ValueError, match=r"a pickled LatentReplayBuffer. Only algorithms without an encoder"):
        other.load_replay_buffer(tmp_path / "pickle")


def test_a_range_of_another_encoder_is_refused(tmp_path):
    """Also where no latents are held: new ones would be clipped to it."""
    model, other = (make_model(SEERDQN, freeze_after=30, latent_dtype="uint8", seed=seed) for seed in (0, 1))
    for each in (model, other):
        each.learn(60)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = SEERDQN.load(tmp_path / "model", env=LightEnv(), device="cpu")
    loaded.load_replay_buffer(tmp_path / "buffer")
    loaded.learn(20, reset_num_timesteps=False)
    for each in (model, loaded, SEERDQN.load(tmp_path / "model", env=LightEnv(), device="cpu")):
        each.replay_buffer.reset()
        each.set_parameters(other.get_parameters())
        with pytest.raises(ValueError, match="range of latent_dtype='uint8' was fitted on encoder"):
            each.learn(20)
        each.set_parameters(tmp_path / "model.zip")
        each.learn(20)


def test_a_wrapped_ring_is_frozen_as_if_it_had_not_been_saved(tmp_path):
    """Invariant 9: random augmentations meet the same images."""
    model = make_model(SEERDQN, freeze_after=None, buffer_size=20, augmentation="random_shift", n_augmentations=2)
    model.learn(30)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = SEERDQN.load(tmp_path / "model", env=LightEnv(), device="cpu")
    loaded.load_replay_buffer(tmp_path / "buffer")
    latents = []
    for each in (model, loaded):
        th.manual_seed(0)
        each.freeze_encoder()
        buffer = each.replay_buffer
        slots = buffer.store.slots(np.arange(20))
        latents.append([buffer.store.latents(slots, np.zeros(20, int), np.full(20, copy)) for copy in range(2)])
    np.testing.assert_array_equal(*latents)


def test_the_memory_of_a_loaded_buffer_is_the_one_it_was_saved_with(tmp_path):
    model = make_model(SEERDQN, freeze_after=None, buffer_size=100)
    model.learn(20)
    model.save_replay_buffer(tmp_path / "buffer")
    other = make_model(SEERDQN, freeze_after=None, buffer_size=200)
    with pytest.warns(UserWarning, match="buffer_size=200 has no effect: .* has the memory of 100 images"):
        other.load_replay_buffer(tmp_path / "buffer")
    assert other.replay_buffer.buffer_size == 100


def test_a_cap_that_is_smaller_than_the_saved_buffer_has_no_effect(tmp_path):
    model = make_model(SEERDQN, freeze_after=None, buffer_size=200).learn(30)
    other = make_model(SEERDQN, freeze_after=None, buffer_size=50, max_latent_buffer_size=100)
    model.save_replay_buffer(tmp_path / "buffer")
    with pytest.warns(UserWarning) as warned:
        other.load_replay_buffer(tmp_path / "buffer")
    assert any("max_latent_buffer_size=100 has no effect" in str(warning.message) for warning in warned)
    assert (other.replay_buffer.buffer_size, other.replay_buffer.size()) == (200, 30)


def test_latents_keep_the_capacity_they_were_saved_with(tmp_path):
    model = make_model(SEERDQN, freeze_after=30, buffer_size=40, max_latent_buffer_size=80).learn(40)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    for cap in (70, None):
        other = SEERDQN.load(tmp_path / "model", env=LightEnv(), device="cpu", max_latent_buffer_size=cap)
        with pytest.warns(
            UserWarning, match=f"max_latent_buffer_size={cap} has no effect: .* holds 80 transitions as latents"
        ):
            other.load_replay_buffer(tmp_path / "buffer")
        assert other.replay_buffer.buffer_size == 80
    same = SEERDQN.load(tmp_path / "model", env=LightEnv(), device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same.load_replay_buffer(tmp_path / "buffer")

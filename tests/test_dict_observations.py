"""``Dict`` observations: images become latents, the other keys stay what they are."""

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.wrappers import FilterObservation
from sb3_contrib import QRDQN
from stable_baselines3 import DQN, SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.torch_layers import CombinedExtractor
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize
from torch import nn

from sb3_seer import SEERCURL, SEERDQN, SEERQRDQN, SEERSAC, SEERTD3, SplitExtractor
from sb3_seer.common.replay import LatentReplayBuffer
from tests.dict_helpers import (
    COMBINED,
    IMAGES,
    OTHERS,
    SPLIT,
    SwitchEnv,
    TinyDictEncoder,
    make_env,
    make_model,
)
from tests.helpers import ALGORITHMS, LightEnv, assert_same, check_latents_stand_for_images, is_continuous, train_on
from tests.replay_oracle import GAMMA, batch_of

# ---- agents ----


class LearnedVector(CombinedExtractor):
    """A layer for the vector too."""

    def __init__(self, observation_space: spaces.Dict, cnn_output_dim: int) -> None:
        super().__init__(observation_space, cnn_output_dim)
        self.extractors["vector"] = nn.Linear(2, 2)


# Every algorithm, and the other extractors with one of each kind
AGENTS = pytest.mark.parametrize(
    "algorithm, extractor, size",
    [(algorithm, *SPLIT.values) for algorithm in ALGORITHMS]
    + [(algorithm, *COMBINED.values) for algorithm in (SEERSAC, SEERTD3, SEERQRDQN)]
    + [(algorithm, LearnedVector, 36) for algorithm in (SEERSAC, SEERDQN)],
)


def encoder_state(model: Any) -> dict[str, th.Tensor]:
    """:return: all weights of all encoders, the targets' too"""
    parts = (".trunk.", ".projection.", ".extractors.image.", ".extractors.map.")
    return {name: value.clone() for name, value in model.policy.state_dict().items() if any(part in name for part in parts)}


def count_encoder_calls(model: Any) -> list[str]:
    """:return: a list that grows with the key of each image, whenever a convolution sees a batch of them"""
    calls: list[str] = []
    modules: dict[nn.Module, str] = {}
    for network in [*model.policy.encoder_networks, *model.policy.target_networks]:
        extractor = network.features_extractor
        parts = extractor.trunk if isinstance(extractor, SplitExtractor) else extractor.extractors
        modules.update({parts[key]: key for key in IMAGES})
    for module, key in modules.items():
        module.register_forward_hook(lambda *_, key=key: calls.append(key))
    return calls


def seeded_sample(model: Any, batch_size: int = 32) -> Any:
    np.random.seed(5)
    return model.replay_buffer.sample(batch_size, env=model._vec_normalize_env)


def vec_env(wrap: str) -> Any:
    # What float64 as float32 loses is lost before it is normalised here, and after it in SB3
    dtype = "float32" if wrap == "normalised" else "float64"
    env = make_vec_env(lambda: make_env(DQN, 36, boxes=wrap == "stacked", dtype=dtype), n_envs=2, seed=3)
    if wrap == "normalised":
        return VecNormalize(env, norm_obs_keys=["vector"])
    return VecFrameStack(env, 3) if wrap == "stacked" else env


@pytest.mark.parametrize("wrap", ["plain", "normalised", "stacked"])
@pytest.mark.parametrize("algorithm, upstream", [(SEERQRDQN, QRDQN), (SEERDQN, DQN)])
def test_without_freeze_weights_and_samples_are_upstreams_to_the_last_bit(algorithm, upstream, wrap):
    """Invariant 1, with a ring that wraps around; the same samples after the freeze."""

    def train(cls: type, **kwargs: Any) -> Any:
        model = make_model(cls, CombinedExtractor, env=vec_env(wrap), buffer_size=60, train_freq=2, gradient_steps=2, **kwargs)
        return model.learn(100)

    ours, theirs = train(algorithm, freeze_after=None), train(upstream)
    assert_same(ours.policy.state_dict(), theirs.policy.state_dict())
    images, expected = seeded_sample(ours), seeded_sample(theirs)
    for mine, sb3s in ((images.observations, expected.observations), (images.next_observations, expected.next_observations)):
        assert mine.keys() == sb3s.keys()
        for key, part in mine.items():
            # A vector of float64 is kept as float32, which is what a network makes of it
            assert th.equal(part, sb3s[key].float() if key == "vector" else sb3s[key]), key
    for name in ("actions", "rewards", "dones"):
        assert th.equal(getattr(images, name), getattr(expected, name))
    assert (wrap == "normalised") == (images.observations["vector"].abs().max() > 1)

    assert ours.replay_buffer.n_stack == (3 if wrap == "stacked" else 1)
    # A frame of each image, whatever the stack
    assert ours.replay_buffer.nbytes == 60 * (36 * 36 + 2 * 40 * 40)
    ours.freeze_encoder()
    latents = seeded_sample(ours)
    assert th.equal(latents.rewards, images.rewards)
    for got, were in ((latents.observations, images.observations), (latents.next_observations, images.next_observations)):
        assert_same(got.vector_obs, {key: part for key, part in were.items() if key not in IMAGES})
        th.testing.assert_close(got.values, ours.policy.encode(were), rtol=1e-4, atol=1e-5)


class DepthEnv(SwitchEnv):
    """Beside the lamps, as bytes, their distances, as floats; both with the channel last."""

    def __init__(self, env: LightEnv) -> None:
        super().__init__(env)
        size = env.size
        self.observation_space = spaces.Dict(
            image=spaces.Box(0, 255, (size, size, 1), np.uint8), depth=spaces.Box(0, 9, (size, size, 1), np.float32)
        )

    def _observation(self, image: np.ndarray) -> dict[str, Any]:
        self.switch = -1
        depth = self.unwrapped.np_random.uniform(0, 9, (*image.shape[1:], 1))
        return dict(image=image.transpose(1, 2, 0), depth=depth.astype(np.float32))


@pytest.mark.parametrize("size", [36, 40])
def test_frames_of_depth_are_stored_once(size):
    """``VecFrameStack`` stacks floats along the last axis, where SB3 leaves them; 36 pixels could be taken for 3 frames."""

    def train(cls: type, **kwargs: Any) -> Any:
        env = VecFrameStack(make_vec_env(lambda: DepthEnv(LightEnv(size=size)), n_envs=2, seed=3), 3)
        return make_model(cls, CombinedExtractor, env=env, buffer_size=60, train_freq=2, **kwargs).learn(100)

    ours, theirs = train(SEERDQN, freeze_after=None), train(DQN)
    assert ours.observation_space["depth"].shape == (size, size, 3)
    assert_same(ours.policy.state_dict(), theirs.policy.state_dict())
    buffer, expected = ours.replay_buffer, seeded_sample(theirs)
    assert_same(seeded_sample(ours).observations, expected.observations)
    assert_same(seeded_sample(ours).next_observations, expected.next_observations)
    frame_bytes = size * size * (1 + 4)
    assert buffer.n_stack == 3 and buffer.nbytes == 60 * frame_bytes
    # Of an episode of 10 steps: a frame before its first one (zeros), and its last one
    assert buffer.extra_bytes <= (60 / 10 + 4) * 2 * frame_bytes


def test_normalised_images_are_refused_by_name():
    env = VecNormalize(make_vec_env(lambda: make_env(DQN, boxes=True)), norm_obs_keys=["map", "vector"])
    with pytest.raises(ValueError, match=r"`norm_obs_keys` of VecNormalize must not have the images 'image', 'map', got"):
        make_model(SEERDQN, CombinedExtractor, env=env)


@AGENTS
def test_frozen_encoders_stay_the_same_and_heads_move(algorithm, extractor, size):
    """Invariants 2 and 5: all that is no encoder learns, and a step of the environments encodes each image once."""
    env = make_vec_env(lambda: make_env(algorithm, size), n_envs=2)
    model = make_model(algorithm, extractor, env=env, freeze_after=None)
    model.learn(40)
    model.freeze_encoder()
    encoder, before = encoder_state(model), copy.deepcopy(model.policy.state_dict())
    calls = count_encoder_calls(model)
    # 25 steps, and the beginnings of three episodes, where an agent that explores needs no latents
    model.learn(50, reset_num_timesteps=False)
    assert 25 <= calls.count("image") == calls.count("map") <= 25 + 3
    assert_same(encoder_state(model), encoder)
    moved = {name for name, value in model.policy.state_dict().items() if not th.equal(value, before[name])}
    assert moved == set(before) - set(encoder)


@AGENTS
def test_cached_latents_are_used_with_the_other_keys_of_the_moment(algorithm, extractor, size):
    model = make_model(algorithm, extractor, size, freeze_after=20, seed=1)  # with 0, some of the few features are dead
    model.learn(45)
    calls, seen = count_encoder_calls(model), []
    network = model.policy.actor if is_continuous(algorithm) else model.policy.encoder_networks[0]
    extract_features = network.extract_features
    network.extract_features = lambda *args: seen.append(extract_features(*args)) or seen[-1]

    def features(observation: dict[str, np.ndarray]) -> tuple[th.Tensor, int]:
        calls.clear()
        model.predict(observation, deterministic=True)
        return seen[-1], len(calls)

    observation = model._last_obs
    cached, n_calls = features(observation)
    assert n_calls == 0
    moved = {**observation, "vector": -observation["vector"], "level": (observation["level"] + 1) % 3}
    with_others, n_calls = features(moved)
    assert n_calls == 0 and not th.equal(with_others, cached)
    for key in IMAGES:
        values, n_calls = features({**observation, key: observation[key] // 2})
        assert n_calls == 2 and not th.equal(values, cached)

    # The same without a cache
    model.policy.cache_latents({key: observation[key] // 2 for key in IMAGES}, th.zeros(1, *model.policy.latent_shape))
    for values, again in ((cached, observation), (with_others, moved)):
        fresh, n_calls = features(again)
        assert n_calls == 2
        th.testing.assert_close(values, fresh, rtol=1e-4, atol=1e-5)


@AGENTS
def test_predict_and_encode_take_dicts_before_and_after(algorithm, extractor, size):
    """Invariant 10."""
    model = make_model(algorithm, extractor, size, freeze_after=None)
    model.learn(30)
    model.observation_space.seed(0)
    singles = [model.observation_space.sample() for _ in range(5)]
    observations = batch_of(singles)
    n_latents = 2 if is_continuous(algorithm) and extractor is TinyDictEncoder else 1
    latent_dim = 8 if extractor is TinyDictEncoder else 2 * 8

    actions, latents = [], []
    for _ in range(2):
        actions.append(model.predict(observations, deterministic=True)[0])
        single, _ = model.predict(singles[3], deterministic=True)
        np.testing.assert_allclose(single, actions[-1][3], rtol=1e-5)
        latents.append(model.encode(observations))
        th.testing.assert_close(model.encode(singles[3]), latents[-1][3:4], rtol=1e-5, atol=1e-6)
        # Nothing but images is encoded
        assert th.equal(model.encode({key: observations[key] for key in IMAGES}), latents[-1])
        if not model.encoder_frozen:
            model.freeze_encoder()
    np.testing.assert_allclose(*actions, rtol=1e-5)
    assert actions[0].shape == (5, *model.action_space.shape)
    assert latents[0].shape == (5, n_latents, latent_dim) and th.equal(*latents)


@AGENTS
def test_training_from_latents_equals_training_from_images_through_the_frozen_encoder(algorithm, extractor, size):
    # By default SEERCURL has an augmentation, for its contrastive loss
    kwargs: dict[str, Any] = dict(augmentation=None, cpc_update_freq=None) if algorithm is SEERCURL else {}
    check_latents_stand_for_images(lambda: make_model(algorithm, extractor, size, freeze_after=None, **kwargs).learn(40))


@pytest.mark.slow
def test_learns_what_needs_both_an_image_and_a_vector():
    """An episode is worth 10 to an agent that sees both, 5 to one that sees no vector, 2.5 to one that sees no image."""
    model = SEERDQN(
        "MultiInputPolicy", make_env(SEERDQN), buffer_size=1000, freeze_after=700, learning_starts=100, learning_rate=1e-3,
        batch_size=32, gamma=0.5, train_freq=1, exploration_fraction=0.2, target_update_interval=100, seed=0, device="cpu",
        policy_kwargs=dict(net_arch=[64], features_extractor_class=TinyDictEncoder),
    )  # fmt: skip
    model.learn(1500)
    assert model.encoder_frozen and model.replay_buffer.size() == 1500
    env = Monitor(make_env(SEERDQN))
    env.reset(seed=1)
    assert evaluate_policy(model, env, n_eval_episodes=20)[0] > 8.5


@pytest.mark.parametrize("total_timesteps", [30, 60])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_resumes_exactly_before_and_after_the_freeze(algorithm, total_timesteps, tmp_path):
    """Invariant 9, with images that are cropped."""
    kwargs: dict[str, Any] = dict(augmentation="random_crop", augmentation_kwargs=dict(size=12), n_augmentations=2)
    model = make_model(algorithm, freeze_after=40, **kwargs)
    model.learn(total_timesteps)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")

    loaded = algorithm.load(tmp_path / "model", env=model.get_env(), device="cpu")
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert loaded.encoder_frozen == model.encoder_frozen == (total_timesteps > 40)
    assert loaded.replay_buffer.stage == model.replay_buffer.stage
    assert loaded.replay_buffer.size() == model.replay_buffer.size() == total_timesteps
    np.testing.assert_allclose(*(each.predict(model._last_obs, deterministic=True)[0] for each in (model, loaded)), rtol=1e-5)
    assert_same(train_on(model), train_on(loaded))
    # And on through the freeze, if that is still to come
    loaded.learn(30, reset_num_timesteps=False)
    assert loaded.encoder_frozen and loaded.replay_buffer.size() == total_timesteps + 30


@pytest.mark.parametrize("total_timesteps", [40, 75])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_buffer_of_sb3_loads(frozen, total_timesteps, tmp_path):
    """One that is filled in part, and one that has wrapped around."""
    upstream = make_model(DQN, CombinedExtractor, size=36, buffer_size=60)
    upstream.learn(total_timesteps)
    upstream.save_replay_buffer(tmp_path / "sb3")
    model = make_model(SEERDQN, CombinedExtractor, size=36, freeze_after=20)
    if frozen:
        model.learn(30)
    model.load_replay_buffer(tmp_path / "sb3")

    size = min(total_timesteps, 60)
    assert model.replay_buffer.size() == size and model.replay_buffer.stage == ("latents" if frozen else "images")
    theirs = upstream.replay_buffer
    expected = theirs._get_samples((np.arange(size) + (theirs.pos if theirs.full else 0)) % 60)
    # Both oldest first
    rows = np.arange(model.replay_buffer.pos - size, model.replay_buffer.pos) % model.replay_buffer.buffer_size
    samples = model.replay_buffer._get_samples(rows)
    for name in ("actions", "rewards", "dones"):
        assert th.equal(getattr(samples, name), getattr(expected, name))
    for got, were in ((samples.observations, expected.observations), (samples.next_observations, expected.next_observations)):
        if frozen:
            th.testing.assert_close(got.values, model.policy.encode(were), rtol=1e-4, atol=1e-5)
            assert_same(got.vector_obs, {key: were[key].float() if key == "vector" else were[key] for key in OTHERS})
        else:
            assert_same(got, {**were, "vector": were["vector"].float()})


class JoinsAll(CombinedExtractor):
    """What a user may have written: nothing tells which part of it is for the images."""

    def forward(self, observations: dict[str, th.Tensor]) -> th.Tensor:
        return th.tanh(super().forward(observations))


@pytest.mark.parametrize("extractor, keys", [(CombinedExtractor, ["vector", "level"]), (JoinsAll, [*IMAGES, *OTHERS])])
@pytest.mark.parametrize("algorithm, upstream", [(SEERSAC, SAC), (SEERQRDQN, QRDQN), (SEERDQN, DQN)])
def test_without_an_encoder_it_is_the_sb3_class(algorithm, upstream, extractor, keys, tmp_path):
    def make(cls: type) -> Any:
        return make_model(cls, extractor, env=FilterObservation(make_env(cls, 36), keys))

    with pytest.warns(UserWarning, match="no encoder to freeze") as warned:
        model = make(algorithm).learn(40)
    assert len([warning for warning in warned if "no encoder" in str(warning.message)]) == 1
    expected = make(upstream).learn(40)
    assert_same(model.policy.state_dict(), expected.policy.state_dict())

    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    with pytest.warns(UserWarning, match="no encoder to freeze"):
        loaded = algorithm.load(tmp_path / "model", env=model.get_env(), device="cpu")
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert_same(train_on(loaded), train_on(expected))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_n_step_returns(algorithm):
    """SB3 has none for Dict observations."""
    model = make_model(algorithm, freeze_after=None, n_steps=3, gamma=GAMMA)
    model.learn(40)
    before = seeded_sample(model)
    model.freeze_encoder()
    after = seeded_sample(model)
    model.learn(20, reset_num_timesteps=False)
    assert model.n_steps == model.replay_buffer.n_steps == 3
    assert th.equal(before.rewards, after.rewards) and th.equal(before.discounts, after.discounts)
    assert set(before.discounts.flatten().tolist()) == {GAMMA, GAMMA**2, GAMMA**3}


def test_a_policy_of_the_users_own_without_images():
    class OwnPolicy(SEERDQN.policy_aliases["MultiInputPolicy"]):
        pass

    with pytest.warns(UserWarning, match="no encoder to freeze"):
        SEERDQN(OwnPolicy, FilterObservation(make_env(SEERDQN), ["vector"]), buffer_size=50, learning_starts=10).learn(20)


def test_latents_of_unknown_size_are_refused():
    class TwoLayers(CombinedExtractor):
        def __init__(self, observation_space: spaces.Dict, cnn_output_dim: int) -> None:
            super().__init__(observation_space, cnn_output_dim)
            self.extractors["map"] = nn.Sequential(self.extractors["map"], nn.Linear(cnn_output_dim, cnn_output_dim))

    with pytest.raises(ValueError, match=r"TwoLayers must have .* for the image 'map', got Sequential"):
        make_model(SEERDQN, TwoLayers, size=36)


def test_images_of_two_sizes_are_cropped_to_one():
    kwargs: dict[str, Any] = dict(augmentation="random_crop", augmentation_kwargs=dict(size=14), n_augmentations=2)
    model = make_model(SEERDQN, freeze_after=30, **kwargs)
    space = model.policy.image_space
    assert space["image"].shape == (1, 14, 14) and space["map"].shape == (2, 14, 14)
    assert all(space[key] == model.observation_space[key] for key in OTHERS)
    model.learn(20)
    crops = seeded_sample(model).observations
    augmentation, model.replay_buffer.encoder.augmentation = model.replay_buffer.encoder.augmentation, None
    whole = seeded_sample(model).observations
    model.replay_buffer.encoder.augmentation = augmentation
    for key in IMAGES:
        windows = whole[key].unfold(2, 14, 1).unfold(3, 14, 1)  # (batch_size, channels, n_tops, n_lefts, 14, 14)
        found = (windows == crops[key][:, :, None, None]).all(dim=5).all(dim=4).all(dim=1)  # (batch_size, n_tops, n_lefts)
        assert found.any(dim=2).any(dim=1).all()
        # At different places
        assert len(found.nonzero()[:, 1:].unique(dim=0)) > 3
    # Where nothing is augmented, it is the middle that is encoded
    observation = model.observation_space.sample()
    middle = {"image": observation["image"][None, :, 1:15, 1:15], "map": observation["map"][None, :, 3:17, 3:17]}
    expected = model.policy.encode({key: th.as_tensor(part) for key, part in middle.items()})
    assert th.equal(model.encode(observation), expected)
    model.learn(20, reset_num_timesteps=False)
    assert model.encoder_frozen
    assert seeded_sample(model, 8).observations.values.shape == (8, 1, 8)


def test_images_that_are_as_large_as_the_crop_stay():
    kwargs: dict[str, Any] = dict(augmentation="random_crop", augmentation_kwargs=dict(size=16), n_augmentations=2)
    policy = make_model(SEERDQN, **kwargs).policy
    assert policy.image_size == dict(map=(16, 16))
    assert policy.image_space["image"] == policy.observation_space["image"]


def test_a_missing_value_does_not_end_an_n_step_window():
    """A NaN, as sensors and games give for what is unknown, is not equal to itself."""
    space = spaces.Dict(image=spaces.Box(0, 255, (1, 4, 4), np.uint8), sensor=spaces.Box(-np.inf, np.inf, (2,), np.float32))
    buffer = LatentReplayBuffer(20, space, spaces.Discrete(2), device="cpu", n_steps=3, gamma=0.5)
    observations = [dict(image=np.full((1, 1, 4, 4), t, np.uint8), sensor=np.array([[np.nan, t]])) for t in range(11)]
    for obs, next_obs in itertools.pairwise(observations):
        buffer.add(obs, next_obs, np.zeros((1, 1)), np.ones(1), np.zeros(1), [{}])
    rewards = buffer._get_samples(np.arange(8)).rewards[:, 0]
    assert rewards.tolist() == [1.75] * 8

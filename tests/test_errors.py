"""Bad input: one clear ValueError at construction, which names the parameter, what was given and what is allowed."""

import numpy as np
import pytest
import torch as th
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from test_invariants import make_model
from tiny_envs import LightEnv, TinyEncoder

from sb3_seer import SEERDQN, SEERQRDQN, SEERSAC, FreezeEncoderCallback


@pytest.mark.parametrize("algorithm", [SEERSAC, SEERDQN])
@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(freeze_after=-1), r"freeze_after must be .* not -1"),
        (dict(freeze_after=0.0), r"freeze_after must be .* not 0\.0"),
        (dict(freeze_after=1.5), r"freeze_after must be .* not 1\.5"),
        (dict(freeze_after="soon"), "freeze_after must be .* not 'soon'"),
        (dict(freeze_after=True), "freeze_after must be .* not True"),
        (dict(n_augmentations=0, augmentation="random_shift"), "n_augmentations.*0"),
        (dict(n_augmentations=2.5, augmentation="random_shift"), "n_augmentations.*2.5"),
        (dict(n_augmentations=4), "n_augmentations.*4.*augmentation"),
        (dict(augmentation="random_crop", augmentation_kwargs=dict(size=84)), "84 does not fit into images of 16x16"),
        (dict(augmentation="flip"), "augmentation must be one of .*random_crop.*random_shift.*not 'flip'"),
        (dict(augmentation=th.nn.Flatten()), "augmentation must map images"),
        (dict(latent_dtype="float64"), "latent_dtype.*float64.*float32"),
        (dict(augmentation=["random_crop"]), "augmentation must be one of"),
        (dict(augmentation=th.nn.ZeroPad2d(2)), "not larger, not .*16, 16.* to .*20, 20"),
        (dict(latent_dtype="uint8", freeze_after=0), "uint8.*freeze_after=0"),
        (dict(max_latent_buffer_size=10), "max_latent_buffer_size.*10"),
        (dict(max_latent_buffer_size="large"), "max_latent_buffer_size.*large"),
        (dict(replay_buffer_class="HerReplayBuffer"), "replay_buffer_class must be LatentReplayBuffer .*HerReplayBuffer"),
        (dict(replay_buffer_class=HerReplayBuffer), "replay_buffer_class must be LatentReplayBuffer .*not HerReplayBuffer"),
        (dict(replay_buffer_class=ReplayBuffer), "replay_buffer_class must be LatentReplayBuffer .*not ReplayBuffer"),
    ],
)
def test_parameters(algorithm, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_model(algorithm, **kwargs)


def test_parameters_are_checked_when_a_model_is_loaded(tmp_path):
    make_model(SEERDQN).save(tmp_path / "model")
    before = (tmp_path / "model.zip").read_bytes()
    with pytest.raises(ValueError, match=r"freeze_after must be .* not -5"):
        SEERDQN.load(tmp_path / "model", freeze_after=-5)
    assert (tmp_path / "model.zip").read_bytes() == before


def test_a_latent_larger_than_the_image_says_what_would_change_it():
    """Images of 256 bytes; a latent of 200 float32 numbers has 800, of float16 400, of uint8 200."""
    with pytest.raises(ValueError, match="larger") as error:
        SEERQRDQN(
            "CnnPolicy", LightEnv(), buffer_size=1000, device="cpu",
            policy_kwargs=dict(features_extractor_class=TinyEncoder, features_extractor_kwargs=dict(latent_dim=200)),
        )  # fmt: skip
    for part in ("800", "256", "1,000", "320", "'float16'", "640", "'uint8'", "1,280"):
        assert part in str(error.value), part


def test_without_a_freeze_a_large_latent_is_no_error_until_it_is_asked_for():
    kwargs = dict(features_extractor_class=TinyEncoder, features_extractor_kwargs=dict(latent_dim=200))
    model = SEERQRDQN("CnnPolicy", LightEnv(), buffer_size=100, freeze_after=None, device="cpu", policy_kwargs=kwargs)
    model.learn(30)
    with pytest.raises(ValueError, match="larger"):
        model.freeze_encoder()
    assert not model.encoder_frozen and model.replay_buffer.stage == "images"
    assert all(parameter.requires_grad for parameter in model.policy.parameters())


def test_a_cnn_policy_without_images():
    with pytest.raises(ValueError, match="CnnPolicy needs images"):
        SEERDQN("CnnPolicy", "CartPole-v1")


def test_normalised_images():
    env = VecNormalize(make_vec_env(LightEnv), norm_obs=True)
    with pytest.raises(ValueError, match="norm_obs=True"):
        SEERQRDQN("CnnPolicy", env, buffer_size=10, policy_kwargs=dict(features_extractor_class=TinyEncoder))


def test_nothing_to_freeze():
    with pytest.warns(UserWarning, match="no encoder to freeze"):
        model = SEERSAC("MlpPolicy", "Pendulum-v1")
    with pytest.raises(ValueError, match="no encoder"):
        model.freeze_encoder()
    with pytest.raises(ValueError, match="no encoder"):
        model.encode(np.zeros(3, dtype=np.float32))


@pytest.mark.parametrize("freeze_after", [-1, 1.5, "auto", None])
def test_callback(freeze_after):
    with pytest.raises(ValueError, match="freeze_after must be"):
        FreezeEncoderCallback(freeze_after)


def test_a_buffer_that_the_memory_does_not_hold_is_named():
    model = make_model(SEERDQN, buffer_size=10**15, freeze_after=None)
    with pytest.raises(MemoryError, match=r"buffer_size=1,000,000,000,000,000 images, which take 256000000\.0 GB"):
        model.learn(1)

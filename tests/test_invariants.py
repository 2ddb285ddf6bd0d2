"""The claims of SEER, each a test. The replay buffer's own (3, 6, 7) are in ``test_replay_buffer.py``."""

import copy
from typing import Any

import numpy as np
import pytest
import torch as th
from sb3_contrib import QRDQN, TQC, CrossQ
from stable_baselines3 import DQN, SAC, TD3
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import NatureCNN

from sb3_seer import SEERDQN, SEERQRDQN, SEERSAC, SEERTD3, SEERTQC, SEERCrossQ
from sb3_seer.common.callbacks import FreezeEncoderCallback
from tests.helpers import (
    ALGORITHMS,
    DialEnv,
    LightEnv,
    TinyEncoder,
    assert_same,
    check_latents_stand_for_images,
    encoder_state,
    is_continuous,
    make_model,
)

# 1. Without a freeze, SEER is the algorithm that it extends


@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize(
    "algorithm, upstream, share",
    [
        (SEERQRDQN, QRDQN, None),
        (SEERDQN, DQN, None),
        (SEERTD3, TD3, False),
        (SEERTD3, TD3, True),
        (SEERTQC, TQC, False),
        (SEERTQC, TQC, True),
        (SEERCrossQ, CrossQ, False),
        (SEERCrossQ, CrossQ, True),
    ],
)
def test_without_freeze_the_weights_are_upstreams_to_the_last_bit(algorithm, upstream, share, n_steps):
    """Of actor and critic without tied convolutions, with features extractors of their own or a shared one."""

    def train(cls, **kwargs):
        # Small enough to wrap around, and a target that moves slowly (tau < 1)
        env_class = DialEnv if is_continuous(cls) else LightEnv
        env = make_vec_env(env_class, n_envs=2, env_kwargs=dict(size=36), vec_env_kwargs={}, seed=3)
        policy_kwargs: dict[str, Any] = dict(features_extractor_kwargs=dict(features_dim=16))
        if is_continuous(cls):
            policy_kwargs.update(share_features_extractor=share, net_arch=[16])
            if cls is algorithm:
                policy_kwargs.update(tie_convolutions=False)
        else:
            kwargs.update(target_update_interval=6)
        if upstream is not CrossQ:
            kwargs.update(tau=0.3)
        if cls is CrossQ:  # it has no CnnPolicy
            policy_kwargs.update(features_extractor_class=NatureCNN)
        model = cls(
            "MlpPolicy" if cls is CrossQ else "CnnPolicy",
            env,
            buffer_size=60,
            learning_starts=10,
            batch_size=8,
            train_freq=2,
            gradient_steps=2,
            n_steps=n_steps,
            seed=0,
            device="cpu",
            policy_kwargs=policy_kwargs,
            **kwargs,
        )
        model.learn(150)
        return model.policy.state_dict(), np.random.rand(), th.rand(1)

    ours, our_random, our_torch = train(algorithm, freeze_after=None)
    theirs, their_random, their_torch = train(upstream)
    assert_same(ours, theirs)
    assert our_random == their_random and our_torch == their_torch


def test_sac_with_mlp_policy_is_sb3s_to_the_last_bit():
    def train(cls, **kwargs):
        model = cls("MlpPolicy", "Pendulum-v1", seed=0, device="cpu", learning_starts=20, batch_size=8, **kwargs)
        return model.learn(60).policy.state_dict()

    with pytest.warns(UserWarning, match="nothing to freeze|no encoder to freeze"):
        ours = train(SEERSAC)
    assert_same(ours, train(SAC))


# 2. A frozen encoder never moves again; the heads do


@pytest.mark.parametrize("extractor", [TinyEncoder, NatureCNN])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_frozen_encoders_stay_the_same_and_heads_move(algorithm, extractor):
    size = 16 if extractor is TinyEncoder else 48
    kwargs: dict[str, Any] = {} if algorithm in (SEERSAC, SEERCrossQ) else dict(tau=0.3)  # CrossQ has no target
    model = make_model(algorithm, extractor, size=size, freeze_after=40, **kwargs)
    frozen: dict[str, Any] = {}

    class Remember(FreezeEncoderCallback):
        def _on_step(self) -> bool:
            super()._on_step()
            if self.model.encoder_frozen and not frozen:
                frozen.update(encoder=encoder_state(self.model), all=copy.deepcopy(self.model.policy.state_dict()))
            return True

    model.learn(150, callback=Remember(freeze_after=40))
    assert_same(encoder_state(model), frozen["encoder"])
    for online, target in zip(model.policy.encoder_networks, model.policy.target_networks, strict=False):
        for name in ("trunk", "projection") if extractor is TinyEncoder else ("cnn", "linear"):
            part = getattr(online.features_extractor, name).state_dict()
            assert_same(part, getattr(target.features_extractor, name).state_dict())
    moved = [name for name, value in model.policy.state_dict().items() if not th.equal(value, frozen["all"][name])]
    assert not set(moved) & set(frozen["encoder"])
    heads = set(frozen["all"]) - set(frozen["encoder"])
    # All heads learn, the target networks' and the encoder's normalisation among them
    assert heads == set(moved)


# 4. Latents stand for images


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_training_from_latents_equals_training_from_images_through_the_frozen_encoder(algorithm):
    # Before CrossQ's batch normalisation, the gradient of a bias is rounding alone, of which Adam makes whole steps
    policy_kwargs = dict(optimizer_class=th.optim.SGD) if algorithm is SEERCrossQ else {}

    check_latents_stand_for_images(
        lambda: make_model(algorithm, freeze_after=None, augmentation=None, policy_kwargs=policy_kwargs).learn(80)
    )


# 5. After the freeze, a gradient step calls no encoder and a step of the environments one


@pytest.mark.parametrize("augmentation", [None, "random_shift"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_encoder_calls_after_the_freeze(algorithm, augmentation):
    n_augmentations = 1 if augmentation is None else 2
    model = make_model(algorithm, freeze_after=40, augmentation=augmentation, n_augmentations=n_augmentations)
    model.learn(50)
    calls = []
    for module in {
        network.features_extractor.trunk for network in [*model.policy.encoder_networks, *model.policy.target_networks]
    }:
        module.register_forward_hook(lambda *_: calls.append(len(_[1][0])))
    model.train(gradient_steps=5, batch_size=8)
    assert calls == []
    # 25 steps, and the beginnings of three episodes, where an agent that explores needs no latents
    model.learn(25, reset_num_timesteps=False)
    assert 25 <= len(calls) <= 25 + 3


# 10. predict takes images, before and after


@pytest.mark.parametrize("augmentation", [None, "random_crop"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_predict_takes_images_before_and_after(algorithm, augmentation):
    kwargs = (
        {} if augmentation is None else dict(augmentation=augmentation, augmentation_kwargs=dict(size=12), n_augmentations=2)
    )
    model = make_model(algorithm, freeze_after=None, **kwargs)
    model.learn(30)
    observations = np.random.default_rng(0).integers(0, 256, (5, 1, 16, 16), dtype=np.uint8)
    before, _ = model.predict(observations, deterministic=True)
    single, _ = model.predict(observations[0], deterministic=True)
    model.freeze_encoder()
    after, _ = model.predict(observations, deterministic=True)
    np.testing.assert_allclose(before, after, rtol=1e-5)
    np.testing.assert_allclose(single, after[0], rtol=1e-5)
    assert after.shape == (5, *model.action_space.shape)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_cached_latents_are_used_for_the_same_observations_only(algorithm):
    model = make_model(algorithm, freeze_after=0.2)
    model.learn(55)
    calls = []
    for trunk in {network.features_extractor.trunk for network in model.policy.encoder_networks}:
        trunk.register_forward_hook(lambda *_: calls.append(1))
    observation, other = model._last_obs, model._last_obs // 2
    action, _ = model.predict(observation, deterministic=True)
    assert calls == []
    model.predict(other, deterministic=True)
    assert len(calls) == 1
    # The same as from images
    model.policy.cache_latents(other, model.encode(other))
    np.testing.assert_allclose(model.predict(observation, deterministic=True)[0], action, rtol=1e-4)


@pytest.mark.parametrize("load", ["load_from_vector", "load_state_dict"])
def test_other_weights_forget_cached_latents(load):
    model, other = (make_model(SEERSAC, freeze_after=20, seed=seed).learn(33) for seed in (0, 1))
    observation = model._last_obs
    given = other.policy.parameters_to_vector() if load == "load_from_vector" else other.policy.state_dict()
    getattr(model.policy, load)(given)
    actions = [each.predict(observation, deterministic=True)[0] for each in (model, other)]
    np.testing.assert_array_equal(*actions)
    with pytest.raises(ValueError, match="holds latents of encoder"):
        model.train(gradient_steps=1, batch_size=8)


def test_latents_on_another_device_are_not_used():
    model = make_model(SEERDQN, freeze_after=20).learn(33)
    model.policy.cache_latents(model._last_obs, model.encode(model._last_obs).to("meta"))
    model.policy._cached = (model.policy._cached[0].to("meta"), model.policy._cached[1])
    model.predict(model._last_obs, deterministic=True)


def test_a_policy_that_has_acted_after_the_freeze_can_be_exported():
    model = make_model(SEERDQN, freeze_after=0.2).learn(55)
    images = th.as_tensor(model._last_obs)
    exported = th.export.export(model.policy, (images,), strict=False).module()
    assert th.equal(exported(images), model.policy(images))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_observations_become_tensors_also_where_their_latents_are_cached(algorithm):
    """As SB3's documentation has it: obs_tensor, _ = policy.obs_to_tensor(obs)."""
    model = make_model(algorithm, freeze_after=0.2).learn(55)
    tensor, is_batch = model.policy.obs_to_tensor(model._last_obs)
    assert is_batch
    np.testing.assert_array_equal(tensor, model._last_obs, strict=True)

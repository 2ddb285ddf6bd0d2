"""What all actor-critic algorithms share: convolutions that the critic's loss trains, and a batch that is encoded once."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.logger import configure
from torch import nn

from sb3_seer import SEERCURL, SEERSAC, SEERTD3, SEERTQC, SEERCrossQ
from sb3_seer.common.type_aliases import Latents
from tests import dict_helpers
from tests.helpers import ALGORITHMS, TinyEncoder, is_continuous, make_model

ACTOR_CRITICS = [algorithm for algorithm in ALGORITHMS if is_continuous(algorithm)]
SHARE = pytest.mark.parametrize("share", [False, True], ids=["own projection", "all shared"])


def filled(algorithm: type, **policy_kwargs: Any) -> Any:
    """A model that has stored images, and has not learned yet."""
    model = make_model(algorithm, freeze_after=None, learning_starts=30, policy_kwargs=policy_kwargs).learn(30)
    model.set_logger(configure(None, []))
    return model


def changed_by_training(model: Any) -> set[str]:
    """:return: the names of the weights of actor and critic that three gradient steps change (CrossQ's actor learns in one)"""
    before = {name: value.clone() for name, value in model.policy.named_parameters()}
    model.train(gradient_steps=3, batch_size=16)
    changed = {name for name, value in model.policy.named_parameters() if not th.equal(value, before[name])}
    return {name for name in changed if "_target" not in name}


def names_of_the_actors_own(model: Any) -> set[str]:
    shared = set(map(id, nn.Module.parameters(model.critic)))
    return {name for name, p in model.policy.named_parameters() if name.startswith("actor.") and id(p) not in shared}


# ---- who trains what ----


@SHARE
@pytest.mark.parametrize("algorithm", ACTOR_CRITICS)
def test_the_actors_loss_trains_what_is_the_actors_alone(algorithm, share, monkeypatch):
    model = filled(algorithm, share_features_extractor=share)
    own = names_of_the_actors_own(model)
    assert any("features_extractor" in name for name in own) == (not share)
    monkeypatch.setattr(model.critic.optimizer, "step", lambda: None)
    if algorithm is SEERCURL:
        model.cpc_update_freq = None
    assert changed_by_training(model) == own


@SHARE
@pytest.mark.parametrize("algorithm", ACTOR_CRITICS)
def test_the_critics_loss_trains_the_convolutions(algorithm, share, monkeypatch):
    model = filled(algorithm, share_features_extractor=share)
    assert model.actor.features_extractor.trunk is model.critic.features_extractor.trunk
    monkeypatch.setattr(model.actor.optimizer, "step", lambda: None)
    changed = changed_by_training(model)
    assert any("features_extractor.trunk" in name for name in changed)
    assert not changed & names_of_the_actors_own(model)


@pytest.mark.parametrize("algorithm", ACTOR_CRITICS)
def test_a_weight_is_in_one_optimizer(algorithm):
    """And once in an update of the targets: TD3 updates actor and critic one after the other."""
    model = make_model(algorithm, freeze_after=None)
    parameters = [*model.actor.parameters(), *model.critic.parameters()]
    assert len(parameters) == len(set(parameters))
    trained = [
        p for network in (model.actor, model.critic) for group in network.optimizer.param_groups for p in group["params"]
    ]
    assert set(trained) == set(parameters) and len(trained) == len(parameters)


# ---- a batch is encoded once ----


def count_convolutions(model: Any) -> dict[str, int]:
    """:return: calls of the online and of the target convolutions in a gradient step in which the actor learns"""
    calls = dict(online=0, target=0)

    def count(name: str) -> Any:
        return lambda *_: calls.__setitem__(name, calls[name] + 1)

    trunks = dict(online=model.critic.features_extractor.trunk)
    if hasattr(model.policy, "critic_target"):
        trunks["target"] = model.critic_target.features_extractor.trunk
    model._n_updates = getattr(model, "policy_delay", 1) - 1
    handles = [trunk.register_forward_hook(count(name)) for name, trunk in trunks.items()]
    model.train(gradient_steps=1, batch_size=16)
    for handle in handles:
        handle.remove()
    return calls


@pytest.mark.parametrize(
    "algorithm, online, target",
    [(SEERSAC, 2, 1), (SEERTQC, 2, 1), (SEERTD3, 1, 1), (SEERCrossQ, 2, 0)],
)
def test_a_batch_is_encoded_once_for_each_set_of_convolutions(algorithm, online, target):
    """The observations, and the next ones by the networks that see them."""
    assert count_convolutions(filled(algorithm)) == dict(online=online, target=target)


@pytest.mark.parametrize("algorithm", [SEERTD3, SEERTQC, SEERCrossQ])
def test_outside_of_train_a_sample_has_images(algorithm):
    model = filled(algorithm)
    model.train(gradient_steps=1, batch_size=16)
    assert model.replay_buffer.sample(4).observations.dtype == th.uint8

    def fail(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    model.critic.forward = fail
    with pytest.raises(KeyboardInterrupt):
        model.train(gradient_steps=1, batch_size=16)
    assert model.replay_buffer.sample(4).observations.dtype == th.uint8


def test_observations_that_were_not_encoded_for_a_network_are_refused_by_name():
    model = filled(SEERTD3)
    batch = model.replay_buffer.sample(4)
    latents, next_latents = model.policy.encode_batch(batch.observations, batch.next_observations)
    with pytest.raises(ValueError, match=r"not encoded for the target networks.*tie_convolutions=False"):
        model.actor_target(latents)
    with pytest.raises(ValueError, match="not encoded for the online networks"):
        model.actor(next_latents)


# ---- latents ----


def test_batches_of_latents_are_concatenated():
    def latents(start: int) -> Latents:
        parts = tuple(th.arange(6.0).reshape(3, 2) + start + 100 * i for i in range(2))
        return Latents(parts, dict(vector=parts[0] + 1))

    joined = th.cat([latents(0), latents(10)], dim=0)
    assert isinstance(joined, Latents)
    assert th.equal(joined.values, th.cat([latents(0).values, latents(10).values]))
    assert th.equal(joined.vector_obs["vector"], joined.by_network[0] + 1)
    for call in (lambda: th.cat([latents(0), latents(1)], dim=1), lambda: th.stack([latents(0), latents(1)])):
        with pytest.raises(TypeError):
            call()


# ---- without tied convolutions ----


def test_crossq_cannot_join_dicts_of_images():
    with pytest.raises(ValueError, match="`tie_convolutions` must be True with SEERCrossQ and Dict observations"):
        model = dict_helpers.make_model(SEERCrossQ, freeze_after=None)
        policy_kwargs = {**model.policy_kwargs, "tie_convolutions": False}
        SEERCrossQ("MultiInputPolicy", model.get_env(), buffer_size=100, policy_kwargs=policy_kwargs)


@pytest.mark.parametrize("algorithm", [SEERSAC, SEERCURL])
def test_sac_has_tied_convolutions_only(algorithm):
    with pytest.raises(ValueError, match="`tie_convolutions` must be True with SEERSAC and SEERCURL, got False"):
        make_model(algorithm, policy_kwargs=dict(tie_convolutions=False))


@SHARE
@pytest.mark.parametrize("algorithm", [SEERTD3, SEERTQC, SEERCrossQ])
def test_networks_with_encoders_of_their_own_go_through_the_freeze(algorithm, share):
    policy_kwargs = dict(tie_convolutions=False, share_features_extractor=share)
    model = make_model(algorithm, freeze_after=40, policy_kwargs=policy_kwargs).learn(60)
    assert model.encoder_frozen and model.policy.latent_shape[0] == (1 if share else 2)
    assert (model.actor.features_extractor.trunk is model.critic.features_extractor.trunk) == share


@SHARE
@pytest.mark.parametrize("algorithm", ACTOR_CRITICS)
def test_at_the_freeze_all_target_networks_become_equal_to_their_networks(algorithm, share):
    model = filled(algorithm, share_features_extractor=share)
    model.train(gradient_steps=5, batch_size=16)
    pairs = [(getattr(model.policy, f"{name}_target", None), getattr(model.policy, name)) for name in ("actor", "critic")]
    pairs = [(target, network) for target, network in pairs if target is not None]

    def differ(target: nn.Module, network: nn.Module) -> bool:
        return any(not th.equal(a, b) for a, b in zip(target.parameters(), network.parameters(), strict=True))

    assert all(differ(*pair) for pair in pairs)
    model.freeze_encoder()
    assert not any(differ(*pair) for pair in pairs)


# ---- settings of all policies ----


@pytest.mark.parametrize("algorithm", [SEERSAC, SEERTD3, SEERTQC, SEERCrossQ])
def test_orthogonal_weights_and_zero_biases(algorithm):
    model = make_model(algorithm, freeze_after=None, policy_kwargs=dict(ortho_init=True))
    layers = [
        module
        for network in (model.actor, model.critic)
        for name, part in network.named_children()
        for module in part.modules()
        if name != "features_extractor" and isinstance(module, nn.Linear)
    ]
    assert len(layers) >= 2 + 2 * 2
    for layer in layers:
        weight = layer.weight if layer.weight.shape[0] <= layer.weight.shape[1] else layer.weight.T
        th.testing.assert_close(weight @ weight.T, th.eye(len(weight)), rtol=0, atol=1e-5)
        assert not layer.bias.any()
    for network, target in zip(model.policy.encoder_networks, model.policy.target_networks, strict=False):
        for name, value in target.state_dict().items():
            assert th.equal(value, network.state_dict()[name]), name


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_policies_are_rebuilt_saved_and_pickled(algorithm, tmp_path):
    crop: dict[str, Any] = dict(augmentation="random_crop", augmentation_kwargs=dict(size=12))
    policy = make_model(algorithm, freeze_after=None, **crop).policy
    policy.save(tmp_path / "policy")
    observations = np.random.default_rng(0).integers(0, 256, (5, 1, 16, 16), dtype=np.uint8)
    actions, _ = policy.predict(observations, deterministic=True)
    for copied in (type(policy).load(tmp_path / "policy", device="cpu"), pickle.loads(pickle.dumps(policy))):
        np.testing.assert_array_equal(copied.predict(observations, deterministic=True)[0], actions)
        assert copied.latent_shape == policy.latent_shape


@pytest.mark.parametrize("algorithm", [SEERTD3, SEERTQC, SEERCrossQ])
def test_an_encoder_trained_by_one_is_taken_by_another(algorithm, tmp_path):
    make_model(SEERSAC, freeze_after=20, seed=7).learn(30).save(tmp_path / "pretrained")
    model = make_model(algorithm, pretrained_encoder=str(tmp_path / "pretrained"), freeze_after=0).learn(30)
    assert model.encoder_frozen and model.replay_buffer.stage == "latents"
    assert isinstance(model.critic.features_extractor, TinyEncoder)

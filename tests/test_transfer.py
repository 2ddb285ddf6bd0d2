"""Starting with the encoder, or the whole policy, of a saved model."""

import copy
import os
import warnings
from typing import Any

import pytest
import torch as th
import yaml
from stable_baselines3 import DQN
from stable_baselines3.common.torch_layers import NatureCNN

from sb3_seer import SEERDQN, SEERQRDQN, SEERSAC, DataEfficientCNN, PixelEncoder
from tests.helpers import DialEnv, LightEnv, TinyEncoder, assert_same, encoder_state, make_model

PAIRS = [(SEERSAC, SEERSAC), (SEERDQN, SEERQRDQN), (SEERQRDQN, SEERDQN), (SEERDQN, SEERDQN)]


def saved_model(algorithm, path, *args: Any, freeze_after: int | None = 20, **kwargs: Any):
    """A model that has learned a little, and the path where it is saved."""
    model = make_model(algorithm, *args, freeze_after=freeze_after, seed=7, **kwargs)
    model.learn(30)
    model.save(path / "pretrained")
    return model, str(path / "pretrained")


def with_kwargs(algorithm, extractor, policy_kwargs: dict[str, Any], **kwargs: Any):
    """A model with more ``policy_kwargs`` than ``make_model`` has."""
    env = (DialEnv if algorithm is SEERSAC else LightEnv)(size=kwargs.pop("size", 16))
    policy_kwargs = dict(net_arch=[16], features_extractor_class=extractor, **policy_kwargs)
    return algorithm(
        "CnnPolicy",
        env,
        policy_kwargs=policy_kwargs,
        buffer_size=200,
        learning_starts=10,
        batch_size=8,
        device="cpu",
        **kwargs,
    )


def encoders(model) -> list[list[th.Tensor]]:
    """Of each network with its own latent, the weights of its encoder, one after the other."""
    return [
        [tensor for module in network.encoder_modules() for tensor in module.state_dict().values()]
        for network in model.policy.encoder_networks
    ]


def heads(model) -> dict[str, th.Tensor]:
    encoder = encoder_state(model)
    return {name: tensor for name, tensor in model.policy.state_dict().items() if name not in encoder}


@pytest.mark.parametrize("freeze_after", [20, None])
@pytest.mark.parametrize("source, algorithm", PAIRS)
def test_the_encoder_is_the_files_and_the_heads_are_new(source, algorithm, freeze_after, tmp_path):
    old, path = saved_model(source, tmp_path, freeze_after=freeze_after)
    model = make_model(algorithm, pretrained_encoder=path)
    new = make_model(algorithm)
    # N encoders, bit by bit: for SAC the critic's projection and the actor's
    assert len(encoders(model)) == len(encoders(old)) == (2 if algorithm is SEERSAC else 1)
    for ours, theirs, fresh in zip(encoders(model), encoders(old), encoders(new), strict=True):
        assert len(ours) == 4
        assert all(map(th.equal, ours, theirs))
        assert not all(map(th.equal, ours, fresh))
    for online, target in zip(model.policy.encoder_networks, model.policy.target_networks, strict=False):
        assert_same(dict(target.features_extractor.state_dict()), dict(online.features_extractor.state_dict()))
    # The same as without the file, so not one random number is drawn for it
    assert_same(heads(model), heads(new))


@pytest.mark.parametrize("algorithm", [SEERSAC, SEERQRDQN])
def test_the_policy_part_is_all_of_the_network(algorithm, tmp_path):
    old, path = saved_model(algorithm, tmp_path)
    model = make_model(algorithm, pretrained_encoder=path, pretrained_part="policy")
    assert_same(dict(model.policy.state_dict()), dict(old.policy.state_dict()))
    assert model.num_timesteps == model._n_updates == 0
    assert not model.encoder_frozen
    observation = old._last_obs
    assert (model.predict(observation, deterministic=True)[0] == old.predict(observation, deterministic=True)[0]).all()


@pytest.mark.parametrize("part", ["encoder", "policy"])
@pytest.mark.parametrize("algorithm", [SEERSAC, SEERDQN])
@pytest.mark.filterwarnings("error::UserWarning")
def test_runs_on_latents_from_step_zero(algorithm, part, tmp_path):
    old, path = saved_model(algorithm, tmp_path, freeze_after=None)
    model = make_model(algorithm, pretrained_encoder=path, pretrained_part=part, freeze_after=0)
    stages = []
    model.learn(40, callback=lambda local, _: stages.append(local["self"].replay_buffer.stage) or True)
    assert stages == ["latents"] * 40
    assert model.encoder_frozen and model._n_updates > 0
    for ours, theirs in zip(encoders(model), encoders(old), strict=True):
        assert all(map(th.equal, ours, theirs))
    before = heads(old if part == "policy" else make_model(algorithm))
    assert all(not th.equal(tensor, before[name]) for name, tensor in heads(model).items())


def test_it_can_learn_on_until_a_freeze(tmp_path):
    old, path = saved_model(SEERSAC, tmp_path)
    model = make_model(SEERSAC, pretrained_encoder=path, freeze_after=30)
    model.learn(40)
    assert model.encoder_frozen
    assert not any(map(th.equal, encoders(model)[0], encoders(old)[0]))


@pytest.mark.parametrize("shared_there, shared_here", [(True, False), (False, True), (True, True)])
def test_one_encoder_or_two(shared_there, shared_here, tmp_path):
    """N = 1: the actor has all of the critic's extractor. N = 2: a projection of its own."""
    old = with_kwargs(SEERSAC, TinyEncoder, dict(share_features_extractor=shared_there), seed=7)
    with th.no_grad():
        old.actor.features_extractor.projection.weight += 1
    old.save(tmp_path / "pretrained")
    kwargs = dict(pretrained_encoder=str(tmp_path / "pretrained"), freeze_after=0)
    model = with_kwargs(SEERSAC, TinyEncoder, dict(share_features_extractor=shared_here), **kwargs)
    assert len(encoders(model)) == (1 if shared_here else 2)
    critic, actor = (network.features_extractor.projection.weight for network in (model.critic, model.actor))
    assert th.equal(critic, old.critic.features_extractor.projection.weight)
    # One that the critic shares is the critic's
    wanted = old.critic if shared_here else old.actor
    assert th.equal(actor, wanted.features_extractor.projection.weight)
    model.learn(20)

    policy = dict(share_features_extractor=shared_here)
    if shared_here and not shared_there:
        with pytest.raises(ValueError, match=r"share actor.features_extractor.projection.weight, those in the file do not"):
            with_kwargs(SEERSAC, TinyEncoder, policy, pretrained_part="policy", **kwargs)
    else:
        with_kwargs(SEERSAC, TinyEncoder, policy, pretrained_part="policy", **kwargs)


def test_extractors_and_models_of_sb3(tmp_path):
    policy_kwargs = dict(net_arch=[16], features_extractor_kwargs=dict(features_dim=8))
    old = DQN("CnnPolicy", LightEnv(size=36), buffer_size=10, policy_kwargs=policy_kwargs, seed=7, device="cpu")
    old.save(tmp_path / "dqn")
    new = with_kwargs(
        SEERQRDQN, NatureCNN, dict(features_extractor_kwargs=dict(features_dim=8)), size=36,
        pretrained_encoder=str(tmp_path / "dqn"), freeze_after=0,
    )  # fmt: skip
    assert_same(dict(old.q_net.features_extractor.state_dict()), dict(new.quantile_net.features_extractor.state_dict()))
    new.learn(20)


@pytest.mark.parametrize("there, here", [("fc1", "conv2"), ("conv2", "fc1"), ("conv1", "conv4")])
def test_one_that_was_cut_at_another_layer(there, here, tmp_path):
    def make(layer: str, **kwargs: Any) -> SEERDQN:
        policy_kwargs = dict(features_extractor_kwargs=dict(n_filters=2, freeze_at=layer))
        return with_kwargs(SEERDQN, PixelEncoder, policy_kwargs, size=24, freeze_after=None, **kwargs)

    old = make(there, seed=7)
    old.save(tmp_path / "pretrained")
    theirs = old.policy.state_dict()
    path = str(tmp_path / "pretrained")
    assert_same(dict(make(here, pretrained_encoder=path, pretrained_part="policy").policy.state_dict()), dict(theirs))

    ours = make(here, pretrained_encoder=path).policy.state_dict()
    layers = ("trunk.1", "trunk.3", "trunk.5", "trunk.7", "projection")
    n_frozen = {"conv2": 2, "conv4": 4, "fc1": 5}[here]
    for i, layer in enumerate(layers):
        for network in ("q_net", "q_net_target"):
            name = f"{network}.features_extractor.{layer}.weight"
            assert th.equal(ours[name], theirs[name]) == (i < n_frozen), name


def test_save_and_load_without_the_file(tmp_path):
    _, path = saved_model(SEERSAC, tmp_path)
    model = make_model(SEERSAC, pretrained_encoder=path, pretrained_part="policy", freeze_after=0)
    model.learn(40)
    (tmp_path / "pretrained.zip").unlink()
    model.save(tmp_path / "model")
    loaded = SEERSAC.load(tmp_path / "model", env=DialEnv(), device="cpu")
    assert loaded.encoder_frozen and loaded.pretrained_encoder == path
    assert_same(dict(loaded.policy.state_dict()), dict(model.policy.state_dict()))
    loaded.learn(20)


def test_a_model_saved_before_its_freeze_is_still_pretrained(tmp_path, recwarn):
    _, path = saved_model(SEERDQN, tmp_path)
    make_model(SEERDQN, pretrained_encoder=path, freeze_after=None).save(tmp_path / "model")
    loaded = SEERDQN.load(tmp_path / "model", env=LightEnv(), device="cpu")
    loaded.freeze_encoder()
    assert not [warning for warning in recwarn if "before its first gradient step" in str(warning.message)]


@pytest.mark.parametrize(
    "extractor, extractor_kwargs, size, there, here",
    [
        # another image size, another latent, other convolutions, another class
        (PixelEncoder, dict(n_filters=2), 32, r"projection.weight is \(50, 50\)", r"projection.weight is \(50, 162\)"),
        (PixelEncoder, dict(n_filters=2, latent_dim=8), 24, r"projection.weight is \(50, 50\)", r"\(8, 50\)"),
        (PixelEncoder, dict(n_filters=3), 24, r"trunk.1.weight is \(2, 1, 3, 3\)", r"trunk.1.weight is \(3, 1, 3, 3\)"),
        (DataEfficientCNN, dict(), 32, r"trunk.1.weight is \(2, 1, 3, 3\)", r"trunk.1.weight is \(32, 1, 5, 5\)"),
        (TinyEncoder, dict(), 24, r"trunk.0.weight is not among .*trunk.1.weight': \(2, 1, 3, 3\)", r"is \(8, 1, 4, 4\)"),
    ],
)
@pytest.mark.parametrize("source, algorithm", [(SEERDQN, SEERQRDQN), (SEERSAC, SEERSAC)])
def test_another_architecture_is_refused(source, algorithm, extractor, extractor_kwargs, size, there, here, tmp_path):
    old = with_kwargs(source, PixelEncoder, dict(features_extractor_kwargs=dict(n_filters=2)), size=24, freeze_after=None)
    old.save(tmp_path / "pretrained")
    kwargs = dict(freeze_after=None, size=size, pretrained_encoder=str(tmp_path / "pretrained"))
    with pytest.raises(ValueError, match=f"pretrained' has another architecture: .*{there}.* there, and .*{here} here"):
        with_kwargs(algorithm, extractor, dict(features_extractor_kwargs=extractor_kwargs), **kwargs)


def test_a_refused_policy_leaves_the_weights_as_they_were(tmp_path):
    """The action net differs, which comes last."""
    from sb3_seer.common.transfer import load_pretrained

    _, path = saved_model(SEERDQN, tmp_path)
    model = with_kwargs(SEERDQN, TinyEncoder, dict())
    model.q_net.q_net[-1] = th.nn.Linear(16, 5)
    before = copy.deepcopy(model.policy.state_dict())
    with pytest.raises(
        ValueError, match=r"q_net.q_net.2.weight is \(4, 16\) there, and q_net.q_net.2.weight is \(5, 16\) here"
    ):
        load_pretrained(model.policy, path, "policy")
    assert_same(dict(model.policy.state_dict()), dict(before))
    with pytest.raises(ValueError, match=r"quantile_net.* is not among \['q_net'\] there"):
        make_model(SEERQRDQN, pretrained_encoder=path, pretrained_part="policy")


def test_files_that_are_no_saved_models(tmp_path):
    for path in (tmp_path / "nothing", tmp_path, "", 5):
        with pytest.raises(FileNotFoundError, match="`pretrained_encoder` must be the path of a saved model, got "):
            make_model(SEERDQN, pretrained_encoder=path)
    with pytest.warns(UserWarning, match="pretrained_part='policy' has no effect"):
        make_model(SEERDQN, pretrained_part="policy")
    (tmp_path / "text.zip").write_text("no zip")
    with pytest.raises(ValueError, match=r"text.zip"):
        make_model(SEERDQN, pretrained_encoder=str(tmp_path / "text.zip"))
    DQN("MlpPolicy", "CartPole-v1", buffer_size=10, device="cpu", policy_kwargs=dict(net_arch=[4])).save(tmp_path / "mlp")
    with pytest.raises(ValueError, match=r"saved model of an off-policy algorithm with a features extractor, got .*mlp'"):
        make_model(SEERDQN, pretrained_encoder=str(tmp_path / "mlp"))


def test_a_saved_model_keeps_its_weights(tmp_path):
    _, path = saved_model(SEERDQN, tmp_path)
    model = make_model(SEERDQN, seed=5, freeze_after=0, pretrained_encoder=path)
    make_model(SEERDQN, seed=6).save(tmp_path / "other")
    model.save(tmp_path / "model")
    os.remove(f"{path}.zip")  # the file is not read again
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = SEERDQN.load(tmp_path / "model", env=LightEnv(), device="cpu", pretrained_encoder=path)
    assert_same(loaded.policy.state_dict(), model.policy.state_dict())
    with pytest.warns(UserWarning, match="pretrained_encoder=.* has no effect: a loaded model keeps its weights"):
        loaded = SEERDQN.load(tmp_path / "other", env=LightEnv(), device="cpu", pretrained_encoder=path, freeze_after=0)
    with pytest.warns(UserWarning, match="before its first gradient step"):
        loaded.learn(1)


def test_arguments_that_make_no_sense(tmp_path):
    _, path = saved_model(SEERDQN, tmp_path)
    with pytest.raises(ValueError, match="`pretrained_part` must be 'encoder' or 'policy', got 'heads'"):
        make_model(SEERDQN, pretrained_encoder=path, pretrained_part="heads")
    with pytest.raises(ValueError, match=r'`latent_dtype` must be .* with freeze_after=0, got "uint8"'):
        make_model(SEERDQN, pretrained_encoder=path, freeze_after=0, latent_dtype="uint8")
    with (
        pytest.warns(UserWarning, match="no encoder to freeze"),
        pytest.raises(ValueError, match="`pretrained_encoder` must be None where there is no encoder"),
    ):
        SEERDQN("MlpPolicy", "CartPole-v1", pretrained_encoder=path)


def test_nothing_of_the_file_but_tensors_is_unpickled(tmp_path, monkeypatch):
    _, path = saved_model(SEERDQN, tmp_path)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("unpickled")

    monkeypatch.setattr("cloudpickle.loads", refuse)
    make_model(SEERDQN, pretrained_encoder=path)
    with pytest.raises(AssertionError, match="unpickled"):
        SEERDQN.load(path)  # which shows that this test could fail


def test_parameters_stand_in_a_yaml_file(tmp_path):
    _, path = saved_model(SEERDQN, tmp_path)
    parameters = yaml.safe_load(f"pretrained_encoder: {path}\npretrained_part: policy\nfreeze_after: 0\n")
    assert make_model(SEERDQN, **parameters)._pretrained

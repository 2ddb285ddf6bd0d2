"""What makes an update fast changes nothing of it; and what does change it, the encoder in bfloat16, by how much."""

import copy
import warnings

import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.torch_layers import NatureCNN

from benchmarks import speed
from sb3_seer import SEERCURL, SEERDQN, SEERQRDQN, SEERSAC, DataEfficientCNN, PixelEncoder, SEERRainbow
from sb3_seer.common import seer
from sb3_seer.common.encoders import FlattenPixels
from sb3_seer.common.extractors import split
from sb3_seer.common.policies import preprocess_images
from sb3_seer.dqn.policies import CnnPolicy
from sb3_seer.rainbow.noisy import NoisyLinear
from tests.helpers import ALGORITHMS, TinyEncoder, assert_same, encoder_state, make_model

# Of numbers of 8 bits: a rounding changes one by up to 1 / 256
BFLOAT16 = dict(rtol=0.03, atol=0.03)


def images(n: int, size: int = 16) -> th.Tensor:
    return th.randint(0, 256, (n, 1, size, size), dtype=th.uint8)


@pytest.mark.parametrize("normalize_images", [True, False])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_images_are_preprocessed_as_in_sb3(dtype, normalize_images):
    """Images of floats are not divided by 255 in SB3."""
    box = spaces.Box(0, 255, (1, 16, 16), dtype)
    for space in (box, spaces.Dict(left=box, right=box, number=spaces.Discrete(3))):
        parts = {key: images(3).to(getattr(th, dtype)) for key in ("left", "right")}
        observations = parts if isinstance(space, spaces.Dict) else parts["left"]
        before = copy.deepcopy(observations)
        result = preprocess_images(observations, space, normalize_images)
        th.testing.assert_close(result, preprocess_obs(before, space, normalize_images), rtol=0, atol=0)
        th.testing.assert_close(observations, before, rtol=0, atol=0)


@pytest.mark.parametrize("normalize_images", [True, False])
def test_bytes_become_bfloat16_without_a_copy_of_floats_and_round_as_it_would(normalize_images):
    pixels = th.arange(256, dtype=th.uint8).reshape(1, 1, 16, 16)
    box = spaces.Box(0, 255, (1, 16, 16), "uint8")
    result = preprocess_images(pixels, box, normalize_images, th.bfloat16)
    th.testing.assert_close(result, preprocess_obs(pixels, box, normalize_images).bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
@pytest.mark.parametrize("algorithm", [SEERDQN, SEERQRDQN])
def test_a_tensor_of_the_user_is_not_changed(algorithm, dtype):
    """A saliency map calls a network twice with the same floats."""
    model = make_model(algorithm, freeze_after=None)
    network = model.policy.encoder_networks[0]
    pixels = th.full((1, 1, 16, 16), 200, dtype=getattr(th, dtype))
    first, latents = network(pixels), model.policy.encode(pixels)
    th.testing.assert_close(network(pixels), first, rtol=0, atol=0)
    th.testing.assert_close(model.policy.encode(pixels), latents, rtol=0, atol=0)
    assert (pixels == 200).all()


@pytest.mark.parametrize("extractor, expected", [(DataEfficientCNN, True), (NatureCNN, False)])
def test_images_are_laid_out_channels_last_for_encoders_that_are_not_sb3s(extractor, expected):
    space = spaces.Box(0, 255, (3, 36, 36), "uint8")
    policy = CnnPolicy(space, spaces.Discrete(2), lambda _: 1e-3, features_extractor_class=extractor)
    seen = []
    trunk = split(policy.q_net.features_extractor).trunk
    trunk.register_forward_pre_hook(lambda _, args: seen.append(args[0].is_contiguous(memory_format=th.channels_last)))
    policy.q_net(th.zeros(2, *space.shape, dtype=th.uint8))
    assert seen == [expected]


def test_feature_maps_are_flattened_without_a_copy():
    maps = th.randn(2, 3, 4, 5).contiguous(memory_format=th.channels_last)
    flat = FlattenPixels()(maps)
    assert flat.data_ptr() == maps.data_ptr()
    assert flat.shape == (2, 60)
    th.testing.assert_close(flat[1].view(4, 5, 3)[2, 3], maps[1, :, 2, 3])


@pytest.mark.parametrize("algorithm", [SEERSAC, SEERCURL])
def test_adam_is_fused_unless_said_otherwise(algorithm):
    states = []
    for optimizer_kwargs, fused in (({}, True), (dict(foreach=False), None)):
        model = make_model(algorithm, freeze_after=None, policy_kwargs=dict(optimizer_kwargs=optimizer_kwargs))
        assert model.actor.optimizer.defaults["fused"] is model.critic.optimizer.defaults["fused"] is fused
        model.learn(60)
        states.append(dict(model.policy.state_dict()))
    th.testing.assert_close(*states, rtol=1e-3, atol=1e-5)
    # Another optimizer has no such argument, or not this one
    make_model(algorithm, freeze_after=None, policy_kwargs=dict(optimizer_class=th.optim.RMSprop)).learn(20)


def test_all_layers_have_noise_of_their_own():
    network = make_model(SEERRainbow, freeze_after=None).q_net
    layers = [module for module in network.modules() if isinstance(module, NoisyLinear)]
    assert len(layers) == 4
    before = [layer.weight_noise.clone() for layer in layers]
    network.reset_noise()
    factors = [layer.bias_noise for layer in layers]
    for layer, old in zip(layers, before, strict=True):
        assert layer.weight_noise.shape == layer.weight.shape and layer.bias_noise.shape == layer.bias.shape
        assert (layer.weight_noise != old).all()
        factors.append(layer.weight_noise[0] / layer.bias_noise[0])
    drawn = th.cat(factors)
    assert len(drawn) == sum(layer.in_features + layer.out_features for layer in layers) == len(th.unique(drawn))


# ---- bfloat16 ----


def in_bfloat16(algorithm, extractor, **kwargs):
    """:return: two agents with the same weights; the encoder of the second runs in bfloat16"""
    agents = []
    for encoder_dtype in ("float32", "bfloat16"):
        agents.append(make_model(algorithm, extractor, policy_kwargs=dict(encoder_dtype=encoder_dtype), **kwargs))
    agents[1].policy.load_state_dict(agents[0].policy.state_dict())
    return agents


@pytest.mark.parametrize("algorithm, extractor, size", [(SEERSAC, PixelEncoder, 40), (SEERDQN, DataEfficientCNN, 36)])
def test_latents_in_bfloat16_are_near_those_in_float32(algorithm, extractor, size):
    exact, rounded = in_bfloat16(algorithm, extractor, freeze_after=None, size=size)
    batch = images(16, size)
    expected, latents = exact.policy.encode(batch), rounded.policy.encode(batch)
    assert latents.dtype == th.float32
    # Rounded, so not the same; near in proportion to how large they are
    assert not th.equal(latents, expected)
    th.testing.assert_close(latents, expected, rtol=0, atol=0.03 * expected.abs().max().item())


def test_gradients_in_bfloat16_point_where_those_in_float32_do():
    exact, rounded = in_bfloat16(SEERSAC, PixelEncoder, freeze_after=None, size=40)
    batch = images(32, 40)
    direction = th.randn(2, 50)
    gradients = []
    for agent in (exact, rounded):
        latents, _ = agent.policy.encode_batch(batch, batch)
        (latents.values * direction).sum().backward()
        encoder = agent.policy.critic.features_extractor
        parameters = [*encoder.trunk.parameters(), *encoder.projection.parameters()]
        assert all(parameter.dtype == parameter.grad.dtype == th.float32 for parameter in parameters)
        gradients.append(th.cat([parameter.grad.flatten() for parameter in parameters]))
    assert not th.equal(*gradients)
    assert th.cosine_similarity(*gradients, dim=0) > 0.99
    assert (gradients[1].norm() / gradients[0].norm()).item() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("algorithm", [SEERSAC, SEERDQN])
def test_actions_of_a_bfloat16_encoder_are_those_of_its_latents(algorithm):
    """Features of images and features of their latents: the seam is the same, and heads are in float32."""
    _, model = in_bfloat16(algorithm, PixelEncoder, freeze_after=None, size=40)
    network = model.policy.encoder_networks[0]
    network.set_training_mode(False)
    batch = images(4, 40)
    from_images = network.extract_features(batch, network.features_extractor)
    from_latents = network.features_extractor.head(model.policy.encode(batch)[:, 0])
    assert from_images.dtype == th.float32
    th.testing.assert_close(from_images, from_latents, **BFLOAT16)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_bfloat16_encoder_trains_freezes_saves_and_loads(algorithm, tmp_path):
    _, model = in_bfloat16(algorithm, TinyEncoder, freeze_after=40)
    before = encoder_state(model)
    model.learn(40)
    assert any(not th.equal(value, before[name]) for name, value in encoder_state(model).items())
    model.learn(20, reset_num_timesteps=False)
    assert model.encoder_frozen and model.replay_buffer.stage == "latents"
    assert all(parameter.dtype == th.float32 for parameter in model.policy.parameters())
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", device="cpu")
    assert loaded.policy.encoder_dtype == "bfloat16"
    assert_same(encoder_state(loaded), encoder_state(model))
    th.testing.assert_close(loaded.encode(model._last_obs), model.encode(model._last_obs), rtol=0, atol=0)


@pytest.mark.parametrize("is_fast", [True, False])
def test_a_cpu_without_bfloat16_is_warned_of(is_fast, monkeypatch):
    monkeypatch.setattr(seer, "multiplies_bfloat16", lambda: is_fast)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        in_bfloat16(SEERDQN, TinyEncoder, freeze_after=None)
    messages = [str(warning.message) for warning in caught if "bfloat16" in str(warning.message)]
    assert messages == [] if is_fast else len(messages) == 1 and "several times slower" in messages[0]


def test_another_dtype_of_the_encoder_is_refused():
    with pytest.raises(ValueError, match="`encoder_dtype` must be 'float32' or 'bfloat16', got 'float16'"):
        make_model(SEERDQN, policy_kwargs=dict(encoder_dtype="float16"))


def test_the_benchmark_measures_all_that_it_compares():
    measured = {name for agents in speed.agents("cpu") for name in agents}
    assert measured == {name for ours, theirs, _ in speed.COMPARISONS for name in (ours, theirs)}

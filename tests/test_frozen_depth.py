"""Encoders that are cut after any of their layers: what is before the cut is frozen and stored, what is after it learns on."""

import copy
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from torch import nn
from torch.nn import functional as F

from sb3_seer import SEERDQN, SEERSAC, SEERTQC, DataEfficientCNN, FreezeEncoderCallback, ImpalaCNN, PixelEncoder
from sb3_seer.common.encoders import LayeredExtractor
from tests.helpers import DialEnv, LightEnv, assert_same, check_latents_stand_for_images

SMALL: dict[type[LayeredExtractor], dict[str, Any]] = {
    PixelEncoder: dict(n_filters=4, latent_dim=8),
    DataEfficientCNN: dict(),
    ImpalaCNN: dict(n_filters=(4, 4, 4), latent_dim=8),
}
# Of 25x25 pixels: what each layer puts out
SHAPES = [
    (PixelEncoder, "conv1", (4, 12, 12)),
    (PixelEncoder, "conv2", (4, 10, 10)),
    (PixelEncoder, "conv3", (4, 8, 8)),
    (PixelEncoder, "conv4", (4, 6, 6)),
    (PixelEncoder, "fc1", (8,)),
    (DataEfficientCNN, "conv1", (32, 5, 5)),
    (DataEfficientCNN, "conv2", (64, 1, 1)),
    (ImpalaCNN, "conv1", (4, 13, 13)),
    (ImpalaCNN, "conv3", (4, 13, 13)),
    (ImpalaCNN, "conv5", (4, 13, 13)),
    (ImpalaCNN, "conv6", (4, 7, 7)),
    (ImpalaCNN, "conv10", (4, 7, 7)),
    (ImpalaCNN, "conv13", (4, 4, 4)),
    (ImpalaCNN, "conv15", (4, 4, 4)),
    (ImpalaCNN, "fc1", (8,)),
]
SOME_SHAPES = SHAPES[::2]
N_CONVOLUTIONS = {PixelEncoder: 4, DataEfficientCNN: 2, ImpalaCNN: 15}
SPACE = spaces.Box(0, 255, (3, 25, 25), np.uint8)


class ColourMixin(LightEnv):
    """Images of three channels: large enough that float16 latents of any layer take no more room."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.observation_space = SPACE


class ColourLightEnv(ColourMixin, LightEnv):
    pass


class ColourDialEnv(ColourMixin, DialEnv):
    pass


def make_encoder(encoder: type[LayeredExtractor], layer: str | None = None) -> LayeredExtractor:
    th.manual_seed(0)
    return encoder(SPACE, **SMALL[encoder], **({} if layer is None else dict(freeze_at=layer)))


def make_model(
    algorithm, encoder: type[LayeredExtractor], layer: str, policy_kwargs: dict[str, Any] | None = None, **kwargs: Any
):
    policy_kwargs = dict(
        features_extractor_class=encoder, features_extractor_kwargs=dict(**SMALL[encoder], freeze_at=layer), net_arch=[16],
        **(policy_kwargs or {}),
    )  # fmt: skip
    defaults: dict[str, Any] = dict(
        buffer_size=100, learning_starts=10, batch_size=8, train_freq=1, learning_rate=1e-3, latent_dtype="float16",
        seed=0, device="cpu",
    )  # fmt: skip
    if algorithm is SEERDQN:
        defaults.update(target_update_interval=7, tau=0.3)
    env = ColourLightEnv(size=24) if algorithm is SEERDQN else ColourDialEnv(size=24)
    return algorithm("CnnPolicy", env, policy_kwargs=policy_kwargs, **{**defaults, **kwargs})


def n_frozen(encoder: type[LayeredExtractor], layer: str) -> int:
    """Layers with weights that are frozen, of the order in which the image passes them."""
    return N_CONVOLUTIONS[encoder] + 1 if layer == "fc1" else int(layer.removeprefix("conv"))


def flatten(outputs: th.Tensor) -> th.Tensor:
    """Feature maps pixel by pixel; what is flat stays as it is."""
    return outputs.permute(0, 2, 3, 1).flatten(1) if outputs.ndim == 4 else outputs


def layer_outputs(encoder: type[LayeredExtractor], images: th.Tensor) -> dict[str, th.Tensor]:
    """Oracle: what each layer puts out, and the features: the papers' layers, with the weights of the uncut encoder."""
    tensors = list(make_encoder(encoder).state_dict().values())
    weights = list(zip(tensors[::2], tensors[1::2], strict=True))
    outputs: dict[str, th.Tensor] = {}
    x = images
    if encoder is ImpalaCNN:
        for stage in range(3):
            first, *others = weights[5 * stage : 5 * stage + 5]
            x = F.max_pool2d(F.conv2d(x, *first, padding=1), 3, stride=2, padding=1)
            outputs[f"conv{5 * stage + 1}"] = x
            for block in range(2):
                a, b = others[2 * block : 2 * block + 2]
                x = x + F.conv2d(F.relu(F.conv2d(F.relu(x), *a, padding=1)), *b, padding=1)
                outputs[f"conv{5 * stage + 2 * block + 3}"] = x
        outputs["conv15"] = x = F.relu(x)
        outputs["fc1"] = F.linear(flatten(x), *weights[15])
        outputs["features"] = F.relu(outputs["fc1"])
        return outputs
    strides = [2, 1, 1, 1] if encoder is PixelEncoder else [5, 5]
    for i, stride in enumerate(strides):
        outputs[f"conv{i + 1}"] = x = F.relu(F.conv2d(x, *weights[i], stride=stride))
    outputs["features"] = flatten(x)
    if encoder is PixelEncoder:
        outputs["fc1"] = F.linear(outputs["features"], *weights[4])
        outputs["features"] = F.layer_norm(outputs["fc1"], (8,), *weights[5])
    return outputs


@pytest.mark.parametrize("encoder, layer, shape", SHAPES)
def test_a_latent_is_what_the_layer_puts_out(encoder, layer, shape):
    extractor = make_encoder(encoder, layer)
    images = th.rand(3, *SPACE.shape, generator=th.Generator().manual_seed(1))
    outputs = layer_outputs(encoder, images)
    assert outputs[layer].shape[1:] == shape
    latents = extractor.encode(images)
    assert latents.shape == (3, extractor.latent_dim)
    th.testing.assert_close(latents, flatten(outputs[layer]), rtol=1e-4, atol=1e-5)
    features = extractor.head(latents)
    assert features.shape == (3, extractor.features_dim)
    th.testing.assert_close(features, outputs["features"], rtol=1e-4, atol=1e-5)
    assert th.equal(features, extractor(images))


@pytest.mark.parametrize("encoder", SMALL)
def test_every_layer_can_be_frozen_and_no_other(encoder):
    layers = [layer for each, layer, _ in SHAPES if each is encoder]
    if encoder is ImpalaCNN:
        layers = [f"conv{5 * stage + i}" for stage in range(3) for i in (1, 3, 5)] + ["fc1"]
    for name in ("conv0", "conv16", "conv2" if encoder is ImpalaCNN else "conv5", "norm", None):
        with pytest.raises(ValueError, match=f"{encoder.__name__} must be one of {', '.join(layers)}, got {name!r}"):
            encoder(SPACE, **SMALL[encoder], freeze_at=name)
    for layer in layers:
        make_encoder(encoder, layer)
    # By default, all of the last layer
    assert make_encoder(encoder).latent_dim == make_encoder(encoder, layers[-1]).latent_dim


@pytest.mark.parametrize("encoder, layer, _", SOME_SHAPES)
def test_weights_have_the_same_names_wherever_the_cut_is(encoder, layer, _):
    uncut, cut = make_encoder(encoder), make_encoder(encoder, layer)
    # Also the same first values: the random numbers are drawn in the same order
    assert list(cut.state_dict()) == list(uncut.state_dict())
    assert_same(cut.state_dict(), uncut.state_dict())
    assert sum(p.numel() for p in cut.parameters()) == sum(p.numel() for p in uncut.parameters())
    with th.no_grad():
        for parameter in uncut.parameters():
            parameter += 1
    # ... and in a larger module, in both directions
    nn.Sequential(cut).load_state_dict(nn.Sequential(uncut).state_dict())
    assert_same(cut.state_dict(), uncut.state_dict())
    nn.Sequential(make_encoder(encoder)).load_state_dict(nn.Sequential(cut).state_dict())
    assert_same(copy.deepcopy(cut).state_dict(), uncut.state_dict())


@pytest.mark.parametrize("encoder, layer, shape", SOME_SHAPES)
@pytest.mark.parametrize("algorithm", [SEERDQN, SEERSAC])
def test_layers_before_the_cut_stay_and_those_after_it_move(algorithm, encoder, layer, shape):
    at_freeze: list[Any] = []

    class Remember(FreezeEncoderCallback):
        def _on_step(self) -> bool:
            super()._on_step()
            if self.model.encoder_frozen and not at_freeze:
                at_freeze.append(copy.deepcopy(self.model.policy))
            return True

    model = make_model(algorithm, encoder, layer)
    model.learn(45, callback=Remember(25))

    # Networks with convolutions in common have one latent; frozen at fc1 they have one each
    n_networks = 2 if algorithm is SEERSAC and layer == "fc1" else 1
    assert model.encode(model._last_obs).shape == (1, n_networks, np.prod(shape))
    assert model.replay_buffer.stage == "latents"
    assert model.replay_buffer.buffer_size == 100 * 3 * 25 * 25 // (2 * n_networks * np.prod(shape))
    assert model.replay_buffer.nbytes == 100 * 3 * 25 * 25

    frozen_layers = n_frozen(encoder, layer)
    networks = ("actor", "critic", "critic_target") if algorithm is SEERSAC else ("q_net", "q_net_target")
    for network in networks:
        now, then = (getattr(policy, network).features_extractor.state_dict() for policy in (model.policy, at_freeze[0]))
        weights = [name for name in now if name.endswith(".weight")]
        for i, name in enumerate(weights):
            bias = name.replace("weight", "bias")
            if i < frozen_layers:
                assert th.equal(now[name], then[name]) and th.equal(now[bias], then[bias]), name
            else:
                assert not th.equal(now[name], then[name]), name
    if algorithm is SEERSAC:
        parts = ([*e.state_dict().values()] for e in (model.critic.features_extractor, model.critic_target.features_extractor))
        same = [th.equal(a, b) for a, b in zip(*parts, strict=True)]
        assert all(same[: 2 * frozen_layers]) and not any(same[2 * frozen_layers :: 2])


@pytest.mark.parametrize("algorithm", [SEERDQN, SEERSAC])
def test_training_from_latents_equals_training_from_images_through_the_frozen_layers(algorithm):
    settings: dict[str, Any] = dict(freeze_after=None, latent_dtype="float32")
    check_latents_stand_for_images(lambda: make_model(algorithm, PixelEncoder, "conv2", **settings).learn(40), 1e-3, 1e-5)


@pytest.mark.parametrize(
    "encoder, layer, record_bytes",
    [
        (PixelEncoder, "conv1", 4 * 12 * 12 * 4),
        (DataEfficientCNN, "conv1", 32 * 5 * 5 * 4),
        (ImpalaCNN, "conv5", 4 * 13**2 * 4),
    ],
)
def test_latents_larger_than_the_image_are_refused(encoder, layer, record_bytes):
    message = rf"\({record_bytes:,} bytes\) are larger than its image \(1,875 bytes\)"
    with pytest.raises(ValueError, match=message):
        make_model(SEERDQN, encoder, layer, latent_dtype="float32", freeze_after=0.2)
    # Without a freeze, nothing is stored in place of the image
    make_model(SEERDQN, encoder, layer, latent_dtype="float32", freeze_after=None)


def test_resumes_after_the_freeze(tmp_path):
    model = make_model(SEERSAC, PixelEncoder, "conv2", freeze_after=20)
    model.learn(30)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = SEERSAC.load(tmp_path / "model", env=model.get_env(), device="cpu")
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert_same(loaded.policy.state_dict(), model.policy.state_dict())
    for each in (model, loaded):
        np.random.seed(1)
        th.manual_seed(1)
        each.set_logger(model.logger)
        each.train(gradient_steps=5, batch_size=8)
    assert_same(loaded.policy.state_dict(), model.policy.state_dict())


@pytest.mark.parametrize("encoder, layer, _", SOME_SHAPES)
def test_shared_convolutions_are_all_of_them(encoder, layer, _):
    one, other = make_encoder(encoder, layer), make_encoder(encoder, layer)
    other.share_convolutions(one)
    mine = set(one.parameters())
    shared = [name for name, parameter in other.named_parameters() if parameter in mine]
    assert len(shared) == 2 * N_CONVOLUTIONS[encoder]
    assert not any("projection" in name for name in shared)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("encoder, layer, _", SOME_SHAPES)
def test_the_actors_loss_trains_no_convolution(encoder, layer, _, frozen):
    """FACTS of the released code: the actor's convolutions are the critic's, and only the critic's loss trains them."""
    # With other seeds some of these few filters are dead
    model = make_model(SEERSAC, encoder, layer, freeze_after=None, seed=1)
    model.learn(15)
    if frozen:
        model.freeze_encoder()
    policy = model.policy
    actor, critic = (
        {name: p for name, p in network.features_extractor.named_parameters()} for network in (policy.actor, policy.critic)
    )
    convolutions = [name for name in actor if "trunk" in name]
    assert len(convolutions) == 2 * N_CONVOLUTIONS[encoder]
    assert all(actor[name] is critic[name] for name in convolutions)

    def trained_by(loss: th.Tensor, parameters: list[th.Tensor]) -> set[th.Tensor]:
        policy.zero_grad(set_to_none=True)
        loss.backward(inputs=[p for p in parameters if p.requires_grad], retain_graph=True)
        return {p for p in policy.parameters() if p.grad is not None and p.grad.abs().sum() > 0}

    batch = model.replay_buffer.sample(8)
    latents, _ = policy.encode_batch(batch.observations, batch.next_observations)
    by_critic = trained_by(
        sum(q.square().sum() for q in model.critic(latents, batch.actions)), list(policy.critic.parameters())
    )
    frozen_layers = n_frozen(encoder, layer) if frozen else 0
    weights = [name for name in critic if name.endswith("weight")]
    assert [critic[name] in by_critic for name in weights] == [i >= frozen_layers for i in range(len(weights))]

    actions, log_prob = model.actor.action_log_prob(latents)
    loss = (log_prob.reshape(-1, 1) - model._min_q_value(model.critic, latents.detach(), actions)).mean()
    by_actor = trained_by(loss, model.actor.parameters())
    assert policy.actor.mu.weight in by_actor
    assert not by_actor & set(policy.critic.parameters())
    assert not any(actor[name] in by_actor for name in convolutions)
    # Its own layers it trains, unless they are frozen
    own = [actor[name] for name in weights if name not in convolutions]
    assert all((p in by_actor) == p.requires_grad for p in own)


@pytest.mark.parametrize("freeze_after", [None, 12])
def test_a_critic_that_learns_between_the_actors_passes_changes_no_gradient(freeze_after):
    """TQC's critic learns after the actor's forward pass, and an optimizer that is not fused changes weights in place."""
    not_fused = dict(optimizer_kwargs=dict(fused=False))
    model = make_model(SEERTQC, PixelEncoder, "conv2", not_fused, freeze_after=freeze_after).learn(24)
    assert model._n_updates == 14 and model.encoder_frozen == (freeze_after is not None)

"""Encoders that were trained elsewhere: any torch module, frozen from the first step."""

import copy
import importlib
import sys
import types
import warnings
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from safetensors.torch import save_file
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecFrameStack
from torch import nn
from torch.nn import functional as F

from sb3_seer import SEERDQN, SEERSAC, PretrainedEncoder
from sb3_seer.common.flops import count_networks
from tests.helpers import DialEnv, LightEnv, assert_same, encoder_state, make_model, train_on

SPACE = spaces.Box(0, 255, (3, 16, 16), np.uint8)


class Backbone(nn.Module):
    """A ResNet of one convolution, trained on one channel."""

    def __init__(self, n_outputs: int = 4, dropout: float = 0.5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, n_outputs, 3, stride=2)
        self.norm = nn.BatchNorm2d(n_outputs)
        self.dropout = nn.Dropout(dropout)

    def forward(self, images: th.Tensor) -> th.Tensor:
        return self.dropout(F.relu(self.norm(self.conv(images)))).mean(dim=(2, 3))


class Restless(nn.Module):
    def forward(self, images: th.Tensor) -> th.Tensor:
        return images.mean(dim=(2, 3)) + th.rand(1)


def grey(**kwargs: Any) -> dict[str, Any]:
    """Arguments for images of one channel."""
    return dict(module="tests.test_pretrained:Backbone", mean=[0.4], std=[0.2], **kwargs)


@pytest.fixture
def saved(tmp_path: Any) -> tuple[Backbone, str]:
    """A trained backbone, and the file with its weights and its classifier's."""
    backbone = Backbone().eval()
    with th.no_grad():
        backbone.norm.running_mean.uniform_(-1, 1)
    path = tmp_path / "backbone.pth"
    th.save({**backbone.state_dict(), "classifier.weight": th.zeros(2, 4)}, path)
    return backbone, str(path)


# ---- what it computes ----


@pytest.mark.parametrize("n_stack", [1, 3])
def test_frames_are_resized_normalised_and_encoded_one_by_one(n_stack, saved):
    backbone, weights = saved
    space = spaces.Box(0, 255, (n_stack, 16, 16), np.uint8)
    encoder = PretrainedEncoder(space, **grey(weights=weights, input_size=24, n_stack=n_stack)).eval()
    images = th.rand(5, n_stack, 16, 16)
    expected = []
    for frames in images.split(1, dim=1):  # [5, 1, 16, 16]
        large = F.interpolate(frames, (24, 24), mode="bilinear", antialias=True)
        expected.append(backbone((large - 0.4) / 0.2))
    assert encoder.latent_dim == 4 * n_stack
    th.testing.assert_close(encoder.encode(images), th.cat(expected, dim=1))


@pytest.mark.filterwarnings("ignore:encoder_dtype=:UserWarning", "ignore:The encoder is frozen at step 0:UserWarning")
def test_frames_are_resized_in_float32_for_an_encoder_in_bfloat16(saved):
    image = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    latents = []
    for dtype in ("float32", "bfloat16"):
        policy_kwargs = dict(features_extractor_kwargs=grey(weights=saved[1], input_size=24), encoder_dtype=dtype)
        model = make_model(SEERSAC, PretrainedEncoder, freeze_after=0, policy_kwargs=policy_kwargs)
        latents.append(model.encode(image))
    th.testing.assert_close(*latents, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_come_from_a_file(suffix, saved, tmp_path):
    backbone, weights = saved
    if suffix == "safetensors":
        weights = str(tmp_path / "backbone.safetensors")
        save_file(backbone.state_dict(), weights)
    encoder = PretrainedEncoder(spaces.Box(0, 255, (1, 16, 16), np.uint8), **grey(weights=weights))
    assert_same(dict(encoder.trunk.module.state_dict()), dict(backbone.state_dict()))


def test_a_module_is_copied(saved):
    backbone, _ = saved
    encoder = PretrainedEncoder(SPACE, nn.Sequential(nn.Conv2d(3, 2, 4, 4)))
    assert encoder.latent_dim == 2 * 4 * 4  # a feature map is flattened
    kwargs = dict(module=backbone, mean=None, std=None)
    one, other = (PretrainedEncoder(spaces.Box(0, 255, (1, 16, 16), np.uint8), **kwargs) for _ in range(2))
    assert one.trunk.module is not backbone and one.trunk.module.conv.weight is not other.trunk.module.conv.weight


def test_models_of_timm_by_name(monkeypatch):
    """timm's own interface: https://huggingface.co/docs/timm"""
    calls = []

    def create_model(name: str, **kwargs: Any) -> nn.Module:
        calls.append((name, kwargs))
        return Backbone()

    timm = types.ModuleType("timm")
    timm.__version__ = "1.0"  # type: ignore[attr-defined]
    timm.list_models = lambda pattern="": ["resnet18", "resnet34"]  # type: ignore[attr-defined]
    timm.create_model = create_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", timm)
    space = spaces.Box(0, 255, (1, 16, 16), np.uint8)
    PretrainedEncoder(space, **{**grey(), "module": "timm:resnet18"})
    assert calls == [("resnet18", dict(pretrained=False, num_classes=0))]
    with pytest.raises(ValueError, match=r"must be a model of timm 1\.0, got 'resnet1'. Similar: resnet18, resnet34"):
        PretrainedEncoder(space, "timm:resnet1")


def test_a_model_of_timm_with_weights_from_a_file(tmp_path):
    try:
        timm = importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:  # the second: a torchvision that was built for another torch
        pytest.skip(f"timm cannot be imported: {error}")
    classifier = timm.create_model("test_efficientnet", pretrained=False, num_classes=10).eval()
    th.save(classifier.state_dict(), tmp_path / "weights.pth")
    space = spaces.Box(0, 255, (3, 32, 32), np.uint8)
    kwargs = dict(weights=tmp_path / "weights.pth", mean=None, std=None)
    encoder = PretrainedEncoder(space, "timm:test_efficientnet", **kwargs).eval()
    images = th.rand(2, 3, 32, 32)
    expected = classifier.forward_head(classifier.forward_features(images), pre_logits=True)
    assert encoder.latent_dim == 256
    th.testing.assert_close(encoder.encode(images), expected)


# ---- an agent ----


def test_an_agent_stores_no_image_and_learns_on_latents_from_the_first_step(saved, tmp_path):
    backbone, weights = saved
    kwargs = dict(features_extractor_class=PretrainedEncoder, features_extractor_kwargs=grey(weights=weights, n_stack=3))
    env = VecFrameStack(make_vec_env(DialEnv, n_envs=2), 3, channels_order="first")
    stages = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = SEERSAC(
            "CnnPolicy", env, buffer_size=100, freeze_after=0, learning_starts=10, batch_size=8, device="cpu", seed=0,
            policy_kwargs=dict(net_arch=[16], **kwargs),
        )  # fmt: skip
        model.learn(60, callback=lambda local, _: stages.append(local["self"].replay_buffer.stage) or True)
    assert set(stages) == {"latents"} and model._n_updates > 0
    for name, value in backbone.state_dict().items():
        assert th.equal(model.critic.features_extractor.trunk.module.state_dict()[name], value), name
    observations = model._last_obs
    frames = th.as_tensor(observations).float().reshape(2 * 3, 1, 16, 16) / 255
    th.testing.assert_close(model.encode(observations)[:, 0], backbone((frames - 0.4) / 0.2).reshape(2, 12))
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = SEERSAC.load(tmp_path / "model", env=env, device="cpu")
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert_same(encoder_state(loaded), encoder_state(model))
    assert_same(train_on(loaded), train_on(model))


def test_an_agent_that_has_acted_is_exported_without_the_frames_that_it_saw(saved):
    _, weights = saved
    env = VecFrameStack(make_vec_env(LightEnv), 3, channels_order="first")
    kwargs = dict(features_extractor_class=PretrainedEncoder, features_extractor_kwargs=grey(weights=weights, n_stack=3))
    model = SEERDQN("CnnPolicy", env, buffer_size=50, freeze_after=0, device="cpu", policy_kwargs=kwargs)
    model.freeze_encoder()
    observations = env.reset()
    model.predict(observations)
    exported = th.export.export(model.q_net, (th.as_tensor(observations),)).module()
    other = th.as_tensor(255 - observations)
    th.testing.assert_close(exported(other), model.q_net(other))


def test_a_step_of_the_environments_encodes_one_frame(saved):
    _, weights = saved
    env = VecFrameStack(make_vec_env(DialEnv, n_envs=2), 3, channels_order="first")
    policy_kwargs = dict(features_extractor_kwargs=grey(weights=weights, n_stack=3))
    model = make_model(SEERSAC, PretrainedEncoder, env=env, freeze_after=0, policy_kwargs=policy_kwargs, learning_starts=1000)
    n_frames: list[int] = []
    module = model.critic.features_extractor.trunk.module
    handle = module.register_forward_pre_hook(lambda _, inputs: n_frames.append(len(inputs[0])))
    model.learn(2 * 8)
    # Without the stack on which operations are counted: the first step encodes two stacks of each env, before it
    # and after it; the second one, as many envs as ever; then a step encodes one frame of each
    assert [n for n in n_frames if n != 3] == [2 * 2 * 3, 2 * 3, *[2] * 6]
    handle.remove()
    observations = model._last_obs
    alone = th.cat([model.encode(observations[env : env + 1]) for env in range(2)])
    th.testing.assert_close(model.encode(observations), alone)
    # A saliency map has all frames, and leaves nothing of its graph
    images = th.as_tensor(np.roll(observations, -1, axis=1)).float().requires_grad_()
    model.critic.extract_features(images, model.critic.features_extractor).sum().backward()
    assert (images.grad.abs().amax(dim=(0, 2, 3)) > 0).all()
    copy.deepcopy(model.policy)
    # Frames on another device are not compared
    trunk = copy.deepcopy(model.critic.features_extractor.trunk)
    images = th.rand(2, 3, 16, 16)
    trunk(images)
    assert trunk._last is not None
    assert trunk.to("meta")(images.to("meta")).shape == trunk._last[1].flatten(start_dim=1).shape
    # Other weights forget the frames
    other = {name: value + 1 if value.is_floating_point() else value for name, value in module.state_dict().items()}
    trunk = model.critic.features_extractor.trunk
    trunk.load_state_dict({**trunk.state_dict(), **{f"module.{name}": value for name, value in other.items()}})
    assert not th.allclose(model.encode(observations), alone)


def test_a_module_that_is_frozen_already_is_encoded_whole_where_it_is_checked_and_counted():
    """Not from the frames of the call before."""
    n_frames: list[int] = []
    backbone = Backbone().requires_grad_(False)
    backbone.register_forward_pre_hook(lambda _, inputs: n_frames.append(len(inputs[0])))
    env = VecFrameStack(make_vec_env(DialEnv), 3, channels_order="first")
    policy_kwargs = dict(features_extractor_kwargs=dict(module=backbone, mean=[0.4], std=[0.2], n_stack=3))
    model = make_model(SEERSAC, PretrainedEncoder, env=env, freeze_after=0, policy_kwargs=policy_kwargs)
    count_networks(model.policy)
    assert n_frames and set(n_frames) == {3}


# ---- what is refused ----


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        (dict(module="resnet18"), ValueError, r'a torch module, "timm:NAME" or "package.module:NAME", got \'resnet18\''),
        (
            dict(module="no_such_package:f"),
            ImportError,
            "needs no_such_package, .*is no_such_package installed",
        ),
        (dict(module="tests.test_pretrained:Frontbone"), ValueError, "in <module 'tests.test_pretrained' .*got 'Frontbone'"),
        (dict(module="builtins:module"), ValueError, "in <module 'builtins' .*got 'module'"),
        (dict(module="builtins:dict"), ValueError, "returns a torch module, got 'builtins:dict', which returns a dict"),
        (dict(module=Restless()), ValueError, "the same output twice in evaluation mode, got a Restless that does not"),
        (dict(module=Backbone(), mean=[0.5]), ValueError, r"`mean` must be None or have a number for each of 3 channels"),
        (dict(module=Backbone(), std=[0.5, 0.5, 0]), ValueError, "`std` must have numbers > 0"),
        (dict(module=Backbone(), n_stack=0), ValueError, "`n_stack` must be an integer >= 1, got 0"),
        (dict(module=Backbone(), n_stack=2), ValueError, "`n_stack` must divide the 3 channels of an observation, got 2"),
    ],
)
def test_what_does_not_fit_is_named(kwargs, error, message):
    with pytest.raises(error, match=message):
        PretrainedEncoder(SPACE, **kwargs)


def test_floats_are_refused():
    with pytest.raises(ValueError, match="must have images of bytes"):
        PretrainedEncoder(spaces.Box(0, 1, (3, 16, 16), np.float32), Backbone())


def test_timm_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r'pip install "sb3_seer\[pretrained\]"'):
        PretrainedEncoder(SPACE, "timm:resnet18")


def test_timm_with_the_torchvision_of_another_torch_is_named(monkeypatch, tmp_path):
    (tmp_path / "timm.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(
        ImportError, match=r"torchvision::nms does not exist\): .*the torchvision that was built for your torch"
    ):
        PretrainedEncoder(SPACE, "timm:resnet18")


def test_weights_that_do_not_fit_are_named_with_both_shapes(saved):
    _, weights = saved
    space = spaces.Box(0, 255, (1, 16, 16), np.uint8)
    with pytest.raises(ValueError, match=r"conv.weight of \(4, 1, 3, 3\), and \(8, 1, 3, 3\) here"):
        PretrainedEncoder(space, **grey(weights=weights, module_kwargs=dict(n_outputs=8)))
    with pytest.raises(ValueError, match=r"all weights of the module, got '.*backbone.pth' without 0.weight"):
        PretrainedEncoder(space, **{**grey(weights=weights), "module": nn.Sequential(nn.Conv2d(1, 2, 3))})
    with pytest.raises(FileNotFoundError):
        PretrainedEncoder(space, **grey(weights="nowhere.pth"))


@pytest.mark.parametrize("name", ["text.pth", "text.safetensors", "list.pth"])
def test_files_without_weights_are_named(name, tmp_path):
    (tmp_path / name).write_text("hello")
    if name == "list.pth":
        th.save([1, 2], tmp_path / name)
    with pytest.raises(ValueError, match=f"`weights` must be the file of a state_dict, got '.*{name}'"):
        PretrainedEncoder(spaces.Box(0, 255, (1, 16, 16), np.uint8), **grey(weights=tmp_path / name))


def test_it_may_learn_until_a_freeze():
    policy_kwargs = dict(features_extractor_kwargs=grey())
    model = make_model(SEERDQN, PretrainedEncoder, freeze_after=None, policy_kwargs=policy_kwargs)
    before = model.q_net.features_extractor.trunk.module.conv.weight.clone()
    model.learn(30)
    assert not th.equal(model.q_net.features_extractor.trunk.module.conv.weight, before)

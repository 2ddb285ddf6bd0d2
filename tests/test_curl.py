"""The contrastive loss of SEERCURL: what it is, what it trains, when, and that it ends with the freeze."""

import copy
import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.torch_layers import NatureCNN

from sb3_seer import SEERSAC, LatentReplayBuffer
from sb3_seer.common.augmentations import RandomCrop
from sb3_seer.curl import SEERCURL
from sb3_seer.curl.curl import contrastive_loss
from tests.dict_helpers import EXTRACTORS, IMAGES, OTHERS
from tests.dict_helpers import make_model as make_dict_model
from tests.helpers import DialEnv, TinyEncoder


def make_model(algorithm: type = SEERCURL, env: gym.Env | None = None, policy: str = "CnnPolicy", **kwargs: Any):
    policy_kwargs = {**dict(features_extractor_class=TinyEncoder, net_arch=[16]), **kwargs.pop("policy_kwargs", {})}
    settings: dict[str, Any] = dict(buffer_size=200, learning_starts=10, batch_size=8, augmentation="random_shift", seed=0)
    settings.update(freeze_after=None, device="cpu", policy_kwargs=policy_kwargs)
    return algorithm(policy, env or DialEnv(), **{**settings, **kwargs})


def test_a_policy_of_another_algorithm_is_refused():
    with pytest.raises(ValueError, match=r"`policy` must be a policy of sb3_seer\.curl"):
        SEERCURL(SEERSAC.policy_aliases["CnnPolicy"], DialEnv())


def with_images(n_steps: int = 40, **kwargs: Any):
    """:return: a model that has acted, but not learned"""
    model = make_model(learning_starts=n_steps, **kwargs)
    model.learn(n_steps)
    model.policy.set_training_mode(True)
    return model


def weights_of(model) -> dict[str, th.Tensor]:
    return copy.deepcopy({**model.policy.state_dict(), "W": model.bilinear.weight.detach()})


def moved(model, before: dict[str, th.Tensor]) -> set[str]:
    return {name for name, value in weights_of(model).items() if not th.equal(value, before[name])}


def names(model, *prefixes: str) -> set[str]:
    return {name for name in weights_of(model) if name.startswith(prefixes)}


# What the loss is


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_contrastive_loss_is_that_of_the_definition(scale):
    # With the larger scale, exp() of a logit would overflow
    anchors, keys, weight = (th.randn(shape, generator=th.Generator().manual_seed(1)) for shape in ((5, 3), (5, 3), (3, 3)))
    keys = keys.roll(1, dims=1) * scale
    total = 0.0
    for i in range(5):
        logits = [
            sum(float(anchors[i, k]) * float(weight[k, m]) * float(keys[j, m]) for k in range(3) for m in range(3))
            for j in range(5)
        ]
        logits = [logit - max(logits) for logit in logits]
        total += math.log(sum(map(math.exp, logits))) - logits[i]
    assert contrastive_loss(anchors, keys, weight).item() == pytest.approx(total / 5, rel=1e-5)


@pytest.mark.parametrize("keys, weight", [((1, 3), (3, 3)), ((4, 3), (3, 3)), ((5, 3), (3, 4)), ((5, 1), (3, 1))])
def test_contrastive_loss_refuses_other_shapes(keys, weight):
    with pytest.raises(AssertionError):
        contrastive_loss(th.zeros(5, 3), th.zeros(keys), th.zeros(weight))


def test_similarities_start_between_zero_and_one():
    model = make_model(policy_kwargs=dict(features_extractor_kwargs=dict(latent_dim=50)))
    weight = model.bilinear.weight
    assert weight.shape == (50, 50)
    assert 0 <= weight.min() < 0.01 and 0.99 < weight.max() <= 1
    assert weight.mean().item() == pytest.approx(0.5, abs=0.03)


def test_anchors_are_of_the_critic_and_keys_of_the_target(monkeypatch):
    model = with_images(batch_size=6)
    for parameter in model.critic_target.parameters():
        parameter.data += 0.1
    batch = model.replay_buffer.sample(6)
    seen = {}

    def loss(anchors, keys, weight):
        seen.update(anchors=anchors, keys=keys, weight=weight)
        return contrastive_loss(anchors, keys, weight)

    monkeypatch.setattr("sb3_seer.curl.curl.contrastive_loss", loss)
    # What a critic makes of images by itself, with its normalisation
    anchors, keys = (
        network.features_extractor(images.float() / 255).detach()
        for network, images in ((model.critic, batch.observations), (model.critic_target, batch.positives))
    )
    model._update_encoder(batch, {"cpc_loss": []})
    th.testing.assert_close(seen["anchors"], anchors)
    th.testing.assert_close(seen["keys"], keys)
    assert seen["weight"] is model.bilinear.weight
    assert seen["anchors"].requires_grad and not seen["keys"].requires_grad


# What it compares


class NumberedEnv(gym.Env):
    """The first channel of an image names each of its places, the second the image."""

    observation_space = spaces.Box(0, 255, (2, 16, 16), np.uint8)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        self.t = 0
        return self._image(), {}

    def step(self, action: Any):
        self.t += 1
        return self._image(), 0.0, False, self.t == 100, {}

    def _image(self) -> np.ndarray:
        return np.stack([np.arange(256, dtype=np.uint8).reshape(16, 16), np.full((16, 16), self.t, np.uint8)])


@pytest.mark.parametrize("prioritized", [False, True])
def test_positives_are_independent_crops_of_the_same_observations(prioritized):
    model = make_model(
        env=NumberedEnv(), learning_starts=60, augmentation="random_crop", augmentation_kwargs=dict(size=12),
        replay_buffer_kwargs=dict(prioritized=prioritized),
    )  # fmt: skip
    model.learn(60)
    batch = model.replay_buffer.sample(2000)
    assert (batch.weights is not None) == (batch.indices is not None) == prioritized
    crops = batch.observations.long(), batch.positives.long(), batch.next_observations.long()
    assert crops[1].shape == (2000, 2, 12, 12)
    # All places of the first channel follow from its first one: a crop of 12 x 12 at one of 5 x 5 offsets
    places = (16 * th.arange(12)[:, None] + th.arange(12)).expand(2000, 12, 12)
    corners = [crop[:, 0, 0, 0] for crop in crops]
    for crop, corner in zip(crops, corners, strict=True):
        assert th.equal(crop[:, 0], places + corner[:, None, None])
        assert set(corner.tolist()) == {16 * row + column for row in range(5) for column in range(5)}
    assert th.equal(crops[0][:, 1], crops[1][:, 1]) and th.equal(crops[0][:, 1, 0, 0] + 1, crops[2][:, 1, 0, 0])
    # Any two are the same by chance only: one in 25
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (corners[one] == corners[other]).float().mean().item() == pytest.approx(1 / 25, abs=0.02)


class HalfBlack(th.nn.Module):
    """An augmentation that works in place."""

    def forward(self, images: th.Tensor) -> th.Tensor:
        return images.mul_(th.randint(2, (len(images), 1, 16, 1)).to(images.dtype))


def test_an_augmentation_that_works_in_place_changes_its_own_images_alone():
    model = make_model(augmentation=HalfBlack(), learning_starts=60)
    model.learn(33)
    batch = model.replay_buffer.sample(8)
    assert not th.equal(batch.observations, batch.positives)
    model.freeze_encoder()
    assert np.array_equal(model._last_obs, model.replay_buffer.last_next_obs[""])


def test_positives_change_nothing_else_of_a_sample():
    def sample(**kwargs: Any):
        buffer = LatentReplayBuffer(
            50, NumberedEnv.observation_space, NumberedEnv.action_space, "cpu", augmentation=RandomCrop(12), **kwargs
        )
        env = NumberedEnv()
        obs, _ = env.reset()
        for i in range(30):
            next_obs, reward, *_ = env.step(None)
            buffer.add(obs[None], next_obs[None], np.array([[i / 30]]), np.array([reward + i]), np.array([False]), [{}])
            obs = next_obs
        np.random.seed(2)
        th.manual_seed(2)
        return buffer.sample(20)

    with_positives, without = sample(sample_positives=True), sample()
    assert not hasattr(without, "positives")
    for name in ("observations", "actions", "next_observations", "dones", "rewards"):
        assert th.equal(getattr(with_positives, name), getattr(without, name)), name


@EXTRACTORS
def test_keys_that_are_no_images_are_not_compared(extractor, size):
    model = make_dict_model(SEERCURL, extractor, size, learning_starts=30, freeze_after=60)
    model.learn(30)
    model.policy.set_training_mode(True)
    images = model.replay_buffer.sample(8).observations
    others = {key: images[key].roll(1, dims=0) for key in OTHERS}
    assert not all(th.equal(images[key], others[key]) for key in OTHERS)
    features = model.policy.contrastive_features(model.critic, images)
    assert features.shape == (8, model.bilinear.in_features)
    assert th.equal(features, model.policy.contrastive_features(model.critic, {**images, **others}))
    # The positives are the images alone
    assert set(model.replay_buffer.sample(8).positives) == set(IMAGES)
    before = weights_of(model)
    model.learn(20, reset_num_timesteps=False)
    assert "W" in moved(model, before)
    model.learn(20, reset_num_timesteps=False)
    assert model.encoder_frozen


# What it trains


@pytest.mark.parametrize("extractor", [TinyEncoder, NatureCNN])
def test_the_contrastive_loss_trains_the_critics_encoder_and_w_alone(extractor):
    size = 16 if extractor is TinyEncoder else 48
    policy_kwargs = dict(features_extractor_class=extractor)
    model = with_images(env=DialEnv(size=size), policy_kwargs=policy_kwargs, cpc_update_freq=2)
    # The second update leaves the gradients of the critic's loss
    model.train(gradient_steps=2, batch_size=8)
    before = weights_of(model)
    model._update_encoder(model.replay_buffer.sample(8), {"cpc_loss": []})
    # The actor shares the critic's convolutions (all of an extractor that is not split)
    shared = "actor.features_extractor." + ("trunk" if extractor is TinyEncoder else "")
    assert moved(model, before) == names(model, "critic.features_extractor.", shared, "W")
    if extractor is TinyEncoder:
        for part in ("trunk", "projection", "head"):
            assert names(model, f"critic.features_extractor.{part}.")
    assert all(parameter.grad is None for parameter in model.critic_target.parameters())


def test_no_other_loss_than_the_critics_and_the_contrastive_one_trains_the_convolutions():
    model = with_images(cpc_update_freq=None)
    model.critic.optimizer.step = lambda: None
    before = weights_of(model)
    model.train(gradient_steps=3, batch_size=8)
    actors_own = {name for name in names(model, "actor.") if ".trunk." not in name}
    assert actors_own == {name for name in moved(model, before) if not name.startswith("critic_target.")}


def test_the_contrastive_loss_takes_two_steps_with_one_gradient():
    """With plain gradient descent, the steps add up: one of the critic's optimizer and one of its own."""
    model = with_images(
        policy_kwargs=dict(optimizer_class=th.optim.SGD), encoder_learning_rate=0.3, cpc_learning_rate=0.5, learning_rate=7.0
    )
    model._update_learning_rate([model.actor.optimizer, model.critic.optimizer])
    batch = model.replay_buffer.sample(8)
    extractor, before = model.critic.features_extractor, weights_of(model)
    anchors = extractor(batch.observations.float() / 255)
    keys = model.critic_target.features_extractor(batch.positives.float() / 255).detach()
    loss = contrastive_loss(anchors, keys, model.bilinear.weight)
    gradients = th.autograd.grad(loss, [*extractor.parameters(), model.bilinear.weight])
    model._update_encoder(batch, {"cpc_loss": []})
    after = weights_of(model)
    for (name, _), gradient in zip(extractor.named_parameters(), gradients[:-1], strict=True):
        name = f"critic.features_extractor.{name}"
        th.testing.assert_close(after[name], before[name] - (0.3 + 0.5) * gradient, rtol=1e-4, atol=1e-6)
    th.testing.assert_close(after["W"], before["W"] - 0.5 * gradients[-1], rtol=1e-4, atol=1e-6)


def test_learning_rates_of_their_own_follow_their_schedules():
    model = make_model(
        learning_starts=20,
        learning_rate=1e-2,
        encoder_learning_rate=lambda progress: 2e-3 * progress,
        cpc_learning_rate=lambda progress: 3e-3 * progress,
        ent_coef_learning_rate=lambda progress: 4e-3 * progress,
    )
    model.learn(40)
    remaining = model._current_progress_remaining = 0.25
    model.train(gradient_steps=1, batch_size=8)
    for optimizer in (model.actor.optimizer, model.critic.optimizer):
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-2, 2e-3 * remaining])
    for optimizer, rate in ((model.cpc_optimizer, 3e-3), (model.ent_coef_optimizer, 4e-3)):
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate * remaining])
    assert model.ent_coef_optimizer.param_groups[0]["betas"] == (0.5, 0.999)

    # And they are of the right parameters
    q_networks, extractor = (group["params"] for group in model.critic.optimizer.param_groups)
    assert {id(p) for p in q_networks} == {id(p) for q_network in model.critic.q_networks for p in q_network.parameters()}
    assert {id(p) for p in extractor} == {id(p) for p in model.critic.features_extractor.parameters()}
    own = model.actor.features_extractor
    assert {id(p) for p in model.actor.optimizer.param_groups[1]["params"]} == {
        id(p) for part in (own.projection, own.head) for p in part.parameters()
    }


# When


def record_updates(model) -> list[str]:
    """:return: the list to which each of the model's updates will append its name"""
    updates: list[str] = []

    def spy(owner: Any, method: str, name: str) -> None:
        original = getattr(owner, method)

        def wrapped(*args: Any) -> Any:
            updates.append(name)
            return original(*args)

        setattr(owner, method, wrapped)

    spy(model.ent_coef_optimizer, "step", "ent_coef")
    spy(model.critic.optimizer, "step", "critic")
    spy(model.actor.optimizer, "step", "actor")
    spy(model, "_update_target", "target")
    spy(model.cpc_optimizer, "step", "cpc")
    return updates


def test_order_of_updates():
    model = with_images()
    updates = record_updates(model)
    model.train(gradient_steps=1, batch_size=8)
    assert updates == ["ent_coef", "critic", "actor", "target", "critic", "cpc"]
    updates.clear()
    model.train(gradient_steps=1, batch_size=8)
    assert updates == ["critic", "critic", "cpc"]


def test_frequencies_are_counted_over_the_whole_training():
    model = with_images(actor_update_freq=3, target_update_interval=4, cpc_update_freq=2)
    updates = record_updates(model)
    counts = []
    for gradient_steps in (1, 1, 5, 2, 3):
        updates.clear()
        model.train(gradient_steps, batch_size=8)
        # The critic's optimizer takes a step of each contrastive update too
        critic = updates.count("critic") - updates.count("cpc")
        counts.append((critic, *(updates.count(name) for name in ("actor", "ent_coef", "target", "cpc"))))
    # Gradient steps 0; 1; 2 to 6; 7 and 8; 9 to 11
    assert counts == [(1, 1, 1, 1, 1), (1, 0, 0, 0, 0), (5, 2, 2, 1, 3), (2, 0, 0, 1, 1), (3, 1, 1, 0, 1)]


def test_the_freeze_ends_the_contrastive_loss(monkeypatch):
    model = make_model(freeze_after=None, n_augmentations=2)
    model.learn(40)
    model.freeze_encoder()
    before, optimizer = weights_of(model), copy.deepcopy(model.cpc_optimizer.state_dict())
    for online, target in zip(
        model.critic.features_extractor.parameters(), model.critic_target.features_extractor.parameters(), strict=True
    ):
        assert th.equal(online, target)

    def refuse(*_: Any) -> None:
        raise AssertionError("the contrastive loss was computed after the freeze")

    monkeypatch.setattr("sb3_seer.curl.curl.contrastive_loss", refuse)
    model.learn(40, reset_num_timesteps=False)
    encoder = {name for name in before if ".trunk." in name or ".projection." in name}
    assert moved(model, before) == set(before) - encoder - {"W"}
    state = model.cpc_optimizer.state_dict()
    assert state["param_groups"] == optimizer["param_groups"]
    for key, moments in optimizer["state"].items():
        assert all(th.equal(moments[name], state["state"][key][name]) for name in moments)
    assert model.replay_buffer.sample(4).positives is None


def test_without_a_freeze_it_goes_on():
    model = make_model(freeze_after=None)
    model.learn(40)
    before = weights_of(model)
    model.learn(20, reset_num_timesteps=False)
    assert moved(model, before) == set(before)
    assert model.cpc_optimizer.state[model.bilinear.weight]["step"] == model._n_updates == 60 - 10


@pytest.mark.parametrize("use_sde", [False, True])
def test_without_the_contrastive_loss_and_at_sacs_settings_it_is_seersac_to_the_last_bit(use_sde):
    rates = dict(encoder_learning_rate=3e-4, cpc_learning_rate=3e-4, ent_coef_learning_rate=3e-4, ent_coef_betas=(0.9, 0.999))
    settings = dict(cpc_update_freq=None, actor_update_freq=1, target_update_interval=1, encoder_tau=0.005, **rates)

    def train(algorithm: type, **kwargs: Any):
        model = make_model(algorithm, freeze_after=40, ent_coef="auto", n_augmentations=2, use_sde=use_sde, **kwargs)
        # W took random numbers
        np.random.seed(1)
        th.manual_seed(1)
        model.learn(80)
        assert model.encoder_frozen
        return model

    ours, theirs = train(SEERCURL, **settings), train(SEERSAC)
    assert th.equal(ours.log_ent_coef, theirs.log_ent_coef)
    for name, value in theirs.policy.state_dict().items():
        assert th.equal(ours.policy.state_dict()[name], value), name


# Around it


@pytest.mark.filterwarnings("ignore:SEERCURL has no encoder")
def test_without_images_it_is_sac(tmp_path):
    model = SEERCURL("MlpPolicy", "Pendulum-v1", learning_starts=10, batch_size=8, device="cpu")
    model.learn(20)
    model.save(tmp_path / "model")
    loaded = SEERCURL.load(tmp_path / "model", env=model.get_env(), device="cpu")
    assert loaded.bilinear is None and loaded._n_updates == model._n_updates > 0
    loaded.learn(20)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(augmentation=None), "`augmentation` must not be None with a contrastive loss.*cpc_update_freq=None"),
        (dict(cpc_update_freq=0), "`cpc_update_freq` must be None or an integer >= 1, got 0"),
        (dict(encoder_learning_rate=-1), "`encoder_learning_rate` must be a number >= 0, got -1"),
        (dict(cpc_learning_rate=math.nan), "`cpc_learning_rate` must be a number >= 0, got nan"),
    ],
)
def test_what_is_not_allowed_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_model(**kwargs)


@pytest.mark.slow
def test_learns_through_the_freeze():
    model = make_model(
        buffer_size=1000, freeze_after=700, learning_starts=100, learning_rate=1e-3, batch_size=32, gamma=0.5,
        augmentation_kwargs=dict(pad=1), n_augmentations=2, policy_kwargs=dict(net_arch=[64]),
    )  # fmt: skip
    model.learn(690)
    # A batch of 32 is told apart by chance with a loss of log(32) = 3.5
    assert model.logger.name_to_value["train/cpc_loss"] < 2.5
    model.learn(900, reset_num_timesteps=False)
    assert model.encoder_frozen and model.replay_buffer.size() == 1590
    env = Monitor(DialEnv())
    env.reset(seed=1)
    mean_return, _ = evaluate_policy(model, env, n_eval_episodes=20)
    assert mean_return > 7.5

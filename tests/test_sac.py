"""What SEERSAC adds to SAC: averages over augmentations, and rates and initial weights of its own."""

import math
from typing import Any

import pytest
import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_seer import SEERCURL, SEERSAC, PixelEncoder
from tests.helpers import make_model


def shifted(algorithm: type = SEERSAC, **kwargs: Any) -> Any:
    settings = dict(augmentation="random_shift", augmentation_kwargs=dict(pad=2), n_augmentations=3, freeze_after=None)
    return make_model(algorithm, **{**settings, **kwargs})


# ---- averages over augmentations ----


def test_targets_and_losses_are_averages_over_the_views(monkeypatch):
    """DrQ (https://arxiv.org/abs/2004.13649), equations 1 to 3, written out for two views."""
    model = shifted(n_views=2, ent_coef=0.5).learn(30)
    batch = model.replay_buffer.sample(4, n_views=2)
    assert len(batch.rewards) == 8 and th.equal(batch.actions[:4], batch.actions[4:])
    policy = model.policy
    with th.no_grad():
        latents, next_latents = policy.encode_batch(batch.observations, batch.next_observations)
        th.manual_seed(1)
        model.actor.action_log_prob(latents.first(4))  # the actor's update draws its actions first
        actions, log_prob = model.actor.action_log_prob(next_latents)
        values = th.cat(model.critic_target(next_latents, actions), dim=1).min(dim=1).values - 0.5 * log_prob
        targets = batch.rewards[:4, 0] + 0.99 * (1 - batch.dones[:4, 0]) * (values[:4] + values[4:]) / 2
        losses = [
            ((q_values[view : view + 4, 0] - targets) ** 2).mean()
            for q_values in model.critic(latents, batch.actions)
            for view in (0, 4)
        ]
    monkeypatch.setattr(model.replay_buffer, "sample", lambda *args, **kwargs: batch)
    th.manual_seed(1)
    model.train(gradient_steps=1, batch_size=4)
    # Half of the squared error for each of two critics, and the mean over two views
    assert model.logger.name_to_value["train/critic_loss"] == pytest.approx(sum(losses).item() / 4, rel=1e-5)


@pytest.mark.parametrize("algorithm", [SEERSAC, SEERCURL])
def test_views_of_latents_are_stored_copies(algorithm, monkeypatch):
    model = shifted(algorithm, n_views=2).learn(30)
    model.freeze_encoder()

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("an encoder ran")

    for network in model.policy.encoder_networks:
        monkeypatch.setattr(network.features_extractor.trunk, "forward", refuse)
    model.train(gradient_steps=3, batch_size=8)


def test_views_are_counted_as_passes():
    assert shifted(n_views=2).flops_passes == (6, 2, 0, 0)
    assert shifted(SEERCURL, n_views=2, cpc_update_freq=2).flops_passes == (6, 2, 1, 0.5)


def test_priorities_have_one_error_for_all_views_of_a_transition():
    model = shifted(n_views=3, replay_buffer_kwargs=dict(prioritized=True)).learn(40)
    assert model._n_updates > 0


# ---- rates, frequencies and initial weights ----


def test_the_actor_is_updated_in_every_second_gradient_step():
    model = shifted(actor_update_freq=2).learn(10)
    changes = []
    for _ in range(4):
        before = model.actor.mu.weight.clone()
        model.train(gradient_steps=1, batch_size=8)
        changes.append(not th.equal(model.actor.mu.weight, before))
    assert changes in ([True, False] * 2, [False, True] * 2)


@pytest.mark.parametrize("encoder_tau", [None, 0.5])
def test_the_targets_encoder_has_a_tau_of_its_own(encoder_tau):
    model = shifted(tau=0.25, encoder_tau=encoder_tau).learn(10)
    before = {name: value.clone() for name, value in model.critic_target.state_dict().items()}
    model.train(gradient_steps=1, batch_size=8)
    for name, value in model.critic_target.state_dict().items():
        tau = encoder_tau if encoder_tau and name.startswith("features_extractor") else 0.25
        th.testing.assert_close(value, (1 - tau) * before[name] + tau * model.critic.state_dict()[name])


def test_the_entropy_coefficient_has_a_learning_rate_of_its_own(tmp_path):
    model = shifted(ent_coef_learning_rate=lambda progress: 0.5 * progress, ent_coef_betas=(0.5, 0.9)).learn(20)
    (group,) = model.ent_coef_optimizer.param_groups
    assert group["lr"] == pytest.approx(0.5 * model._current_progress_remaining) and group["betas"] == (0.5, 0.9)
    assert shifted().ent_coef_optimizer.param_groups[0]["lr"] == pytest.approx(3e-4)
    model.save(tmp_path / "model")
    loaded = SEERSAC.load(tmp_path / "model", env=model.get_env(), device="cpu", ent_coef_betas=(0.8, 0.99)).learn(20)
    assert loaded.ent_coef_optimizer.param_groups[0]["betas"] == (0.8, 0.99)


def test_the_log_standard_deviation_stays_within_its_bounds():
    model = shifted(policy_kwargs=dict(log_std_bounds=(-10, 2)))
    images = th.randint(0, 256, (5, 1, 16, 16), dtype=th.uint8)
    for bias, expected in ((0.0, -4.0), (100.0, 2.0), (-100.0, -10.0)):
        nn.init.zeros_(model.actor.log_std.weight)
        nn.init.constant_(model.actor.log_std.bias, bias)
        _, log_std, _ = model.actor.get_action_dist_params(images)
        assert th.allclose(log_std, th.full_like(log_std, expected))


def test_pixel_encoder_with_a_tanh():
    policy_kwargs = dict(features_extractor_kwargs=dict(tanh=True))
    model = make_model(SEERSAC, PixelEncoder, size=24, freeze_after=None, policy_kwargs=policy_kwargs)
    extractor = model.critic.features_extractor
    latents = th.randn(4, extractor.latent_dim)
    assert th.equal(extractor.head(latents), th.tanh(F.layer_norm(latents, (extractor.latent_dim,))))


def test_policies_are_rebuilt_from_their_parameters(tmp_path):
    model = shifted(policy_kwargs=dict(ortho_init=True, log_std_bounds=(-10, 2)))
    model.policy.save(tmp_path / "policy")
    loaded = type(model.policy).load(tmp_path / "policy", device="cpu")
    assert loaded.ortho_init and loaded.actor.log_std_bounds == (-10, 2)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(n_views=0), "`n_views` must be an integer >= 1, got 0"),
        (dict(n_views=4), "`n_views` must be <= n_augmentations=3, got 4"),
        (dict(actor_update_freq=0), "`actor_update_freq` must be an integer >= 1, got 0"),
        (dict(target_update_interval=0.5), "`target_update_interval` must be an integer >= 1, got 0.5"),
        (dict(encoder_tau=1.5), "`encoder_tau` must be between 0 and 1, got 1.5"),
        (dict(encoder_tau="0.5"), "`encoder_tau` must be between 0 and 1, got '0.5'"),
        (dict(n_augmentations=0), "`n_augmentations` must be an integer >= 1, got 0"),
        (dict(n_augmentations="4"), "`n_augmentations` must be an integer >= 1, got '4'"),
        (dict(ent_coef_learning_rate=math.inf), "`ent_coef_learning_rate` must be a number >= 0, got inf"),
        (dict(ent_coef_learning_rate=lambda progress: -progress), "`ent_coef_learning_rate` must be a number >= 0, got -1.0"),
        (dict(ent_coef_betas=0.9), "`ent_coef_betas` must be two numbers, got 0.9"),
        (dict(ent_coef_betas=(0.9, 2)), "`ent_coef_betas` must be between 0 and 1, got 2"),
        (dict(gamma=0.9, replay_buffer_kwargs=dict(gamma=0.5)), "`gamma` of replay_buffer_kwargs must be 0.9, as in this"),
        (dict(replay_buffer_kwargs=dict(alpha=0.5)), "`prioritized` must be True with alpha=0.5"),
        (
            dict(augmentation=nn.AvgPool2d(2), augmentation_kwargs=None),
            r"`augmentation` must map images of shape .* and dtype torch.uint8, got Not",
        ),
        (dict(policy_kwargs=dict(log_std_bounds=(2, -10))), "`log_std_bounds` must be two increasing numbers"),
        (dict(policy_kwargs=dict(log_std_bounds=(-10, 2)), use_sde=True), "`log_std_bounds` must be None with use_sde=True"),
    ],
)
def test_values_that_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        shifted(**kwargs)


def test_without_images_a_warning_says_what_has_no_effect():
    with pytest.warns(UserWarning, match="Only the parameters of the SB3 class have an effect"):
        SEERSAC("MlpPolicy", "Pendulum-v1", buffer_size=10, n_views=2)


@pytest.mark.filterwarnings("ignore:.*no encoder to freeze")
@pytest.mark.parametrize("algorithm", [SEERSAC, SEERCURL])
def test_without_images_a_model_is_saved_and_subclassed(algorithm, tmp_path):
    class Mine(algorithm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    Mine("MlpPolicy", "Pendulum-v1", buffer_size=10).save(tmp_path / "model")
    Mine.load(tmp_path / "model")

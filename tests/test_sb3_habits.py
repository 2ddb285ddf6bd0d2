"""What SB3's users do with a model, and with extractors, optimizers and callbacks of their own."""

import copy
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.wrappers import FrameStackObservation
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import (
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    StopTrainingOnMaxEpisodes,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper, VecTransposeImage
from torch import nn

from sb3_seer import SEERCURL, SEERDQN, SEERQRDQN, SEERSAC, SEERTD3, SEERTQC, FreezeEncoderCallback, Rainbow, SplitExtractor
from tests.helpers import (
    ALGORITHMS,
    DialEnv,
    LightEnv,
    TinyEncoder,
    assert_same,
    encoder_state,
    is_continuous,
    make_model,
)


class NormedCNN(BaseFeaturesExtractor):
    """A user's extractor, with layers that behave differently in training."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, features_dim=8)
        channels, height, width = observation_space.shape
        self.cnn = nn.Sequential(nn.Conv2d(channels, 8, 4, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5))
        self.linear = nn.Sequential(nn.Flatten(), nn.Linear(8 * (height // 4) * (width // 4), 8))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.linear(self.cnn(observations))


@pytest.mark.parametrize(
    "kwargs",
    [dict(), dict(n_steps=3), dict(use_sde=True), dict(target_update_interval=3, ent_coef=0.2), dict(gradient_steps=4)],
)
def test_updates_of_sac_are_sb3s_where_there_is_nothing_to_encode(kwargs):
    """
    An exact oracle of train(): with an extractor that has no weights, tied or separate networks are the same.
    Adam is fused, as by default in ours.
    """
    policy_kwargs = dict(features_extractor_class=FlattenExtractor, net_arch=[16, 16], optimizer_kwargs=dict(fused=True))
    settings: dict[str, Any] = dict(
        buffer_size=500, learning_starts=20, batch_size=16, seed=0, device="cpu", policy_kwargs=policy_kwargs, **kwargs
    )
    ours = SEERSAC("CnnPolicy", DialEnv(), freeze_after=None, **settings)
    theirs = SAC("CnnPolicy", DialEnv(), **settings)
    ours.set_parameters(theirs.get_parameters())
    for model in (ours, theirs):
        np.random.seed(1)
        th.manual_seed(1)
        model.action_space.seed(1)
        model.learn(60)
        assert model._n_updates >= 40
    assert_same(dict(ours.policy.state_dict()), dict(theirs.policy.state_dict()))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_frozen_batch_norm_and_dropout_stay_in_evaluation_mode(algorithm):
    model = make_model(algorithm, NormedCNN, freeze_after=40)
    model.learn(60)
    frozen = encoder_state(model)
    assert any("running_mean" in name for name in frozen)
    network, observation = model.policy.encoder_networks[0], model._last_obs
    # Twice the same latents, in training mode too, whether of the policy or of a network alone
    for asked in (model.policy, network, network):
        asked.set_training_mode(True)
        assert not any(module.training for module in network.features_extractor.cnn.modules())
        th.testing.assert_close(model.encode(observation), model.encode(observation), rtol=0, atol=0)
    model.learn(40, reset_num_timesteps=False)
    assert_same(encoder_state(model), frozen)


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, Rainbow])
def test_what_dead_units_leave_to_the_optimizer_is_forgotten(algorithm):
    """A processor takes a hundred times as long for numbers that small."""
    policy_kwargs = dict(optimizer_kwargs=dict(betas=(0.9, 0.999)))  # CrossQ's first one is 0.5
    kwargs = {} if algorithm is Rainbow else dict(freeze_after=30)
    model = make_model(algorithm, policy_kwargs=policy_kwargs, **kwargs)
    model.learn(40)
    network = model.critic if is_continuous(algorithm) else model.policy
    optimizer, tiny = network.optimizer, th.finfo(th.float32).tiny
    layer = next(module for module in network.modules() if isinstance(module, nn.Linear) and module.out_features == 16)
    layer.bias.data[0] = -1e6  # dead: no weight of it has a gradient
    moments = optimizer.state[layer.weight]["exp_avg"]
    moments[0] = tiny / 100
    model.learn(20, reset_num_timesteps=False)
    # 0.9 of it is rounded: it would not become zero by itself
    assert model._n_updates < 100 and (moments[0] > 0).all() and (moments[0] < tiny / 100).all()
    model.learn(120, reset_num_timesteps=False)
    assert (moments[0] == 0).all()
    assert not any(((s.abs() > 0) & (s.abs() < tiny)).any() for s in optimizer.state[layer.weight].values())


@pytest.mark.parametrize(
    "optimizer_class, optimizer_kwargs", [(th.optim.AdamW, dict(weight_decay=0.1)), (th.optim.SGD, dict(momentum=0.9))]
)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_neither_weight_decay_nor_momentum_moves_a_frozen_encoder(algorithm, optimizer_class, optimizer_kwargs):
    model = make_model(algorithm, freeze_after=None)
    policy_kwargs = {**model.policy_kwargs, "optimizer_class": optimizer_class, "optimizer_kwargs": optimizer_kwargs}
    model = algorithm(
        "CnnPolicy", model.get_env(), policy_kwargs=policy_kwargs, buffer_size=200, learning_starts=10, batch_size=8,
        train_freq=1, freeze_after=30, device="cpu",
    )  # fmt: skip
    model.learn(31)
    frozen = encoder_state(model)
    model.learn(40, reset_num_timesteps=False)
    assert_same(encoder_state(model), frozen)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_convolutions_that_the_user_fixed_are_left_alone(algorithm):
    model = make_model(algorithm, freeze_after=40)
    extractor = model.policy.encoder_networks[0].features_extractor
    extractor.trunk.requires_grad_(False)
    fixed, learning = copy.deepcopy(extractor.trunk.state_dict()), copy.deepcopy(extractor.projection.state_dict())
    model.learn(60)
    assert_same(dict(extractor.trunk.state_dict()), dict(fixed))
    assert not th.equal(extractor.projection.weight, learning["weight"])


class ViewingCNN(BaseFeaturesExtractor):
    """A user's extractor that counts on the usual layout of images, and in training on more than one of them."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, features_dim=8)
        self.cnn = nn.Conv2d(observation_space.shape[0], 8, 4, stride=4)
        self.linear = nn.Sequential(nn.Linear(128, 8), nn.BatchNorm1d(8))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.linear(self.cnn(observations).view(-1, 128))


class Inverted(nn.Module):
    """A user's augmentation that counts on the usual layout of images."""

    def forward(self, images: th.Tensor) -> th.Tensor:
        return (255 - images.view(-1)).view(images.shape)


def three_channels(channels_last: bool) -> type:
    class ThreeChannels(gym.ObservationWrapper):
        def __init__(self, env: gym.Env) -> None:
            super().__init__(env)
            self.observation_space = spaces.Box(0, 255, (16, 16, 3) if channels_last else (3, 16, 16), np.uint8)

        def observation(self, observation: np.ndarray) -> np.ndarray:
            image = observation.repeat(3, axis=0)
            return image.transpose(1, 2, 0) if channels_last else image

    return ThreeChannels


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_extractor_that_takes_views_works_throughout(algorithm):
    env = three_channels(channels_last=False)(make_model(algorithm).get_env().envs[0])
    model = make_model(algorithm, ViewingCNN, env=env, freeze_after=40)
    model.learn(60)
    assert model.encoder_frozen and model.replay_buffer.size() == 60


@pytest.mark.parametrize("algorithm", [SEERDQN, SEERCURL])
def test_an_augmentation_that_takes_views_works_throughout(algorithm):
    env = three_channels(channels_last=True)(make_model(algorithm).get_env().envs[0])
    model = make_model(algorithm, env=env, augmentation=Inverted(), n_augmentations=2, freeze_after=40)
    model.learn(60)
    assert model.encoder_frozen and model.replay_buffer.size() == 60


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_counting_operations_leaves_what_normalisation_layers_know(algorithm):
    model = make_model(algorithm, NormedCNN, freeze_after=None)
    before = copy.deepcopy(model.policy.state_dict())
    model.learn(5)  # no gradient step yet
    assert_same(dict(model.policy.state_dict()), dict(before))


def test_the_best_model_of_an_evaluation_loads(tmp_path):
    callback = EvalCallback(Monitor(LightEnv()), eval_freq=30, best_model_save_path=str(tmp_path), verbose=0)
    model = make_model(SEERQRDQN, freeze_after=20)
    model.learn(70, callback=callback)
    best = SEERQRDQN.load(tmp_path / "best_model", device="cpu")
    assert best.encoder_frozen
    evaluate_policy(best, Monitor(LightEnv()), n_eval_episodes=2)


def test_checkpoints_around_the_freeze_resume(tmp_path):
    """The one of step T_f is written while that step is not stored yet."""
    model = make_model(SEERSAC, freeze_after=40)
    model.learn(60, callback=CheckpointCallback(20, str(tmp_path), save_replay_buffer=True))
    for step in (20, 40, 60):
        loaded = SEERSAC.load(tmp_path / f"rl_model_{step}_steps", env=DialEnv(), device="cpu")
        loaded.load_replay_buffer(tmp_path / f"rl_model_replay_buffer_{step}_steps.pkl")
        assert loaded.encoder_frozen == (step > 40)
        assert loaded.replay_buffer.size() == step - 1
        loaded.learn(30, reset_num_timesteps=False)
        assert loaded.encoder_frozen
        assert loaded.replay_buffer.size() == step + 29


def test_callbacks_that_freeze_may_be_called_by_others():
    model = make_model(SEERQRDQN, freeze_after=15)
    frozen = []

    class Watch(FreezeEncoderCallback):
        def _on_step(self) -> bool:
            super()._on_step()
            frozen.append((self.model.num_timesteps, self.model.encoder_frozen))
            return True

    model.learn(70, callback=EveryNTimesteps(20, Watch(45)))
    assert frozen == [(20, False), (40, False), (60, True)]

    model = make_model(SEERQRDQN, freeze_after=None)
    model.learn(40, callback=EvalCallback(Monitor(LightEnv()), FreezeEncoderCallback(1), eval_freq=20, verbose=0))
    assert model.encoder_frozen


def test_training_that_was_stopped_goes_on():
    model = make_model(SEERQRDQN, freeze_after=25)
    model.learn(200, callback=StopTrainingOnMaxEpisodes(3))
    assert model.num_timesteps == 30
    model.learn(40, reset_num_timesteps=False)
    assert model.num_timesteps == 70
    # The step at which it was stopped is not stored, as in SB3
    assert model.replay_buffer.size() == 69


@pytest.mark.parametrize("freeze_after", [None, 20])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_copy_of_a_model_trains_on(algorithm, freeze_after):
    model = make_model(algorithm, freeze_after=freeze_after)
    model.learn(30)
    model.set_logger(configure(None, []))
    clone = copy.deepcopy(model)
    clone.learn(30, reset_num_timesteps=False)
    if freeze_after is None:
        clone.freeze_encoder()
    assert clone.encoder_frozen
    assert clone.replay_buffer.size() == 60


def test_a_model_loads_with_another_number_of_environments(tmp_path):
    model = make_model(SEERSAC, freeze_after=20)
    model.learn(30)
    model.save(tmp_path / "model")
    env = make_vec_env(DialEnv, n_envs=2)
    loaded = SEERSAC.load(tmp_path / "model", env=env, device="cpu")
    loaded.learn(40)
    assert loaded.replay_buffer.size() == 20
    assert loaded.replay_buffer.buffer_size == model.replay_buffer.buffer_size // 2


def test_images_with_the_channels_last_that_are_not_square():
    class WideEnv(LightEnv):
        def __init__(self) -> None:
            super().__init__()
            self.observation_space = spaces.Box(0, 255, (16, 20, 3), np.uint8)

        def _draw(self, lamp: int) -> np.ndarray:
            return self.np_random.integers(0, 256, (16, 20, 3), dtype=np.uint8)

    model = SEERDQN(
        "CnnPolicy", WideEnv(), buffer_size=100, learning_starts=10, freeze_after=20, device="cpu",
        augmentation="random_shift", n_augmentations=2, policy_kwargs=dict(features_extractor_class=TinyEncoder),
    )  # fmt: skip
    model.learn(40)
    image = WideEnv().reset(seed=0)[0]
    th.testing.assert_close(model.encode(image), model.encode(VecTransposeImage.transpose_image(image)))
    assert model.predict(image, deterministic=True)[0] == model.predict(image[None], deterministic=True)[0][0]


@pytest.mark.parametrize("augmentation", [None, nn.AvgPool2d(3, 1, 1)])
def test_images_that_are_normalised_already(augmentation):
    class FloatEnv(LightEnv):
        def __init__(self) -> None:
            super().__init__()
            self.observation_space = spaces.Box(0, 1, (1, 16, 16), np.float32)

        def _draw(self, lamp: int) -> np.ndarray:
            return self.np_random.random((1, 16, 16), dtype=np.float32)

    model = SEERDQN(
        "CnnPolicy", FloatEnv(), buffer_size=100, learning_starts=10, freeze_after=20, device="cpu",
        augmentation=augmentation, policy_kwargs=dict(features_extractor_class=TinyEncoder, normalize_images=False),
    )  # fmt: skip
    model.learn(40)
    assert model.replay_buffer.nbytes == 100 * 4 * 256
    assert model.encoder_frozen


def test_what_is_saved_is_what_was_given(tmp_path):
    policy_kwargs = dict(features_extractor_class=TinyEncoder, net_arch=[8])
    kwargs: dict[str, Any] = dict(augmentation="random_crop", augmentation_kwargs=dict(size=12), n_steps=3)
    model = SEERDQN("CnnPolicy", LightEnv(), buffer_size=100, policy_kwargs=policy_kwargs, device="cpu", **kwargs)
    assert policy_kwargs == dict(features_extractor_class=TinyEncoder, net_arch=[8])
    model.save(tmp_path / "model")
    loaded = SEERDQN.load(tmp_path / "model", env=LightEnv(), device="cpu", n_steps=5, gamma=0.5)
    assert loaded.replay_buffer.n_steps == 5 and loaded.replay_buffer.gamma == 0.5
    assert loaded.policy.image_space.shape == (1, 12, 12)
    SEERDQN.load(tmp_path / "model", env=LightEnv(), device="cpu", policy_kwargs=policy_kwargs)


def test_a_loaded_buffer_follows_the_model(tmp_path):
    plain = make_model(SEERDQN, freeze_after=None)
    plain.learn(40)
    plain.save_replay_buffer(tmp_path / "images")
    kwargs: dict[str, Any] = dict(augmentation="random_crop", augmentation_kwargs=dict(size=12), n_augmentations=2)
    model = make_model(SEERDQN, freeze_after=30, n_steps=3, latent_dtype="float16", **kwargs)
    model.load_replay_buffer(tmp_path / "images")
    assert model.replay_buffer.sample(4).observations.shape == (4, 1, 12, 12)
    model.learn(40)
    assert model.replay_buffer.plan().number_bytes == 2
    assert model.replay_buffer.encoder.n_augmentations == 2 and model.replay_buffer.n_steps == 3

    model.save_replay_buffer(tmp_path / "latents")
    model.save(tmp_path / "model")
    other = SEERDQN.load(tmp_path / "model", env=LightEnv(), device="cpu", latent_dtype="float32")
    with pytest.raises(ValueError, match=r"`latent_dtype` of .* must be float32, .*got float16"):
        other.load_replay_buffer(tmp_path / "latents")


def test_a_frozen_model_may_go_on_with_another_latent_dtype(tmp_path):
    model = make_model(SEERDQN, freeze_after=20)
    model.learn(40)
    model.save(tmp_path / "model")
    other = SEERDQN.load(tmp_path / "model", env=LightEnv(), device="cpu", latent_dtype="float16")
    other.learn(30)
    sampled = other.replay_buffer.sample(20).observations.values
    assert sampled.abs().max() > 0 and th.equal(sampled, sampled.half().float())
    with pytest.raises(ValueError, match="uint8"):
        SEERDQN.load(tmp_path / "model", env=LightEnv(), device="cpu", latent_dtype="uint8")


def test_an_interrupted_freeze_leaves_a_model_that_learns(monkeypatch):
    model = make_model(SEERDQN, freeze_after=None)
    model.learn(40)
    encode = model.policy.encode

    def interrupt(images: th.Tensor) -> th.Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(model.policy, "encode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.freeze_encoder()
    assert not model.encoder_frozen and not model.policy.encoder_networks[0].encoder_frozen
    assert model.replay_buffer.stage == "images" and model.replay_buffer.size() == 0
    monkeypatch.setattr(model.policy, "encode", encode)
    model.learn(40)
    model.freeze_encoder()
    assert model.replay_buffer.size() == 40


def test_a_compiled_policy_changes_nothing():
    states = []
    for compiled in (False, True):
        model = make_model(SEERSAC, freeze_after=20)
        if compiled:
            model.policy = th.compile(model.policy, backend="eager")
        model.learn(40)
        assert model.encoder_frozen and model.replay_buffer.stage == "latents"
        states.append(dict(model.policy.state_dict()))
    assert_same(*states)


@pytest.mark.parametrize(
    "algorithm, owner, name",
    [
        (SEERDQN, lambda model: model, "q_net"),
        (SEERQRDQN, lambda model: model.policy, "quantile_net"),
        (SEERTD3, lambda model: model, "actor"),
        (SEERSAC, lambda model: model.policy, "critic"),
    ],
)
def test_networks_are_compiled_in_place(algorithm, owner, name):
    """A network that torch.compile() returns hides which of its parameters are frozen."""
    states = []
    for compiled in (False, True):
        model = make_model(algorithm, freeze_after=20)
        if compiled:
            getattr(owner(model), name).compile(backend="eager")
        model.learn(40)
        states.append(dict(model.policy.state_dict()))
    assert_same(*states)
    setattr(owner(model), name, th.compile(getattr(owner(model), name), backend="eager"))
    with pytest.raises(ValueError, match=f"`{name}` must not be the result of torch.compile"):
        model.learn(10)


class InPlace(BaseFeaturesExtractor):
    """Changes the images that it is given, which SB3 allows."""

    def __init__(self, observation_space, in_place=True):
        super().__init__(observation_space, 8)
        self.in_place, self.net = in_place, nn.Sequential(nn.Flatten(), nn.Linear(256, 8))

    def forward(self, images):
        return self.net(images.mul_(2).sub_(1) if self.in_place else images * 2 - 1)


@pytest.mark.parametrize("algorithm, tied", [(SEERSAC, True), (SEERTQC, True), (SEERTD3, False)])
def test_an_extractor_may_work_in_place(algorithm, tied):
    states = []
    for in_place in (False, True):
        policy_kwargs = dict(features_extractor_kwargs=dict(in_place=in_place), tie_convolutions=tied)
        model = make_model(algorithm, InPlace, freeze_after=30, policy_kwargs=policy_kwargs)
        model.learn(50)
        states.append(dict(model.policy.state_dict(), latents=model.encode(model._last_obs)))
    assert_same(*states)


class InPlaceLayers(SplitExtractor):
    """Its projection and its head begin with a layer that changes what it is given."""

    def __init__(self, observation_space, inplace):
        super().__init__(observation_space, 8)
        self.trunk = nn.Sequential(nn.Conv2d(observation_space.shape[0], 4, 4, stride=4), nn.Flatten())
        self.projection = nn.Sequential(nn.LeakyReLU(inplace=inplace), nn.Linear(64, 8))
        self.head = nn.Sequential(nn.LeakyReLU(inplace=inplace), nn.Linear(8, 8))


@pytest.mark.parametrize("algorithm, freeze_after", [*((each, 30) for each in ALGORITHMS), (SEERSAC, 0), (SEERSAC, None)])
@pytest.mark.filterwarnings("ignore:The encoder is frozen at step 0")
def test_projection_and_head_may_work_in_place(algorithm, freeze_after):
    states = []
    for inplace in (False, True):
        policy_kwargs = dict(features_extractor_kwargs=dict(inplace=inplace))
        model = make_model(algorithm, InPlaceLayers, freeze_after=freeze_after, policy_kwargs=policy_kwargs).learn(45)
        states.append(dict(model.policy.state_dict(), latents=model.encode(model._last_obs)))
        if freeze_after is not None:
            buffer = model.replay_buffer
            states[-1]["stored"] = buffer.decode(buffer.store.latents(buffer.slots_of(np.arange(40)), *np.zeros((2, 40), int)))
    assert_same(*states)


class Noted(nn.Linear):
    def get_extra_state(self):
        return {"note": 1}

    def set_extra_state(self, state):
        assert state == {"note": 1}


class HalfPrecision(BaseFeaturesExtractor):
    def __init__(self, observation_space):
        super().__init__(observation_space, 8)
        self.net = nn.Sequential(nn.Flatten(), Noted(256, 8, dtype=th.bfloat16))

    def forward(self, images):
        return self.net(images.bfloat16()).float()


def test_weights_in_bfloat16_and_extra_state_are_frozen_saved_and_loaded(tmp_path):
    model = make_model(SEERDQN, HalfPrecision, freeze_after=30).learn(40)
    fingerprint = model.replay_buffer.encoder_fingerprint
    assert model.replay_buffer.size() == 40 and fingerprint == model.policy.encoder_fingerprint()
    model.save(tmp_path / "model")
    loaded = SEERDQN.load(tmp_path / "model", device="cpu")
    assert loaded.policy.encoder_fingerprint() == fingerprint
    with th.no_grad():
        loaded.policy.q_net.features_extractor.net[1].weight[0, 0] += 1
    assert loaded.policy.encoder_fingerprint() != fingerprint

    model = make_model(SEERDQN, HalfPrecision, pretrained_encoder=tmp_path / "model", freeze_after="auto", buffer_size=300)
    assert model.policy.encoder_fingerprint() == fingerprint
    assert model.learn(600).encoder_frozen


def test_a_copied_model_can_be_frozen():
    model = make_model(SEERDQN, freeze_after=None).learn(40)
    copied = copy.deepcopy(model)
    copied.freeze_encoder()
    assert copied.encoder_frozen and copied.replay_buffer.stage == "latents" and not model.encoder_frozen


def test_parameters_can_be_set_without_a_replay_buffer():
    model = make_model(SEERDQN, freeze_after=30).learn(40)
    parameters = model.get_parameters()
    del model.replay_buffer
    model.set_parameters(parameters)


def test_what_was_encoded_before_is_not_traced_and_has_no_gradient():
    model = make_model(SEERTD3, freeze_after=30, policy_kwargs=dict(tie_convolutions=False)).learn(40)
    last = th.as_tensor(model._last_obs)
    other = 255 - last
    traced = th.jit.trace(model.policy, last)
    th.testing.assert_close(traced(other), model.policy(other))
    images = last.float().requires_grad_()
    model.policy(images).sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0


def test_the_learning_rate_and_a_fixed_entropy_coefficient_can_be_set_later():
    model = make_model(SEERSAC, freeze_after=None).learn(20)
    model.lr_schedule = lambda _: 1e-5
    model.learn(20)
    assert model.ent_coef_optimizer.param_groups[0]["lr"] == 1e-5
    model.ent_coef_optimizer, model.ent_coef_tensor = None, th.tensor(0.123)
    model.learn(20)
    assert model.logger.name_to_value["train/ent_coef"] == pytest.approx(0.123)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.filterwarnings("ignore:The encoder is frozen at step")
def test_a_loop_of_ones_own(algorithm):
    model = make_model(algorithm, freeze_after=20)
    _, callback = model._setup_learn(100)
    for _ in range(40):
        model.collect_rollouts(model.env, callback, model.train_freq, model.replay_buffer, learning_starts=10)
    model.train(4, batch_size=8)
    assert model.encoder_frozen and model._n_updates == 4


def test_a_buffer_that_was_put_in_place_of_the_models():
    model, other = (make_model(SEERDQN, freeze_after=freeze_after) for freeze_after in (20, None))
    for each in (model, other):
        each.learn(30)
    model.replay_buffer = other.replay_buffer
    model.learn(10, reset_num_timesteps=False)
    assert model.replay_buffer.stage == "latents" and model.replay_buffer.size() == 40
    model.replay_buffer = ReplayBuffer(100, model.observation_space, model.action_space, device="cpu")
    with pytest.raises(ValueError, match=r"must be a LatentReplayBuffer, got ReplayBuffer. load_replay_buffer\(\)"):
        model.learn(10)


def test_a_vec_env_that_does_not_know_wrappers():
    class Foreign(VecEnvWrapper):
        def reset(self) -> Any:
            return self.venv.reset()

        def step_wait(self) -> Any:
            return self.venv.step_wait()

        def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> Any:
            return self.answer() if wrapper_class is FrameStackObservation else [False] * self.num_envs

    for answer in (lambda: None, lambda: False, lambda: object().env_is_wrapped):
        env = Foreign(DummyVecEnv([LightEnv]))
        env.answer = answer
        model = make_model(SEERDQN, env=env, freeze_after=20)
        model.learn(30)
        assert model.n_stack == 1 and model.encoder_frozen

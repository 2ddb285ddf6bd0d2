"""An algorithm of a user becomes a SEER one by two mixins, whatever its networks and its updates."""

import copy
import runpy
from pathlib import Path
from typing import Any

import pytest
import rl_zoo3.exp_manager
import rl_zoo3.train
import torch as th
from stable_baselines3 import DQN, SAC
from stable_baselines3.common.policies import BaseModel
from stable_baselines3.dqn.policies import CnnPolicy as DQNCnnPolicy
from stable_baselines3.sac.policies import CnnPolicy as SACCnnPolicy
from torch import nn
from torch.nn import functional as F

import zoo_integration
from sb3_seer.common.actor_critic import SEERActorCriticPolicy
from sb3_seer.common.flops import find_passes
from sb3_seer.common.policies import SEERPolicy
from sb3_seer.common.seer import SEERMixin
from sb3_seer.common.type_aliases import Latents
from tests.helpers import DialEnv, LightEnv, TinyEncoder, assert_same, check_latents_stand_for_images, encoder_state, train_on

EXAMPLE = Path(__file__).parent.parent / "examples" / "own_algorithm.py"

# ---- a variant of DQN ----


class Sarsa(DQN):
    """Learns the value of the policy that acts at random."""

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        for _ in range(gradient_steps):
            batch: Any = self.replay_buffer.sample(batch_size)
            with th.no_grad():
                next_values = self.q_net_target(batch.next_observations).mean(dim=1, keepdim=True)
            values = self.q_net(batch.observations).gather(1, batch.actions.long())
            loss = F.mse_loss(values, batch.rewards + (1 - batch.dones) * self.gamma * next_values)
            self.policy.optimizer.zero_grad()
            loss.backward()
            self.policy.optimizer.step()
        self._n_updates += gradient_steps


class SarsaPolicy(SEERPolicy, DQNCnnPolicy):
    pass


class SEERSarsa(SEERMixin, Sarsa):
    policy_aliases = {"CnnPolicy": SarsaPolicy}  # noqa: RUF012


# ---- a variant of SAC with a critic of its own ----


class BilinearCritic(BaseModel):
    """Two values, each bilinear in features and actions."""

    def __init__(self, features_dim: int, **kwargs: Any) -> None:
        names = ("observation_space", "action_space", "features_extractor", "normalize_images")
        super().__init__(**{name: kwargs[name] for name in names})
        self.values = nn.ModuleList(nn.Bilinear(features_dim, self.action_space.shape[0], 1) for _ in range(2))

    def forward(self, obs: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, ...]:
        features = self.extract_features(obs, self.features_extractor)
        return tuple(value(features, actions) for value in self.values)


class BilinearPolicy(SACCnnPolicy):
    def make_critic(self, features_extractor: Any = None) -> Any:
        return BilinearCritic(**self._update_features_extractor(self.critic_kwargs, features_extractor)).to(self.device)


class SEERBilinearPolicy(SEERActorCriticPolicy, BilinearPolicy):
    pass


class SEERBilinearSAC(SEERMixin, SAC):
    policy_aliases = {"CnnPolicy": SEERBilinearPolicy}  # noqa: RUF012


class InverseModel(BaseModel):
    """Which action was taken between two observations."""

    def forward(self, obs: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
        raise AssertionError


class CuriousPolicy(SEERPolicy, DQNCnnPolicy):
    def _build(self, lr_schedule: Any) -> None:
        extractor = self.make_features_extractor()
        self.inverse_model = InverseModel(self.observation_space, self.action_space, features_extractor=extractor)
        super()._build(lr_schedule)


class SEERCuriousDQN(SEERMixin, DQN):
    policy_aliases = {"CnnPolicy": CuriousPolicy}  # noqa: RUF012


def test_a_target_has_the_latents_of_its_network() -> None:
    """Whatever other networks there are, the operations of which are not counted if they take something else."""
    with pytest.warns(UserWarning, match="Operations of inverse_model are not counted: .*next_obs"):
        model = make_model(SEERCuriousDQN, freeze_after=30).learn(40)
    latents = Latents(model.encode(model._last_obs).unbind(dim=1))
    observations = th.as_tensor(model._last_obs)
    for network in (model.q_net, model.q_net_target):
        assert network.latent_index == 1
        th.testing.assert_close(network(latents), network(observations))


@pytest.fixture(params=["example", "sarsa", "bilinear"])
def algorithm(request: pytest.FixtureRequest) -> Any:
    if request.param == "example":
        return runpy.run_path(str(EXAMPLE))["MySEERDDPG"]
    return dict(sarsa=SEERSarsa, bilinear=SEERBilinearSAC)[request.param]


def make_model(algorithm: Any, **kwargs: Any) -> Any:
    settings: dict[str, Any] = dict(buffer_size=200, learning_starts=10, batch_size=8, train_freq=1, seed=0, device="cpu")
    policy_kwargs = dict(features_extractor_class=TinyEncoder, net_arch=[16])
    env = LightEnv() if issubclass(algorithm, DQN) else DialEnv()
    policy = kwargs.pop("policy", "CnnPolicy")
    return algorithm(policy, env, policy_kwargs=policy_kwargs, **{**settings, **kwargs})


def test_it_learns_through_the_freeze_and_resumes(algorithm, tmp_path):
    model = make_model(algorithm, freeze_after=None).learn(40)
    before = encoder_state(model)
    model.learn(20, reset_num_timesteps=False)
    assert not any(th.equal(value, before[name]) for name, value in encoder_state(model).items() if "target" not in name)
    model.freeze_encoder()
    frozen, heads = encoder_state(model), copy.deepcopy(model.policy.state_dict())
    model.learn(20, reset_num_timesteps=False)
    assert_same(encoder_state(model), frozen)
    assert model.replay_buffer.stage == "latents" and model.replay_buffer.size() == 80
    assert any(not th.equal(value, heads[name]) for name, value in model.policy.state_dict().items())

    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = algorithm.load(tmp_path / "model", env=model.get_env(), device="cpu")
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert_same(train_on(loaded), train_on(model))


def test_latents_stand_for_images(algorithm):
    check_latents_stand_for_images(lambda: make_model(algorithm, freeze_after=None).learn(40))


def test_operations_are_counted_where_they_are_known(algorithm):
    """A variant of DQN or SAC has their passes; another one is trained without the count."""
    assert (find_passes(make_model(algorithm)) is None) == (algorithm.__name__ == "MySEERDDPG")


class TwoNetworks(DQNCnnPolicy):
    """Clipped double Q-learning has a second network, with a target of its own."""

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.second, self.second_target = self.make_q_net(), self.make_q_net()
        self.second_target.load_state_dict(self.second.state_dict())


class SEERTwoNetworks(SEERPolicy, TwoNetworks):
    pass


def test_each_network_has_its_own_latent():
    model = make_model(SEERSarsa, policy=SEERTwoNetworks, freeze_after=None).learn(5)
    images = th.randint(0, 256, (3, 1, 16, 16), dtype=th.uint8)
    policy = model.policy
    assert policy.encoder_networks == [policy.q_net, policy.second]
    model.freeze_encoder()
    latents = Latents(policy.encode(images).unbind(dim=1))
    for network in (policy.q_net, policy.second, policy.q_net_target, policy.second_target):
        th.testing.assert_close(network(latents), network(images), rtol=1e-5, atol=1e-6)
    assert not th.equal(*latents.by_network)


def test_an_actor_critic_policy_with_other_networks_is_refused():
    class TwoCritics(SACCnnPolicy):
        def _build(self, lr_schedule: Any) -> None:
            super()._build(lr_schedule)
            self.second_critic = self.make_critic()

    class SEERTwoCritics(SEERActorCriticPolicy, TwoCritics):
        pass

    with pytest.raises(ValueError, match="must be actor, critic and their targets, got second_critic"):
        make_model(SEERBilinearSAC, policy=SEERTwoCritics)


def test_rl_zoo_trains_it(forget_registrations, tmp_path, monkeypatch, capsys):
    zoo_integration.register_algorithm("sarsa_seer", SEERSarsa, base="dqn")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yml").write_text("Lamps-v0: {policy: CnnPolicy, n_timesteps: 40, buffer_size: 50, learning_starts: 10}")
    import gymnasium as gym

    gym.register("Lamps-v0", LightEnv, kwargs=dict(size=48))
    try:
        arguments = "train --algo sarsa_seer --env Lamps-v0 -conf mine.yml --eval-freq -1 --seed 1 -params batch_size:4"
        monkeypatch.setattr("sys.argv", arguments.split())
        rl_zoo3.train.train()
    finally:
        del gym.registry["Lamps-v0"]
    assert SEERSarsa.load("logs/sarsa_seer/Lamps-v0_1/Lamps-v0.zip").encoder_frozen


def test_an_unknown_base_is_answered_with_the_list(forget_registrations):
    with pytest.raises(ValueError, match=r"`base` must be one of .*td3.*, got 'td4'"):
        zoo_integration.register_algorithm("mine", SEERSarsa, base="td4")

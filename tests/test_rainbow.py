"""Rainbow, part by part, each against an oracle. SEERRainbow's share in the claims of SEER is in ``test_invariants.py``."""

import copy
import math
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3.common.save_util
import torch as th
import yaml
from gymnasium import spaces
from stable_baselines3 import DQN
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.save_util import save_to_pkl
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack

from sb3_seer import SEERDQN, SEERQRDQN, LatentReplayBuffer, PrioritizedReplayBuffer, Rainbow, SEERRainbow
from sb3_seer.rainbow.categorical import categorical_projection
from sb3_seer.rainbow.noisy import NoisyLinear, reset_noise
from sb3_seer.rainbow.policies import CnnPolicy, RainbowPolicy
from tests.helpers import LightEnv, TinyEncoder, assert_same
from zoo_integration.registration import default_config

ALL_OFF = dict(dueling=False, noisy=False, n_atoms=1)


class FlatLightEnv(LightEnv):
    """The lamps as a vector, one number each."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_space = spaces.Box(0, 1, (4,), np.float32)

    def _draw(self, lamp: int) -> np.ndarray:
        return np.eye(4, dtype=np.float32)[lamp]


class DictLightEnv(LightEnv):
    """The image in a ``Dict``."""

    def __init__(self) -> None:
        super().__init__(size=36)
        self.observation_space = spaces.Dict(image=self.observation_space)

    def _draw(self, lamp: int) -> Any:
        return dict(image=np.full((1, 36, 36), 50 * lamp, dtype=np.uint8))


def make_rainbow(algorithm: type = Rainbow, policy: str = "CnnPolicy", env: Any = None, **kwargs: Any):
    network = dict(net_arch=[16], **kwargs.pop("policy_kwargs", {}))
    if policy == "CnnPolicy":
        network["features_extractor_class"] = TinyEncoder
    env = env or (LightEnv() if policy == "CnnPolicy" else FlatLightEnv())
    defaults: dict[str, Any] = dict(
        buffer_size=100, learning_starts=10, batch_size=8, train_freq=1, target_update_interval=7, seed=0, device="cpu"
    )
    return algorithm(policy, env, policy_kwargs=network, **{**defaults, **kwargs})


# ---- value distributions ----


def project_by_hand(probabilities: np.ndarray, values: np.ndarray, support: np.ndarray) -> np.ndarray:
    """The loop of Bellemare et al., Algorithm 1."""
    projected = np.zeros((len(values), len(support)))
    for row in range(len(values)):
        for probability, value in zip(probabilities[row], values[row], strict=True):
            value = min(max(value, support[0]), support[-1])
            for atom in range(len(support) - 1):
                left, right = support[atom], support[atom + 1]
                if left <= value < right:
                    projected[row, atom] += probability * (right - value) / (right - left)
                    projected[row, atom + 1] += probability * (value - left) / (right - left)
            if value == support[-1]:
                projected[row, -1] += probability
    return projected


@pytest.mark.parametrize("v_min, v_max, n_atoms", [(-10, 10, 51), (-1, 3, 5), (0, 1, 2)])
def test_projection_is_that_of_the_loop(v_min, v_max, n_atoms):
    rng = np.random.default_rng(0)
    support = th.linspace(v_min, v_max, n_atoms)
    spacing = (v_max - v_min) / (n_atoms - 1)
    # Windows of 1 to 20 steps, one that terminates, rewards within and beyond the support, shifts of whole atoms
    rewards = th.tensor([0.0, 0.3, -0.7, 5 * v_max + 1.0, 5 * v_min - 1.0, spacing, -2 * spacing, 0.5 * spacing, 0.9, 0.9])
    dones = th.tensor([0.0, 0, 0, 0, 0, 0, 0, 0, 1, 0])
    discounts = th.tensor([1.0, 0.99, 0.99**20, 0.99, 0.99, 1.0, 1.0, 1.0, 0.99, 0.5])
    values = rewards[:, None] + ((1 - dones) * discounts)[:, None] * support
    probabilities = th.as_tensor(rng.dirichlet(np.ones(n_atoms), len(rewards)), dtype=th.float32)

    projected = categorical_projection(probabilities, values, support)
    expected = project_by_hand(*(x.double().numpy() for x in (probabilities, values, support)))
    np.testing.assert_allclose(projected.numpy(), expected, atol=2e-6)
    np.testing.assert_allclose(projected.sum(dim=1).numpy(), np.ones(len(rewards)), atol=1e-5)
    # What is on the atoms already stays there, what ends has the distribution of its reward, what is beyond is at the end
    th.testing.assert_close(projected[0], probabilities[0], atol=2e-6, rtol=0)
    if v_min < 0.9 < v_max:
        assert (projected[8] > 1e-6).sum() <= 2 and (projected[8] @ support).item() == pytest.approx(0.9, abs=1e-5)
    assert projected[3, -1].item() == pytest.approx(1) and projected[4, 0].item() == pytest.approx(1)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"`probabilities` and `values`.*\(2, 3\) and \(2, 1\)"):
        categorical_projection(th.ones(2, 3), th.ones(2, 1), th.linspace(0, 1, 3))
    with pytest.raises(ValueError, match=r"`support`.*got \(1,\)"):
        categorical_projection(th.ones(2, 3), th.ones(2, 3), th.ones(1))


# ---- noisy layers ----


def test_noisy_layer_starts_as_the_papers_do():
    layer = NoisyLinear(400, 100, sigma0=0.4)
    assert layer.weight.abs().max() <= 1 / 20 and layer.weight.std().item() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.05)
    th.testing.assert_close(layer.weight_sigma.detach(), th.full((100, 400), 0.4 / 20))
    th.testing.assert_close(layer.bias_sigma.detach(), th.full((100,), 0.4 / 10))
    assert set(layer.state_dict()) == {"weight", "bias", "weight_sigma", "bias_sigma"}


def test_noise_has_the_mean_and_the_variance_of_the_formula():
    layer = NoisyLinear(3, 2)
    with th.no_grad():
        layer.weight_sigma.copy_(th.tensor([[0.5, 1.0, 2.0], [0.1, 0.0, 0.3]]))
        layer.bias_sigma.copy_(th.tensor([0.7, 1.5]))
    x = th.tensor([[1.0, -2.0, 0.5]])
    outputs = []
    for _ in range(20_000):
        reset_noise([layer])
        outputs.append(layer(x).detach()[0])
    outputs = th.stack(outputs)
    # f(e) has mean 0 and variance E|e| = sqrt(2 / pi), a product of two of them the square of that
    variance = math.sqrt(2 / math.pi)
    expected = variance**2 * (layer.weight_sigma**2 @ x[0] ** 2) + variance * layer.bias_sigma**2
    th.testing.assert_close(outputs.var(dim=0), expected.detach(), rtol=0.05, atol=0)
    standard_error = (expected / len(outputs)).sqrt()
    mean = x[0] @ layer.weight.T + layer.bias
    assert ((outputs.mean(dim=0) - mean).abs() < 4 * standard_error).all()


def test_noise_is_factorised_and_shared_by_a_batch_until_it_is_redrawn():
    layer = NoisyLinear(5, 4)
    x = th.randn(6, 5)
    weight = layer.weight + layer.weight_sigma * layer.weight_noise
    th.testing.assert_close(layer(x), x @ weight.T + layer.bias + layer.bias_sigma * layer.bias_noise)
    th.testing.assert_close(layer(x), th.cat([layer(row[None]) for row in x]))
    # Each row of the weights' noise is the bias's times the same factors
    factors = layer.weight_noise / layer.bias_noise[:, None]
    th.testing.assert_close(factors, factors[:1].expand(4, 5))
    before, output = layer.weight_noise.clone(), layer(x)
    reset_noise([layer])
    assert not (layer.weight_noise == before).any() and not (layer(x) == output).any()
    layer.noise_enabled = False
    th.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias)


def test_noise_is_in_the_head_only_and_drawn_before_each_action_and_each_update():
    model = make_rainbow(gradient_steps=2)
    assert not any(isinstance(module, NoisyLinear) for module in model.q_net.features_extractor.modules())
    drawn: dict[str, list[th.Tensor]] = dict(q_net=[], q_net_target=[])
    for name, noises in drawn.items():
        network = getattr(model, name)

        def count(network=network, noises=noises, reset=network.reset_noise) -> None:
            reset()
            noises.append(network.value_net[0].bias_noise.clone())

        network.reset_noise = count
    model.learn(30)
    # 20 steps that are not random, and 20 times 2 updates
    assert len(drawn["q_net"]) == 20 + 40 and len(drawn["q_net_target"]) == 40
    everything = th.stack([*drawn["q_net"], *drawn["q_net_target"]])
    assert len(th.unique(everything, dim=0)) == 100

    for noises in drawn.values():
        noises.clear()
    observation = model.observation_space.sample()
    model.predict(observation, deterministic=True)
    assert not drawn["q_net"]


def test_noise_explores_in_training_and_is_off_in_evaluation():
    model = make_rainbow(policy_kwargs=dict(sigma0=5.0)).learn(20)
    assert model.exploration_rate == 0.0
    observations = np.stack([model.observation_space.sample() for _ in range(20)])

    def actions(deterministic: bool) -> set[bytes]:
        return {model.predict(observations, deterministic=deterministic)[0].tobytes() for _ in range(20)}

    assert len(actions(deterministic=True)) == 1 and len(actions(deterministic=False)) > 10
    with model.q_net.without_noise():
        q_values = model.q_net(th.as_tensor(observations))
    np.testing.assert_array_equal(model.predict(observations, deterministic=True)[0], q_values.argmax(dim=1).numpy())
    # The noise is back after that, also in what the target network computes in training
    assert all(layer.noise_enabled for network in (model.q_net, model.q_net_target) for layer in network._noisy_layers())


def test_without_noise_exploration_is_epsilon_greedy():
    model = make_rainbow(policy_kwargs=dict(noisy=False), exploration_fraction=0.5, exploration_final_eps=0.2)
    model.learn(20)
    assert model.exploration_rate == pytest.approx(0.2)
    model.exploration_rate = 0.0
    observation = model.observation_space.sample()
    assert len({int(model.predict(observation)[0]) for _ in range(20)}) == 1


# ---- dueling networks and the losses ----


@pytest.mark.parametrize("n_atoms", [1, 5])
def test_dueling_adds_the_value_to_the_advantages_less_their_mean(n_atoms):
    network = make_rainbow(policy_kwargs=dict(n_atoms=n_atoms)).q_net
    features = th.randn(3, network.features_dim)
    value, advantages = network.value_net(features), network.advantage_net(features)
    logits = network.logits(features)
    assert logits.shape == (3, 4, n_atoms)
    for row in range(3):
        for atom in range(n_atoms):
            of_actions = [advantages[row, action * n_atoms + atom].item() for action in range(4)]
            for action in range(4):
                expected = value[row, atom].item() + of_actions[action] - sum(of_actions) / 4
                assert logits[row, action, atom].item() == pytest.approx(expected, abs=1e-5)


def test_q_values_are_the_means_of_the_distributions():
    network = make_rainbow(policy_kwargs=dict(n_atoms=3, v_min=-1.0, v_max=2.0)).q_net
    probabilities = th.tensor([[[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]]])
    th.testing.assert_close(network.q_values(probabilities.log()), th.tensor([[-0.2 + 0.3 * 0.5 + 1.0, -1.0]]))


def losses_by_hand(model, batch) -> list[th.Tensor]:
    """Of each transition on its own, with the noise that the networks have."""
    losses, online, target = [], model.q_net, model.q_net_target

    def distributions(network, observation) -> tuple[th.Tensor, th.Tensor]:
        logits = network.logits(network.extract_features(observation, network.features_extractor))[0]
        if network.n_atoms == 1:
            return logits, logits[:, 0]
        return logits, (logits.softmax(dim=1) * th.linspace(-10, 10, network.n_atoms)).sum(dim=1)

    for i in range(len(batch.rewards)):
        next_observation = batch.next_observations[i : i + 1]
        logits, _ = distributions(online, batch.observations[i : i + 1])
        next_logits, next_q_values = distributions(target, next_observation)
        if model.double_q:
            _, next_q_values = distributions(online, next_observation)
        prediction, next_logits = logits[int(batch.actions[i])], next_logits[int(next_q_values.argmax())].detach()
        reward, discount = batch.rewards[i, 0], (1 - batch.dones[i, 0]) * batch.discounts[i, 0]
        if online.n_atoms == 1:
            delta = (reward + discount * next_logits - prediction)[0]
            losses.append(th.where(delta.abs() < 1, delta**2 / 2, delta.abs() - 0.5))
            continue
        support = np.linspace(-10, 10, online.n_atoms)
        values = reward.item() + discount.item() * support
        projected = project_by_hand(next_logits.softmax(dim=0)[None].numpy(), values[None], support)[0]
        losses.append(-(th.as_tensor(projected, dtype=th.float32) * prediction.log_softmax(dim=0)).sum())
    return losses


@pytest.mark.parametrize("double_q", [True, False])
@pytest.mark.parametrize("network", [{}, dict(noisy=False), dict(dueling=False), dict(n_atoms=1), ALL_OFF], ids=str)
def test_losses_and_gradients_are_those_of_single_transitions(network, double_q):
    model = make_rainbow(double_q=double_q, policy_kwargs=network)
    model.learn(60)
    batch = model.replay_buffer.sample(16)
    batch = batch._replace(rewards=th.linspace(-3, 3, 16)[:, None], dones=th.arange(16)[:, None] % 4 // 3)
    # Networks that disagree on the best action, and noise that stays for the oracle
    with th.no_grad():
        for parameter in [*model.q_net.parameters(), *model.q_net_target.parameters()]:
            parameter.add_(0.2 * th.randn_like(parameter))
    for net in (model.q_net, model.q_net_target):
        net.reset_noise()
        net.reset_noise = lambda: None
    greedy = [net(batch.next_observations).argmax(dim=1) for net in (model.q_net, model.q_net_target)]
    assert (greedy[0] != greedy[1]).any()

    parameters = list(model.q_net.parameters())
    expected = th.stack(losses_by_hand(model, batch))
    expected_gradients = th.autograd.grad(expected.sum(), parameters)
    losses, errors = model._losses(batch)
    th.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    if model.q_net.n_atoms > 1:
        assert losses is errors
    else:  # where the Huber loss is linear, and where it is not
        th.testing.assert_close(errors.detach(), th.where(losses > 0.5, losses + 0.5, (2 * losses).sqrt()).detach())
    model.policy.zero_grad()
    losses.sum().backward()
    for parameter, gradient in zip(parameters, expected_gradients, strict=True):
        th.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4)
    assert all(parameter.grad is None for parameter in model.q_net_target.parameters())


@pytest.mark.parametrize("policy", ["CnnPolicy", "MlpPolicy"])
@pytest.mark.parametrize("n_steps", [1, 3])
def test_with_everything_off_it_is_dqn(n_steps, policy):
    def train(algorithm, network, **kwargs):
        env = make_vec_env(LightEnv if policy == "CnnPolicy" else FlatLightEnv, n_envs=2, seed=3)
        # Small enough to wrap around, gradients that are clipped, and a target that moves slowly
        kwargs.update(buffer_size=60, train_freq=2, gradient_steps=2, tau=0.3, max_grad_norm=0.05, n_steps=n_steps)
        model = make_rainbow(algorithm, policy, env, policy_kwargs=network, **kwargs)
        return model.learn(150)

    ours, theirs = train(Rainbow, ALL_OFF, double_q=False), train(DQN, {})
    our_weights, their_weights = ours.policy.state_dict(), theirs.policy.state_dict()
    assert our_weights.keys() == their_weights.keys()
    for name, value in our_weights.items():
        th.testing.assert_close(value, their_weights[name], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(ours.replay_buffer.actions, theirs.replay_buffer.actions)
    logs = dict(ours.logger.name_to_value), dict(theirs.logger.name_to_value)
    for log in logs:
        log.pop("time/fps", None)
    assert logs[0] == pytest.approx(logs[1], rel=1e-3) and "train/loss" in logs[0]


def test_the_defaults_have_all_parts_but_priorities():
    model = Rainbow("MlpPolicy", FlatLightEnv(), device="cpu", buffer_size=10)
    assert model.double_q and model.n_steps == 3 and not model.prioritized_replay
    network = model.q_net
    assert (network.dueling, network.noisy, network.sigma0) == (True, True, 0.5)
    assert (network.n_atoms, network.v_min, network.v_max) == (51, -10, 10)
    assert isinstance(model.replay_buffer, NStepReplayBuffer) and model.replay_buffer.n_steps == 3


# ---- replay buffers ----


def fill(buffer: ReplayBuffer, n_rows: int) -> None:
    """Transitions that name themselves, of two envs, with terminations, truncations and windows without either."""
    rng = np.random.default_rng(0)
    for row in range(n_rows):
        done = rng.random(2) < 0.2
        # Some wrappers tell a time limit without a done
        infos = [{"TimeLimit.truncated": bool(rng.random() < (0.5 if end else 0.1))} for end in done]
        obs = np.array([[row, 0.0], [row, 1.0]], dtype=np.float32)
        buffer.add(obs, obs + 0.5, np.array([row % 4, 1]), rng.normal(size=2), done, infos)


BUFFER_SPACES = dict(observation_space=spaces.Box(-1e6, 1e6, (2,), np.float32), action_space=spaces.Discrete(4))


@pytest.mark.parametrize("n_rows", [17, 20, 33])
@pytest.mark.parametrize("n_steps", [1, 3, 25])
def test_prioritised_windows_are_those_of_sb3s_buffer(n_steps, n_rows, monkeypatch):
    kwargs: dict[str, Any] = dict(buffer_size=40, device="cpu", n_envs=2, n_steps=n_steps, gamma=0.9, **BUFFER_SPACES)
    ours, theirs = PrioritizedReplayBuffer(**kwargs), NStepReplayBuffer(**kwargs)
    fill(ours, n_rows)
    fill(theirs, n_rows)
    samples = ours.sample(200)
    rows, envs = samples.indices // 2, samples.indices % 2
    assert set(samples.indices) == set(range(2 * min(n_rows, 20)))
    # SB3's buffer draws the envs itself
    monkeypatch.setattr(np.random, "randint", lambda *args, **kwargs: envs)
    expected = theirs._get_samples(rows)
    compared = set(expected._fields)
    if n_steps == 1:  # as in SB3's ReplayBuffer, gamma is the algorithm's
        assert samples.discounts is None
        compared -= {"discounts"}
    for name in compared:
        th.testing.assert_close(getattr(samples, name), getattr(expected, name), msg=lambda text, name=name: f"{name}: {text}")


def test_memory_usage_cannot_be_optimised_by_position_either():
    with pytest.raises(ValueError, match="`optimize_memory_usage` must be False, got True"):
        PrioritizedReplayBuffer(10, *BUFFER_SPACES.values(), "cpu", 1, True, False)


def test_prioritised_sampling_and_weights():
    buffer = PrioritizedReplayBuffer(8, device="cpu", n_envs=2, alpha=0.5, beta=0.4, final_beta=0.8, **BUFFER_SPACES)
    fill(buffer, 3)
    buffer.update_priorities(np.arange(6), np.array([1.0, 4.0, 9.0, 16.0, 0.0, 0.0]))
    np.random.seed(0)
    buffer.priorities.progress_remaining = 0.5
    samples = buffer.sample(10_000)
    # The square roots of the errors; errors of 0 are not sampled, but for epsilon
    counts = np.bincount(samples.indices, minlength=8)
    np.testing.assert_allclose(counts[:4], [1000, 2000, 3000, 4000], atol=15)
    weights = {index: weight.item() for index, weight in zip(samples.indices, samples.weights[:, 0], strict=True)}
    smallest = min(index_priority for index_priority in np.sqrt([1.0, 4.0, 9.0, 16.0, 1e-6, 1e-6])[list(weights)])
    for index, weight in weights.items():
        priority = np.sqrt([1.0, 4.0, 9.0, 16.0, 1e-6, 1e-6])[index]
        assert weight == pytest.approx((smallest / priority) ** 0.6, rel=1e-4)
    # What is new has the largest priority so far, where the ring has wrapped too
    fill(buffer, 2)
    np.testing.assert_allclose(buffer.priorities.values, [4, 4, 3, 4, 0.001, 0.001, 4, 4], rtol=1e-3)
    buffer.reset()
    assert buffer.size() == 0 and not buffer.priorities.values.any()


@pytest.mark.parametrize(
    "algorithm, policy, buffer_class, given",
    [
        (Rainbow, "MlpPolicy", PrioritizedReplayBuffer, None),
        (Rainbow, "CnnPolicy", PrioritizedReplayBuffer, None),
        (Rainbow, "CnnPolicy", LatentReplayBuffer, LatentReplayBuffer),
        (SEERRainbow, "CnnPolicy", LatentReplayBuffer, None),
    ],
)
def test_prioritized_replay_uses_the_weights_and_sets_the_priorities(algorithm, policy, buffer_class, given):
    model = make_rainbow(
        algorithm, policy, prioritized_replay=True, replay_buffer_class=given, policy_kwargs=dict(noisy=False)
    )
    buffer = model.replay_buffer
    assert type(buffer) is buffer_class and buffer.n_steps == 3 and buffer.gamma == 0.99 and buffer.priorities.alpha == 0.5
    model.learn(60)
    assert model.n_steps == 3
    assert model.replay_buffer is buffer and buffer.priorities.progress_remaining == 0.0 and buffer.priorities.beta == 1.0
    assert len(set(buffer.priorities.values[:60])) > 10

    batch = buffer.sample(8)
    buffer.sample = lambda *args, **kwargs: batch
    model.max_grad_norm = 1e9
    losses, _ = model._losses(batch)
    expected = th.autograd.grad((batch.weights[:, 0] * losses).sum() / 8, [*model.q_net.advantage_net.parameters()])
    model.train(gradient_steps=1, batch_size=8)
    for parameter, gradient in zip(model.q_net.advantage_net.parameters(), expected, strict=True):
        th.testing.assert_close(parameter.grad, gradient)
    priorities = (losses.detach().numpy().astype(float) + 1e-6) ** 0.5
    stored = buffer.priorities.values[batch.indices]
    for i, index in enumerate(batch.indices):  # of duplicates the last one counts, and all are the same
        assert stored[i] == pytest.approx(priorities[i], rel=1e-4), index


@pytest.mark.parametrize("algorithm", [SEERDQN, SEERQRDQN, Rainbow, SEERRainbow])
def test_priorities_without_images_keep_gamma(algorithm):
    kwargs: dict[str, Any] = dict(gamma=0.5, buffer_size=100, learning_starts=10, device="cpu")
    settings: dict[str, Any] = dict(replay_buffer_class=PrioritizedReplayBuffer, replay_buffer_kwargs=dict(n_steps=3))
    model = algorithm("MlpPolicy", "CartPole-v1", **kwargs, **settings).learn(30)
    assert model.replay_buffer.gamma == 0.5
    np.testing.assert_allclose(model.replay_buffer.sample(100).discounts.min(), 0.5**3)


def test_seer_without_images_has_priorities_too():
    with pytest.warns(UserWarning, match="no encoder to freeze"):
        model = make_rainbow(SEERRainbow, "MlpPolicy", prioritized_replay=True)
    assert type(model.learn(30).replay_buffer) is PrioritizedReplayBuffer and model.replay_buffer.priorities.beta == 1.0


@pytest.mark.parametrize("prioritized_replay", [False, True])
@pytest.mark.parametrize("n_steps", [1, 3])
def test_the_replay_buffer_of_a_loaded_model_follows_from_its_parameters(prioritized_replay, n_steps, tmp_path):
    make_rainbow(policy="MlpPolicy", prioritized_replay=prioritized_replay, n_steps=n_steps).save(tmp_path / "model")
    for wanted in (False, True):
        for steps in (1, 3):
            settings: dict[str, Any] = dict(prioritized_replay=wanted, n_steps=steps)
            model = Rainbow.load(tmp_path / "model", env=FlatLightEnv(), device="cpu", **settings)
            made = make_rainbow(policy="MlpPolicy", **settings)
            assert type(model.replay_buffer) is type(made.replay_buffer)
            assert getattr(model.replay_buffer, "n_steps", 1) == steps
            if wanted:
                assert model.replay_buffer.priorities.alpha == 0.5


@pytest.mark.parametrize("prioritized_replay", [False, True])
def test_a_loaded_replay_buffer_takes_the_settings_of_the_model(prioritized_replay, tmp_path):
    kwargs: dict[str, Any] = dict(policy="MlpPolicy", prioritized_replay=prioritized_replay)
    make_rainbow(n_steps=3, **kwargs).learn(40).save_replay_buffer(tmp_path / "buffer")
    model = make_rainbow(n_steps=5, gamma=0.5, replay_buffer_kwargs=dict(beta=0.1) if prioritized_replay else {}, **kwargs)
    model.load_replay_buffer(tmp_path / "buffer")
    buffer = model.replay_buffer
    assert buffer.size() == 40 and (buffer.n_steps, buffer.gamma) == (5, 0.5)
    if prioritized_replay:
        assert buffer.priorities.initial_beta == 0.1 and len(np.unique(buffer.priorities.values[:40])) > 1
        model = make_rainbow(replay_buffer_kwargs=dict(alpha=0.9), **kwargs)
        model.load_replay_buffer(tmp_path / "buffer")
        priorities = model.replay_buffer.priorities
        assert priorities.alpha == 0.9 and priorities.max_priority == 1
        np.testing.assert_array_equal(priorities.values, np.arange(model.buffer_size) < 40)  # as if they were new
    for settings in (dict(prioritized_replay=not prioritized_replay), dict(prioritized_replay=False, n_steps=1)):
        other = make_rainbow(policy="MlpPolicy", **settings)
        mine = other.replay_buffer
        with pytest.raises(ValueError, match=f"must be a {type(mine).__name__}, .* got {type(buffer).__name__}"):
            other.load_replay_buffer(tmp_path / "buffer")
        assert other.replay_buffer is mine


def test_a_buffer_of_images_needs_no_optimised_memory():
    """SB3 would end an episode where each learn() begins."""
    model = make_rainbow(replay_buffer_class=LatentReplayBuffer, optimize_memory_usage=True)
    model.learn(7).learn(2)
    assert not model.replay_buffer.dones[:9].any()


def test_latent_buffer_finds_the_stacked_frames_without_seer():
    env = VecFrameStack(DummyVecEnv([LightEnv]), n_stack=3, channels_order="first")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = make_rainbow(env=env, replay_buffer_class=LatentReplayBuffer, n_steps=5, gamma=0.8)
        model.learn(20)
    assert (model.replay_buffer.n_stack, model.replay_buffer.n_steps, model.replay_buffer.gamma) == (3, 5, 0.8)


def test_a_model_that_is_loaded_without_an_env_knows_its_stacked_frames(tmp_path):
    env = VecFrameStack(DummyVecEnv([LightEnv]), n_stack=3, channels_order="first")
    make_rainbow(env=env, replay_buffer_class=LatentReplayBuffer).save(tmp_path / "model")
    assert Rainbow.load(tmp_path / "model", device="cpu").replay_buffer.n_stack == 3


@pytest.mark.parametrize("prioritized_replay", [False, True])
def test_without_freeze_seer_rainbow_is_rainbow_to_the_last_bit(prioritized_replay):
    def train(algorithm, **kwargs):
        env = make_vec_env(LightEnv, n_envs=2, seed=3)
        kwargs.update(buffer_size=60, train_freq=2, gradient_steps=2, tau=0.3, prioritized_replay=prioritized_replay)
        model = make_rainbow(algorithm, env=env, **kwargs)
        return model.learn(150).policy.state_dict(), np.random.rand(), th.rand(1)

    ours, our_random, our_torch = train(SEERRainbow, freeze_after=None)
    theirs, their_random, their_torch = train(Rainbow)
    assert_same(ours, theirs)
    assert our_random == their_random and our_torch == their_torch


def test_dict_observations_have_n_steps_and_priorities_with_seer():
    model = SEERRainbow(
        "MultiInputPolicy", DictLightEnv(), buffer_size=100, learning_starts=10, batch_size=8, train_freq=1, freeze_after=20,
        device="cpu", prioritized_replay=True, latent_dtype="uint8",
    )  # fmt: skip
    assert model.learn(40).encoder_frozen and model.replay_buffer.n_steps == 3 and model.n_steps == 3
    assert Rainbow("MultiInputPolicy", DictLightEnv(), buffer_size=50, n_steps=1, learning_starts=10, device="cpu").learn(30)


# ---- as SB3's algorithms ----


@pytest.mark.parametrize("prioritized_replay", [False, True])
@pytest.mark.parametrize("network", [dict(n_atoms=11, v_min=-2.0, v_max=3.0, sigma0=0.2), ALL_OFF], ids=str)
@pytest.mark.parametrize("policy", ["CnnPolicy", "MlpPolicy"])
def test_save_and_load(policy, network, prioritized_replay, tmp_path):
    model = make_rainbow(
        Rainbow, policy, policy_kwargs=network, prioritized_replay=prioritized_replay, n_steps=2, double_q=False
    )
    model.learn(40)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = Rainbow.load(tmp_path / "model", env=model.get_env(), device="cpu")
    loaded.load_replay_buffer(tmp_path / "buffer", truncate_last_traj=False)
    assert (loaded.double_q, loaded.n_steps, loaded.prioritized_replay) == (False, 2, prioritized_replay)
    assert type(loaded.replay_buffer) is type(model.replay_buffer) and loaded.replay_buffer.n_steps == 2
    policies = [loaded.policy]
    model.policy.save(tmp_path / "policy")
    policies.append(type(model.policy).load(tmp_path / "policy", device="cpu"))
    observations = np.stack([model.observation_space.sample() for _ in range(20)])
    for each in policies:
        assert_same(model.policy.state_dict(), each.state_dict())
        assert each.q_net._get_constructor_parameters()["n_atoms"] == network["n_atoms"]
        tensor = th.as_tensor(observations)
        with each.q_net.without_noise(), model.q_net.without_noise():
            th.testing.assert_close(each.q_net(tensor), model.q_net(tensor), rtol=0, atol=0)

    def train_on(trained) -> dict[str, th.Tensor]:
        np.random.seed(1)
        th.manual_seed(1)
        trained.set_logger(model.logger)
        trained.train(gradient_steps=5, batch_size=8)
        return copy.deepcopy(trained.policy.state_dict())

    assert_same(train_on(model), train_on(loaded))
    loaded.learn(20, reset_num_timesteps=False)


@pytest.mark.parametrize("prioritized_replay", [False, True])
def test_a_buffer_of_images_is_saved_as_the_rows_that_are_filled(prioritized_replay, tmp_path):
    kwargs: dict[str, Any] = dict(prioritized_replay=prioritized_replay, buffer_size=5000)
    model = make_rainbow(replay_buffer_class=LatentReplayBuffer, **kwargs)
    model.learn(40)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    assert (tmp_path / "buffer.pkl").stat().st_size < model.replay_buffer.nbytes / 10
    loaded = Rainbow.load(tmp_path / "model", env=model.get_env(), device="cpu", buffer_size=50)
    with pytest.warns(UserWarning, match="buffer_size=50 has no effect: .* has the memory of 5000 images"):
        loaded.load_replay_buffer(tmp_path / "buffer")
    for each in (model, loaded):
        np.random.seed(1)
        th.manual_seed(1)
        each.set_logger(model.logger)
        each.train(gradient_steps=5, batch_size=8)
    assert_same(model.policy.state_dict(), loaded.policy.state_dict())
    # With SEER it becomes latents
    seer = make_rainbow(SEERRainbow, freeze_after=10, **kwargs)
    seer.load_replay_buffer(tmp_path / "buffer")
    seer.learn(20)
    assert seer.replay_buffer.stage == "latents" and seer.replay_buffer.size() == 40 + 20
    seer.save_replay_buffer(tmp_path / "latents")
    with pytest.raises(ValueError, match=r"holds latents of encoder .* but the encoder of this model is not frozen"):
        loaded.load_replay_buffer(tmp_path / "latents")
    # As versions before saved it
    save_to_pkl(tmp_path / "pickle.pkl", model.replay_buffer)
    loaded.load_replay_buffer(tmp_path / "pickle")
    assert loaded.replay_buffer.size() == 40 and loaded.learn(10, reset_num_timesteps=False)


@pytest.mark.parametrize("policy", ["CnnPolicy", "MlpPolicy"])
def test_a_save_that_fails_leaves_the_file_before_it(policy, tmp_path, monkeypatch):
    model = make_rainbow(policy=policy)
    model.learn(20)

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    for save, module, name in (
        (model.save, th, "save"),
        (model.save_replay_buffer, stable_baselines3.common.save_util.pickle, "dump"),
    ):
        save(tmp_path / "file")
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            with pytest.raises(OSError, match="No space left"):
                save(tmp_path / "file")
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(policy_kwargs=dict(n_atoms=0)), "`n_atoms` must be an integer >= 1, got 0"),
        (dict(policy_kwargs=dict(v_min=1.0, v_max=1.0)), "`v_min` and `v_max` must be finite, v_min < v_max, got 1.0 and 1.0"),
        (dict(prioritized_replay="False"), "`prioritized_replay` must be True or False, got 'False'"),
        (dict(double_q=1), "`double_q` must be True or False, got 1"),
        (dict(policy_kwargs=dict(sigma0=0.0)), "`sigma0` must be finite and > 0, got 0.0"),
        (
            dict(prioritized_replay=True, replay_buffer_class=ReplayBuffer),
            "`replay_buffer_class` must be PrioritizedReplayBuffer, .* got ReplayBuffer",
        ),
        (dict(prioritized_replay=True, replay_buffer_kwargs=dict(beta=2.0)), "`beta` must be between 0 and 1, got 2.0"),
        (dict(prioritized_replay=True, replay_buffer_kwargs=dict(n_steps=0)), "`n_steps` must be an integer >= 1, got 0"),
        (dict(prioritized_replay=True, optimize_memory_usage=True), "`optimize_memory_usage` must be False, got True"),
        (
            dict(policy="MultiInputPolicy", env=DictLightEnv()),
            "`n_steps` must be 1 and `prioritized_replay` False with Dict observations, got 3 and False",
        ),
    ],
)
def test_arguments_are_checked(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_rainbow(**{"policy": "MlpPolicy", **kwargs})
    if "DictLightEnv" in str(kwargs):
        with pytest.raises(ValueError, match="`observation_space` must not be a Dict"):
            PrioritizedReplayBuffer(10, DictLightEnv().observation_space, spaces.Discrete(2))


def test_policies_are_found_by_name_and_have_dqns_layers():
    assert type(make_rainbow().policy) is CnnPolicy
    model = make_rainbow(policy="MlpPolicy")
    assert type(model.policy) is RainbowPolicy
    model = Rainbow("MlpPolicy", FlatLightEnv(), buffer_size=10, device="cpu")
    assert model.q_net.net_arch == DQN("MlpPolicy", FlatLightEnv(), buffer_size=10, device="cpu").q_net.net_arch == [64, 64]
    # As in DQN, there is no hidden layer after the linear one of NatureCNN
    model = Rainbow("CnnPolicy", LightEnv(size=36), buffer_size=10, device="cpu")
    assert model.q_net.net_arch == [] and isinstance(model.q_net.value_net[0], NoisyLinear)


def test_freeze_steps_of_the_paper():
    """SEER, figure 3."""
    blocks = yaml.safe_load(default_config("rainbow_seer").read_text())
    baseline = yaml.safe_load(default_config("rainbow").read_text())["atari"]
    later = {"CrazyClimber", "PrivateEye", "Qbert"}
    for game in ("Alien", "Amidar", "BankHeist", "Krull", "Seaquest", *later):
        block = blocks.get(f"{game}NoFrameskip-v4", blocks["atari"])
        assert block["freeze_after"] == (100_000 if game in later else 50_000)
        # The baseline differs in what SEER adds (the meter, too), and in how much memory its images take
        for name in {*block, *baseline} - {"freeze_after", "buffer_size", "replay_buffer_class", "callback"}:
            assert block[name] == baseline[name], name


# ---- learning ----


def mean_return(model, env: gym.Env) -> float:
    env = Monitor(env)
    env.reset(seed=1)
    return evaluate_policy(model, env, n_eval_episodes=20)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "algorithm, policy, kwargs",
    [
        (Rainbow, "CnnPolicy", {}),
        (SEERRainbow, "CnnPolicy", dict(freeze_after=500)),
        (Rainbow, "MlpPolicy", dict(prioritized_replay=True)),
    ],
)
def test_learns(algorithm, policy, kwargs):
    """An episode is worth 2.5 to an agent that does not look, and 10 to one that does."""
    model = make_rainbow(
        algorithm, policy, learning_rate=1e-3, batch_size=32, gamma=0.5, learning_starts=100, buffer_size=1000,
        target_update_interval=100, policy_kwargs=dict(v_min=-1.0, v_max=3.0), **kwargs,
    )  # fmt: skip
    model.learn(1600)
    if algorithm is SEERRainbow:
        assert model.encoder_frozen and model.replay_buffer.size() == 1600
    assert mean_return(model, LightEnv() if policy == "CnnPolicy" else FlatLightEnv()) > 8.5

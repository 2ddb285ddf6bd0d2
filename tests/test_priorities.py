"""Prioritised replay: the sum tree, the priorities, and the updates that use them."""

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch as th
from hypothesis import given
from hypothesis import strategies as st
from sb3_contrib import QRDQN
from stable_baselines3 import DQN, SAC
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_seer import SEERDQN, SEERQRDQN, SEERSAC
from sb3_seer.common.priorities import EPSILON, Priorities, PrioritizedReplayBufferSamples, SumTree, is_prioritized
from tests.helpers import TinyEncoder, assert_same, make_model

# ---- the sum tree ----


def find_in_list(values: list[int], prefix_sum: float) -> int:
    """The oracle: walk along the values until their sum exceeds the prefix sum."""
    passed = 0
    for index, value in enumerate(values):
        passed += value
        if passed > prefix_sum:
            return index
    raise AssertionError("prefix_sum is not below the total")


# (index modulo the capacity, value): integers, whose sums are exact; many of them are 0
writes = st.lists(st.tuples(st.integers(0, 10_000), st.sampled_from([0, 0, 1, 2, 7, 1000])), min_size=1, max_size=20)


@given(capacity=st.integers(1, 700), steps=st.lists(st.tuples(writes, st.booleans()), min_size=1, max_size=6))
def test_tree_is_a_list_with_sums(capacity, steps):
    tree, values = SumTree(capacity), [0] * capacity
    for i, (step, read) in enumerate(steps):
        for index, value in step:
            values[index % capacity] = value
        tree.set(np.array([index % capacity for index, _ in step]), np.array([value for _, value in step]))
        total = sum(values)
        # Some writes are read at once, others stay behind until the end
        if not (read or i == len(steps) - 1):
            continue
        assert tree.total == total
        np.testing.assert_array_equal(tree.get(np.arange(capacity)), values)
        if total > 0:
            # The first and the last prefix sum of every value among them
            sums = np.cumsum(values)
            prefix_sums = np.unique(np.concatenate((sums, sums - 1, [0.0, 0.5, total / 3])).clip(0, total - 0.5))
            expected = [find_in_list(values, prefix_sum) for prefix_sum in prefix_sums]
            np.testing.assert_array_equal(tree.find(prefix_sums), expected)


@given(
    values=st.lists(st.one_of(st.just(0.0), st.floats(-12, 12).map(lambda exponent: 10**exponent)), min_size=1, max_size=600),
    fractions=st.lists(st.floats(0, 1), min_size=1, max_size=50),
)
def test_magnitudes_far_apart(values, fractions):
    tree = SumTree(len(values))
    tree.set(np.arange(len(values)), np.array(values))
    total = math.fsum(values)
    assert tree.total == pytest.approx(total, rel=1e-12)
    if total == 0.0:
        return
    prefix_sums = np.array([*(fraction * tree.total for fraction in fractions), tree.total, np.nextafter(tree.total, np.inf)])
    found = tree.find(prefix_sums)
    assert all(values[index] > 0.0 for index in found)
    for index, prefix_sum in zip(found, prefix_sums, strict=True):
        before = math.fsum(values[:index])
        assert before - 1e-12 * total <= prefix_sum <= before + values[index] + 1e-12 * total


@pytest.mark.parametrize("capacity", [1, 2, 15, 16, 17, 255, 256, 257, 1000])
def test_prefix_sums_out_of_range_find_the_nearest_leaf_that_is_not_zero(capacity):
    tree = SumTree(capacity)
    first, last = capacity // 3, capacity // 2
    # 0.1 + 0.2 + ... is not exact
    tree.set(np.arange(first, last + 1), 0.1)
    beyond = [tree.total, tree.total * 2, np.inf]
    np.testing.assert_array_equal(tree.find(np.array([-np.inf, -1.0, 0.0, *beyond])), [first] * 3 + [last] * 3)


def test_equal_leaves_are_found_one_after_the_other():
    tree = SumTree(300)
    tree.set(np.arange(300), 0.25)
    np.testing.assert_array_equal(tree.find(np.arange(300) * 0.25), np.arange(300))
    np.testing.assert_array_equal(tree.find(np.arange(300) * 0.25 + 0.249), np.arange(300))


def test_rounding_errors_do_not_pile_up():
    tree = SumTree(20)
    tree.set(np.arange(20), 0.1)
    expected = tree.total
    for value in 1e17, 0.1:
        tree.set(3, value)
        assert tree.total >= value
    assert tree.total == expected


def test_nothing_is_found_where_all_is_zero():
    tree = SumTree(3)
    with pytest.raises(ValueError, match="all priorities are 0"):
        tree.find(np.zeros(1))
    with pytest.raises(IndexError):
        tree.set(3, 1.0)


# ---- priorities ----


def filled(errors: np.ndarray, alpha: float = 0.5) -> Priorities:
    priorities = Priorities(len(errors), alpha)
    priorities.update(np.arange(len(errors)), errors)
    return priorities


def test_new_transitions_get_the_largest_priority_so_far():
    priorities = Priorities(4, alpha=0.5)
    priorities.add(0)
    priorities.add(np.array([1, 2]))
    np.testing.assert_array_equal(priorities.values, [1.0, 1.0, 1.0, 0.0])
    priorities.update(np.array([0, 1]), np.array([-9.0, 0.25]))
    np.testing.assert_allclose(priorities.values, [3.0, 0.5, 1.0, 0.0], rtol=1e-5)
    # Even if that transition has gone
    priorities.update(np.array([0]), np.array([0.0]))
    priorities.add(3)
    np.testing.assert_allclose(priorities.values, [0.001, 0.5, 1.0, 3.0], rtol=1e-5)
    priorities.clear()
    np.testing.assert_array_equal(priorities.values, np.zeros(4))
    priorities.add(2)
    np.testing.assert_array_equal(priorities.values, [0.0, 0.0, 1.0, 0.0])


def test_update_counts_the_last_of_duplicates():
    priorities = Priorities(3, alpha=1.0)
    priorities.update(np.array([1, 0, 1, 1]), np.array([7.0, -2.0, 5.0, 3.0], dtype=np.float32))
    np.testing.assert_array_equal(priorities.values, [2.0 + EPSILON, 3.0 + EPSILON, 0.0])
    # What is read is a copy
    priorities.values[:] = 0.0
    np.testing.assert_array_equal(priorities.values, [2.0 + EPSILON, 3.0 + EPSILON, 0.0])


@pytest.mark.parametrize("error", [np.nan, np.inf, -np.inf])
def test_errors_that_are_not_finite_are_refused(error):
    priorities = filled(np.array([1.0, 2.0]), alpha=0.0)  # anything to the power of 0 is finite
    before = priorities.values
    with pytest.raises(ValueError, match=rf"`errors` must be finite, got {error}"):
        priorities.update(np.array([0, 1]), np.array([3.0, error]))
    np.testing.assert_array_equal(priorities.values, before)
    assert priorities.max_priority == 1.0


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(n=0, alpha=0.5), "`n` must be an integer >= 1, got 0"),
        (dict(n=1, alpha=-0.1), "`alpha` must be between 0 and 1, got -0.1"),
        (dict(n=1, alpha=np.nan), "`alpha` must be between 0 and 1, got nan"),
        (dict(n=1, alpha="0.5"), "`alpha` must be between 0 and 1, got '0.5'"),
    ],
)
def test_arguments_are_checked(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Priorities(**kwargs)


@pytest.mark.parametrize("batch_size", [1, 32])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_frequencies_are_proportional_to_priorities(alpha, batch_size):
    np.random.seed(0)
    errors = np.linspace(0.05, 4.0, 40)
    priorities = filled(errors, alpha)
    n_batches = 8_000 // batch_size
    counts = np.bincount(np.concatenate([priorities.sample(batch_size) for _ in range(n_batches)]), minlength=40)
    expected = errors**alpha / (errors**alpha).sum() * n_batches * batch_size
    # 39 degrees of freedom: exceeded once in a thousand times (drawing from equal parts only makes it smaller)
    assert ((counts - expected) ** 2 / expected).sum() < 72.1


def test_a_batch_is_spread_over_all_priorities():
    np.random.seed(0)
    priorities = filled(np.full(50, 0.7))
    np.testing.assert_array_equal(priorities.sample(50), np.arange(50))
    np.testing.assert_array_equal(np.bincount(priorities.sample(200)), np.full(50, 4))


def test_sampling_follows_the_seed():
    priorities = filled(np.arange(30.0))
    np.random.seed(1)
    indices = priorities.sample(16)
    np.random.seed(1)
    np.testing.assert_array_equal(priorities.sample(16), indices)
    assert not np.array_equal(priorities.sample(16), indices)
    assert indices.shape == (16,) and indices.dtype == np.int64


def test_one_transition_and_none():
    priorities = Priorities(1, alpha=0.6)
    with pytest.raises(ValueError, match="all priorities are 0"):
        priorities.sample(4)
    priorities.add(0)
    np.testing.assert_array_equal(priorities.sample(4), np.zeros(4))
    np.testing.assert_array_equal(priorities.weights(np.zeros(4, dtype=int)), np.ones(4))


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_weights_are_those_of_the_paper(beta):
    # 7 transitions in a buffer of 10
    priorities = Priorities(10, alpha=0.5, beta=beta)
    errors = np.array([0.0, 1e-12, 1e-3, 0.5, 1.0, 20.0, 1e12])
    priorities.update(np.arange(7), errors)
    indices = np.array([5, 2, 2, 6, 4])
    p = np.sqrt(errors + 1e-6)
    probabilities = p / p.sum()
    expected = np.array([(1 / 7 / probabilities[i]) ** beta for i in indices])
    weights = priorities.weights(indices)
    np.testing.assert_allclose(weights, expected / expected.max(), rtol=1e-5)
    assert weights.dtype == np.float32 and weights.shape == (5,) and weights.max() == 1.0


def test_leaves_move_when_the_buffer_grows():
    np.random.seed(0)
    errors = np.random.rand(20)
    priorities = filled(errors, alpha=1.0)
    priorities.add(3)
    old = priorities.values
    # Leaf i moves to 2 * i + 100
    moved = np.zeros(500)
    moved[2 * np.arange(20) + 100] = old
    priorities.values = moved
    np.testing.assert_array_equal(priorities.values, moved)
    samples = priorities.sample(1000)
    assert set(samples) <= set(2 * np.arange(20) + 100)
    assert np.bincount(samples)[106] == pytest.approx(1000 / old.sum(), abs=1)
    # The largest priority so far is still known, and there is room
    priorities.add(499)
    assert priorities.values[499] == 1.0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda priorities: pickle.loads(pickle.dumps(priorities))])
@pytest.mark.parametrize("read", [True, False])
def test_copies_go_on_alike_and_apart(duplicate, read):
    priorities = filled(np.random.default_rng(0).random(300) * 5)
    if read:
        priorities.sample(1)
    twin = duplicate(priorities)
    samples = []
    for each in (priorities, twin):
        np.random.seed(2)
        each.add(7)
        each.update(each.sample(32), np.linspace(0, 9, 32))
        samples.append(each.sample(32))
    np.testing.assert_array_equal(*samples)
    np.testing.assert_array_equal(priorities.values, twin.values)
    twin.update(np.array([0]), np.array([100.0]))
    assert priorities.values[0] != twin.values[0] and priorities.max_priority != twin.max_priority


def test_values_and_the_largest_priority_are_all_there_is_to_save():
    priorities = filled(np.random.default_rng(0).random(300) * 5)
    loaded = Priorities(1, priorities.alpha)
    loaded.values, loaded.max_priority = priorities.values, priorities.max_priority
    samples = []
    for each in (priorities, loaded):
        np.random.seed(2)
        each.add(7)
        samples.append(each.sample(32))
    np.testing.assert_array_equal(*samples)


# ---- the updates ----


class FakeBuffer:
    """
    Hands out the given batches, one after the other, and keeps what comes back.

    :param prioritized: whether with weights and indices
    """

    def __init__(self, batches: list[PrioritizedReplayBufferSamples], prioritized: bool = True) -> None:
        self.batches, self.priorities = batches, Priorities(8, 0.6, 0.4, 1.0) if prioritized else None
        self.n_sampled = 0
        self.updates: list[tuple[np.ndarray, np.ndarray]] = []

    def sample(self, batch_size: int, env: Any = None) -> ReplayBufferSamples | PrioritizedReplayBufferSamples:
        batch = self.batches[self.n_sampled]
        self.n_sampled += 1
        assert len(batch.actions) == batch_size
        return batch if self.priorities else ReplayBufferSamples(*batch[:6])

    def update_priorities(self, indices: np.ndarray, errors: np.ndarray) -> None:
        assert self.priorities
        self.updates.append((indices, errors))


def make_batches(model, n_batches: int, equal: bool) -> list[PrioritizedReplayBufferSamples]:
    """Batches of what the model has stored, with weights that are all 1 or random, and any indices."""
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(n_batches):
        weights = np.ones((8, 1)) if equal else rng.random((8, 1))
        batch = model.replay_buffer.sample(8)
        weights = th.as_tensor(weights, dtype=th.float32)
        batches.append(PrioritizedReplayBufferSamples(*batch, weights, rng.integers(0, 1000, 8)))
    return batches


def trained(algorithm, extractor: type = TinyEncoder, **kwargs):
    model = make_model(algorithm, extractor, freeze_after=None, **kwargs)
    # Enough for target networks that differ
    return model.learn(40)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize(
    "algorithm, upstream, extractor, kwargs",
    [
        (SEERDQN, DQN, TinyEncoder, dict(max_grad_norm=0.05)),
        (SEERQRDQN, QRDQN, TinyEncoder, dict(max_grad_norm=0.05)),
        (SEERQRDQN, QRDQN, TinyEncoder, dict()),
        # With an extractor that has no weights, there is nothing in which SEERSAC differs from SAC
        (SEERSAC, SAC, FlattenExtractor, dict()),
    ],
)
@pytest.mark.filterwarnings("ignore:The encoder is frozen")
def test_equal_weights_give_upstreams_updates(algorithm, upstream, extractor, kwargs, n_steps, frozen):
    # Latents of pixels are not larger than the image as uint8
    ours = trained(algorithm, extractor, n_steps=n_steps, latent_dtype="uint8", **kwargs)
    if frozen:
        ours.freeze_encoder()
    batches = make_batches(ours, n_batches=6, equal=True)
    assert (batches[0].discounts is not None) == (n_steps > 1)
    start = copy.deepcopy(dict(ours.policy.state_dict()))
    theirs = copy.deepcopy(ours)
    ours.replay_buffer, theirs.replay_buffer = FakeBuffer(batches), FakeBuffer(batches, prioritized=False)
    for model, train in ((ours, algorithm.train), (theirs, upstream.train)):
        th.manual_seed(1)
        # Twice, with a learning rate that has changed in between
        train(model, gradient_steps=2, batch_size=8)
        model._current_progress_remaining, model.lr_schedule = 0.5, lambda progress: 1e-2 * progress
        train(model, gradient_steps=4, batch_size=8)
    weights = theirs.policy.state_dict()
    assert any(not th.equal(weights[name], start[name]) for name in weights)
    for name, value in ours.policy.state_dict().items():
        th.testing.assert_close(value, weights[name], rtol=1e-5, atol=1e-6)
    assert ours._n_updates == theirs._n_updates
    our_logs, their_logs = ours.logger.name_to_value, theirs.logger.name_to_value
    assert our_logs == pytest.approx(their_logs, rel=1e-4) and "train/n_updates" in our_logs


def huber(delta: th.Tensor) -> th.Tensor:
    return th.where(delta.abs() < 1, delta**2 / 2, delta.abs() - 0.5)


def dqn_losses(model, batch) -> tuple[list[th.Tensor], list[float]]:
    losses, errors = [], []
    for i in range(8):
        with th.no_grad():
            value = model.q_net_target(batch.next_observations[i : i + 1])[0].max()
        target = batch.rewards[i, 0] + (1 - batch.dones[i, 0]) * batch.discounts[i, 0] * value
        delta = target - model.q_net(batch.observations[i : i + 1])[0, int(batch.actions[i])]
        losses.append(huber(delta))
        errors.append(abs(delta.item()))
    assert min(errors) < 1 < max(errors)  # on either side of the Huber loss's corner
    return losses, errors


def qrdqn_losses(model, batch) -> tuple[list[th.Tensor], list[float]]:
    """Dabney et al. 2017, https://arxiv.org/abs/1710.10044, equation 10 and Algorithm 1"""
    losses = []
    levels = (th.arange(model.n_quantiles)[:, None] + 0.5) / model.n_quantiles
    for i in range(8):
        with th.no_grad():
            quantiles = model.quantile_net_target(batch.next_observations[i : i + 1])[0]  # [n_quantiles, n_actions]
            target = quantiles[:, quantiles.mean(dim=0).argmax()]
        target = batch.rewards[i, 0] + (1 - batch.dones[i, 0]) * batch.discounts[i, 0] * target
        quantiles = model.quantile_net(batch.observations[i : i + 1])[0, :, int(batch.actions[i])]
        delta = target[None, :] - quantiles[:, None]
        losses.append(((levels - (delta < 0).float()).abs() * huber(delta)).mean(dim=1).sum())
    return losses, [loss.item() for loss in losses]


def sac_losses(model, batch) -> tuple[list[th.Tensor], list[float]]:
    """Of transitions that end their episode: no action is drawn for the next observation."""
    losses, errors = [], []
    for i in range(8):
        latents, _ = model.policy.encode_batch(batch.observations[i : i + 1], batch.next_observations[i : i + 1])
        deltas = [batch.rewards[i, 0] - q[0, 0] for q in model.critic(latents, batch.actions[i : i + 1])]
        losses.append(sum(delta**2 for delta in deltas) / 2)
        errors.append(sum(abs(delta.item()) for delta in deltas) / len(deltas))
    return losses, errors


@pytest.mark.parametrize(
    "algorithm, losses_of, network",
    [(SEERDQN, dqn_losses, "q_net"), (SEERQRDQN, qrdqn_losses, "quantile_net"), (SEERSAC, sac_losses, "critic")],
)
def test_gradients_and_errors_are_those_of_single_transitions(algorithm, losses_of, network):
    model = trained(algorithm, n_steps=3)
    batch = make_batches(model, n_batches=1, equal=False)[0]
    batch = batch._replace(rewards=th.linspace(-3, 3, 8)[:, None])
    batch = batch._replace(dones=th.ones(8, 1) if algorithm is SEERSAC else th.arange(8)[:, None] % 2.0)
    parameters = dict(getattr(model.policy, network).named_parameters())
    losses, errors = losses_of(model, batch)
    gradients = [th.autograd.grad(loss, list(parameters.values())) for loss in losses]

    model.replay_buffer = buffer = FakeBuffer([batch])
    model.max_grad_norm = 1e9
    model.train(gradient_steps=1, batch_size=8)
    for i, (name, parameter) in enumerate(parameters.items()):
        expected = sum(batch.weights[k, 0] * gradients[k][i] for k in range(8)) / 8
        th.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    [(indices, errors_given)] = buffer.updates
    np.testing.assert_array_equal(indices, batch.indices)
    np.testing.assert_allclose(errors_given, errors, rtol=1e-4, atol=1e-6)
    assert errors_given.shape == (8,)


@pytest.mark.parametrize("algorithm", [SEERDQN, SEERQRDQN, SEERSAC])
def test_every_batch_gives_its_errors_back_before_the_next_is_sampled(algorithm):
    model = trained(algorithm)
    batches = make_batches(model, n_batches=5, equal=False)

    class StrictBuffer(FakeBuffer):
        def sample(self, *args: Any, **kwargs: Any):
            assert len(self.updates) == self.n_sampled
            return super().sample(*args, **kwargs)

    model.replay_buffer = buffer = StrictBuffer(batches)
    model.train(gradient_steps=5, batch_size=8)
    for batch, (indices, errors) in zip(batches, buffer.updates, strict=True):
        np.testing.assert_array_equal(indices, batch.indices)
        assert errors.shape == (8,) and (errors > 0).all()
    # Each batch has its own errors
    assert len({errors.tobytes() for _, errors in buffer.updates}) == 5


@pytest.mark.parametrize("algorithm", [SEERDQN, SEERQRDQN, SEERSAC])
def test_buffers_without_priorities_train_as_ever(algorithm):
    model = trained(algorithm)
    batches = make_batches(model, n_batches=2, equal=False)
    assert not is_prioritized(model.replay_buffer) and not is_prioritized(None)
    model.replay_buffer = buffer = FakeBuffer(batches, prioritized=False)
    model.train(gradient_steps=2, batch_size=8)
    assert buffer.n_sampled == 2 and buffer.updates == []


def test_losses_per_transition_are_a_part_of_the_batch():
    """A loss of shape (batch_size, 1) would be broadcast against the weights, to a mean of all pairs."""
    model = trained(SEERDQN)
    model.replay_buffer = FakeBuffer(make_batches(model, n_batches=1, equal=False))
    losses = model._losses
    model._losses = lambda batch: tuple(values[:, None] for values in losses(batch))
    with pytest.raises(AssertionError):
        model.train(gradient_steps=1, batch_size=8)


def test_equal_weights_leave_the_result_to_the_last_bit_in_sac():
    ours = trained(SEERSAC)
    batches = make_batches(ours, n_batches=4, equal=True)
    theirs = copy.deepcopy(ours)
    for model, prioritized in ((ours, True), (theirs, False)):
        model.replay_buffer = FakeBuffer(batches, prioritized)
        th.manual_seed(1)
        model.train(gradient_steps=4, batch_size=8)
    assert_same(dict(ours.policy.state_dict()), dict(theirs.policy.state_dict()))

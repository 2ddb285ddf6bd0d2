"""The replay buffer, against a naive oracle that keeps every transition whole."""

import pickle
import tracemalloc
import warnings
from copy import deepcopy
from typing import Any, cast

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.vec_env import VecNormalize

from sb3_seer.common.encoding import MAX_ENCODER_INPUTS, LatentCodec
from sb3_seer.common.replay import LatentReplayBuffer
from sb3_seer.common.type_aliases import Latents
from tests.replay_oracle import (
    GAMMA,
    CycledCrop,
    Oracle,
    Stream,
    StubEncoder,
    check,
    image_space,
    make_oracle,
    name_space,
    pickled,
    sample_all,
    saved,
)


def update_priorities(oracle: Oracle) -> None:
    """Some transitions are sampled, and the agent was wrong about them."""
    buffer = oracle.buffer
    samples = buffer.sample(5)
    errors = np.random.RandomState(len(oracle.steps)).randint(0, 9, size=5).astype(np.float32)
    buffer.update_priorities(samples.indices, errors)
    for name, error in zip(samples.actions[:, 0].long().tolist(), errors, strict=True):
        oracle.priorities[name] = (float(error) + 1e-6) ** 0.6
    oracle.max_priority = max(oracle.max_priority, ((errors.astype(float) + 1e-6) ** 0.6).max())


@pytest.mark.parametrize("is_dict", [False, True])
@settings(max_examples=250, deadline=None, derandomize=True)
@given(data=st.data())
def test_what_is_sampled_is_what_was_added(is_dict: bool, data: st.DataObject) -> None:
    """Invariants 3, 6, 7 and 9, by any sequence of additions, saves, updates of priorities, and perhaps a freeze."""
    n_augmentations = data.draw(st.sampled_from([1, 1, 2, 3]), label="n_augmentations")
    oracle = make_oracle(
        buffer_size=data.draw(st.integers(1, 40), label="buffer_size"),
        n_envs=data.draw(st.sampled_from([1, 3]), label="n_envs"),
        n_stack=data.draw(st.sampled_from([1, 2, 3, 4]), label="n_stack"),
        padding=data.draw(st.sampled_from(["zeros", "repeat", "broken"]), label="padding"),
        n_steps=data.draw(st.sampled_from([1, 3, 5]), label="n_steps"),
        n_augmentations=n_augmentations,
        crop=n_augmentations > 1,
        dtype=data.draw(st.sampled_from(["uint8", "float32"]), label="dtype"),
        prioritized=data.draw(st.booleans(), label="prioritized"),
        views=0.0 if is_dict else data.draw(st.sampled_from([0.0, 0.9, 1.0]), label="views"),
        seed=data.draw(st.integers(0, 10**6), label="seed"),
        is_dict=is_dict,
    )
    actions = st.sampled_from(["add", "add", "add", "save", "pickle", "freeze", "update", "clear"])
    for action in data.draw(st.lists(actions, max_size=8), label="actions"):
        if action == "add":
            oracle.add(data.draw(st.integers(1, 30), label="steps"))
        elif action == "save":
            saved(oracle)
        elif action == "pickle":
            pickled(oracle)
        elif action == "update" and oracle.buffer.priorities is not None and oracle.n_held:
            update_priorities(oracle)
        elif action == "freeze":
            oracle.buffer.to_latents()
        elif action == "clear":
            oracle.clear()
        if oracle.n_held:
            check(oracle)


@pytest.mark.parametrize("n_envs, n_rows", [(1, 1), (1, 2), (3, 1), (3, 8), (1, 24)])
@pytest.mark.parametrize("padding, n_steps", [("zeros", 1), ("repeat", 1), ("broken", 1), ("broken", 3), ("broken", 5)])
def test_stacks_are_rebuilt_exactly_whatever_the_padding(padding: str, n_envs: int, n_rows: int, n_steps: int) -> None:
    """Invariant 7: across episode ends, truncations, unannounced resets, the write head, wrap-around and reset()."""
    oracle = make_oracle(n_rows * n_envs, n_envs, padding=padding, n_steps=n_steps, n_stack=4)
    for i in range(100):
        if i == 50:
            oracle.clear()
        oracle.add()
        check(oracle)
    # A frame or a stack of 4 of 72 bytes beside each step that is held, and the 3 before it
    assert oracle.buffer.extra_bytes <= (oracle.n_held + 3) * n_envs * (4 + 3) * 72


@pytest.mark.parametrize("n_envs, n_steps", [(1, 1), (3, 3)])
@pytest.mark.parametrize("before", [0, 1, 7, 12, 17, 24, 31], ids="{} rows".format)
@pytest.mark.parametrize("views", [0.0, 1.0])
def test_the_freeze_loses_nothing(views: float, before: int, n_steps: int, n_envs: int) -> None:
    """Invariants 3 and 6: with the ring empty, partly full, just full (12 rows), wrapped, wrapped just full again."""
    oracle = make_oracle(12 * n_envs, n_envs, n_steps=n_steps, n_augmentations=2, crop=True, views=views)
    oracle.add(before)
    oracle.buffer.to_latents()
    # Growth is immediate: two more rounds of the enlarged ring, and it only forgets what it must
    n_rows = 12 * 72 // (4 * 2 * 2 * 2)
    assert oracle.buffer.stage == "latents" and oracle.buffer.buffer_size == n_rows
    assert oracle.buffer.size() == oracle.n_held == min(before, 12)
    for _ in range(n_rows):
        if oracle.n_held:
            check(oracle)
        oracle.add(2)
    assert oracle.buffer.full


class RewardsInThirds:
    """What a buffer needs of a ``VecNormalize(norm_obs=False)``."""

    norm_obs = False

    def normalize_obs(self, obs: np.ndarray) -> np.ndarray:
        return obs

    def normalize_reward(self, reward: np.ndarray) -> np.ndarray:
        return reward / np.float64(3.0)


def random_state() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()
    return name, tuple(keys), *rest


@pytest.mark.parametrize("handle_timeout_termination", [True, False])
@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize("n_envs", [1, 3])
def test_samples_and_random_numbers_are_those_of_sb3(n_envs: int, n_steps: int, handle_timeout_termination: bool) -> None:
    """Invariant 1: images without augmentation are sampled bit by bit as by SB3's own buffers."""
    kwargs = dict(device="cpu", n_envs=n_envs, handle_timeout_termination=handle_timeout_termination)
    args = (20 * n_envs, image_space(3), name_space())
    theirs: ReplayBuffer
    if n_steps == 1:
        theirs = ReplayBuffer(*args, **kwargs)
    else:
        theirs = NStepReplayBuffer(*args, n_steps=n_steps, gamma=0.99, **kwargs)
    ours = LatentReplayBuffer(*args, n_stack=3, n_steps=n_steps, gamma=0.99, **kwargs)
    streams = [Stream(np.random.RandomState(seed), 3, "zeros") for seed in range(n_envs)]
    oracle = Oracle(ours, streams)
    # SB3's n-step windows run on over a reset that no done announced: leave such resets out
    for stream in streams:
        stream.reset_unannounced = False
    normalize = cast(VecNormalize, RewardsInThirds())
    for _ in range(45):
        oracle.add()
        last = oracle.steps[-1]
        theirs.add(
            *(np.stack([step[key] for step in last]) for key in ("obs", "next_obs")),
            np.arange(n_envs, dtype=np.float32).reshape(-1, 1) + (len(oracle.steps) - 1) * n_envs,
            *(np.stack([step[key] for step in last]) for key in ("reward", "done")),
            [{"TimeLimit.truncated": step["timeout"]} for step in last],
        )
        for env in (None, normalize):
            batches, states = [], []
            for buffer in (ours, theirs):
                np.random.seed(7)
                batches.append(buffer.sample(16, env=env))
                states.append(random_state())
            assert states[0] == states[1]
            for mine, sb3s in zip(*batches, strict=True):
                assert (mine is None) == (sb3s is None)
                if mine is not None:
                    assert mine.dtype == sb3s.dtype and th.equal(mine, sb3s)


@pytest.mark.parametrize("n_added", [3, 4, 6, 9])
def test_latents_are_drawn_with_the_same_random_numbers_as_images(n_added: int) -> None:
    """Invariant 4: with one copy, a run draws the same transitions before and after the freeze, also after a wrap."""
    oracle = make_oracle(12, n_envs=3)
    oracle.add(n_added)
    names, states = [], []
    for _ in range(2):
        np.random.seed(3)
        names.append(oracle.buffer.sample(64).actions.tolist())
        states.append(random_state())
        oracle.buffer.to_latents()
    assert names[0] == names[1] and states[0] == states[1]


def test_all_copies_are_drawn_and_the_same_for_both_observations() -> None:
    oracle = make_oracle(n_augmentations=3, crop=True)
    oracle.add(10)
    oracle.buffer.to_latents()
    samples, encoder = oracle.buffer.sample(600), oracle.buffer.encoder.policy
    counts = np.zeros(3)
    for i, name in enumerate(samples.actions[:, 0].long().tolist()):
        step = oracle.expected(name, 1, GAMMA)
        pairs = []
        for copy in range(3):
            crops = [oracle.buffer.encoder.augmentation.crop(th.as_tensor(step[key]), copy) for key in ("obs", "next_obs")]
            pairs.append(encoder.encode(th.stack(crops)))
        got = th.stack([samples.observations.values[i], samples.next_observations.values[i]])
        matches = [bool(th.equal(got, pair)) for pair in pairs]
        assert any(matches)
        counts += np.array(matches) / sum(matches)
    assert counts.min() > 100


def test_images_are_augmented_once_a_batch() -> None:
    calls = []

    class Recorder(CycledCrop):
        def forward(self, images: th.Tensor) -> th.Tensor:
            calls.append(images.clone())
            return super().forward(images)

    oracle = make_oracle()
    oracle.buffer.encoder.augmentation = Recorder(2)
    oracle.add(10)
    samples = oracle.buffer.sample(8)
    names = samples.actions[:, 0].long().tolist()
    assert len(calls) == 2  # obs and next_obs, independently
    for images, key in zip(calls, ("obs", "next_obs"), strict=True):
        np.testing.assert_array_equal(images, np.stack([oracle.expected(name, 1, GAMMA)[key] for name in names]))
    assert samples.observations.shape == (8, 6, 4, 4) == samples.next_observations.shape


# ---- several views of a transition ----


@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("stage", ["images", "latents"])
def test_views_of_a_transition_are_augmented_each_for_itself(stage: str, prioritized: bool) -> None:
    """View v of transition i is at v * batch_size + i."""
    oracle = make_oracle(24, 2, n_augmentations=4, crop=True, n_steps=3, prioritized=prioritized, sample_positives=True)
    buffer, encoder = oracle.buffer, oracle.buffer.encoder.policy
    oracle.add(12)
    if stage == "latents":
        buffer.to_latents()
    encoder.n_inputs.clear()
    samples = buffer.sample(10, n_views=3)
    assert encoder.n_inputs == []
    for field in samples:
        if field is not None:
            assert len(field.values if isinstance(field, Latents) else field) == 30
    for field in (samples.actions, samples.rewards, samples.dones, samples.discounts):
        assert th.equal(field, field[:10].repeat(3, 1))
    if prioritized:
        assert th.equal(samples.weights, samples.weights[:10].repeat(3, 1))
        np.testing.assert_array_equal(samples.indices, np.tile(samples.indices[:10], 3))
    for i, name in enumerate(samples.actions[:10, 0].long().tolist()):
        wanted = oracle.expected(name, 3, GAMMA)
        drawn = []
        for v in range(3):
            obs, next_obs = samples.observations, samples.next_observations
            if stage == "images":
                crop = (10 * v + i) % 4  # CycledCrop numbers the images of a call
                for key, got in (("obs", obs), ("next_obs", next_obs), ("obs", samples.positives)):
                    np.testing.assert_array_equal(got[10 * v + i], buffer.encoder.augmentation.crop(wanted[key], crop))
                continue
            pairs = [
                [encoder.encode(th.as_tensor(buffer.encoder.augmentation.crop(wanted[key], k))[None])[0] for k in range(4)]
                for key in ("obs", "next_obs")
            ]
            got = obs.values[10 * v + i], next_obs.values[10 * v + i]
            # The same copy for both
            drawn.append({k for k in range(4) if th.equal(got[0], pairs[0][k]) and th.equal(got[1], pairs[1][k])})
        assert stage == "images" or all(drawn)
        if stage == "latents" and all(len(matches) == 1 for matches in drawn):
            assert len(set.union(*drawn)) == 3  # different copies


@pytest.mark.parametrize("stage", ["images", "latents"])
def test_more_views_than_copies_are_refused(stage: str) -> None:
    oracle = make_oracle(n_augmentations=3, crop=True)
    oracle.add(10)
    if stage == "latents":
        oracle.buffer.to_latents()
    for n_views in (0, 4):
        with pytest.raises(ValueError, match=f"`n_views` must be from 1 to n_augmentations=3, got {n_views}"):
            oracle.buffer.sample(4, n_views=n_views)


# ---- what is not stored ----


@pytest.mark.parametrize("stage", ["images", "latents"])
@pytest.mark.parametrize(
    "name, wrong, message",
    [
        ("obs", np.zeros((1, 6, 6, 6 + 1)), r"`obs` must have shape \(1, 6, 6, 6\), got \(1, 6, 6, 7\)"),
        ("obs", np.zeros((2, 6, 6, 6)), r"`obs` must have shape"),
        ("next_obs", np.zeros((1, 6, 36)), r"`next_obs` must have shape"),
        ("action", np.zeros((1, 3)), "reshape"),
        ("reward", np.zeros(2), "reshape"),
        ("done", np.zeros(2), "reshape"),
        ("infos", [{}, {}], "reshape"),
    ],
)
def test_a_failed_add_leaves_the_buffer_as_it_was(name: str, wrong: Any, message: str, stage: str) -> None:
    oracle = make_oracle(20)
    oracle.add(5)
    if stage == "latents":
        oracle.buffer.to_latents()
    for _ in range(30):
        step = oracle.streams[0]
        arguments: dict[str, Any] = dict(obs=step.obs[None], next_obs=step.obs[None], action=np.zeros((1, 1)))
        arguments.update(reward=np.zeros(1), done=np.zeros(1), infos=[{}])
        with pytest.raises(ValueError, match=message):
            oracle.buffer.add(**{**arguments, name: wrong})
        check(oracle)
        oracle.add()


def test_an_encoder_that_fails_in_add_leaves_the_buffer_as_it_was() -> None:
    oracle = make_oracle(20, n_envs=2)
    oracle.add(5)
    oracle.buffer.to_latents()
    policy = oracle.buffer.encoder.policy
    encode, broken = policy.encode, deepcopy(oracle.streams)
    policy.encode = lambda images: 1 / 0
    steps = [stream.step() for stream in broken]
    with pytest.raises(ZeroDivisionError):
        oracle.buffer.add(
            *(np.stack([step[key] for step in steps]) for key in ("obs", "next_obs")),
            np.zeros((2, 1)),
            *np.zeros((2, 2)),
            [{}, {}],
        )
    policy.encode = encode
    oracle.add(20)
    check(oracle)


def test_images_of_another_layout_are_refused() -> None:
    buffer = LatentReplayBuffer(20, spaces.Box(0, 255, (3, 16, 20), np.uint8), name_space(), "cpu")
    images = np.zeros((1, 16, 20, 3), np.uint8)
    with pytest.raises(ValueError, match=r"`obs` must have shape \(1, 3, 16, 20\), got \(1, 16, 20, 3\)"):
        buffer.add(images, images, *np.zeros((3, 1)), [{}])


# ---- the encoder after the freeze ----


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("n_envs", [1, 3])
def test_one_call_of_the_encoder_for_each_step(n_envs: int, crop: bool) -> None:
    """Invariant 5: with episode ends and resets in the middle."""
    n_augmentations = 2 if crop else 1
    oracle = make_oracle(24, n_envs, n_augmentations=n_augmentations, crop=crop)
    buffer = oracle.buffer
    buffer.to_latents()
    policy = buffer.encoder.policy
    expected: list[Any] = [None] * n_envs
    for _ in range(60):
        policy.n_inputs.clear()
        policy.cached = None
        oracle.add()
        steps = oracle.steps[-1]
        n_images = sum(
            1 + (before is None or not np.array_equal(before, step["obs"]))
            for before, step in zip(expected, steps, strict=True)
        )
        expected = [None if step["done"] else step["next_obs"] for step in steps]
        acts_on = not any(step["done"] for step in steps)
        assert policy.n_inputs == [n_images * n_augmentations + (n_envs if crop and acts_on else 0)]
        # Latents to act on: of the middle of the new observations
        assert (policy.cached is not None) == acts_on
        if policy.cached is not None:
            images, latents = policy.cached
            np.testing.assert_array_equal(images, np.stack(expected))
            assert th.equal(latents, policy.encode(images[..., 1:5, 1:5] if crop else images))
        policy.n_inputs.clear()
        buffer.sample(4)
        assert policy.n_inputs == []


@pytest.mark.parametrize("seed", range(10))
def test_there_are_latents_to_act_on_right_after_the_freeze(seed: int) -> None:
    oracle = make_oracle(n_envs=2, n_augmentations=2, crop=True, seed=seed)
    oracle.add(5)
    policy = oracle.buffer.encoder.policy
    assert policy.cached is None
    oracle.buffer.to_latents()
    if any(step["done"] for step in oracle.steps[-1]):
        assert policy.cached is None
        return
    images, latents = policy.cached
    assert latents.shape == (2, 2, 2) and latents.dtype == th.float32
    np.testing.assert_array_equal(images, np.stack([step["next_obs"] for step in oracle.steps[-1]]))
    assert th.equal(latents, policy.encode(images[..., 1:5, 1:5]))


def test_the_arena_is_allocated_once_by_the_first_add() -> None:
    """Invariant 8: the bytes for observations are the same before and after the freeze, and there are no others."""
    tracemalloc.start()
    buffer = LatentReplayBuffer(10_000, image_space(4, (1, 84, 84)), name_space(), device="cpu", n_stack=4)
    assert buffer.nbytes == 10_000 * 7056 and tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()

    oracle = make_oracle(2_000, n_augmentations=2, crop=True)
    oracle.add(1)
    buffer = oracle.buffer
    nbytes, images = buffer.nbytes, buffer.store.ring
    # Two spare frames, for the older frames of the oldest stack
    assert images.nbytes - 2 * 72 == nbytes == 2_000 * 72
    oracle.add(2_500)
    buffer.to_latents()
    oracle.add(2_500)
    latents = buffer.store.ring
    assert np.shares_memory(images, latents) and latents.nbytes <= nbytes == buffer.nbytes


def test_the_freeze_needs_little_more_than_the_arena() -> None:
    """Invariant 8: one chunk of images, and the small arrays of the enlarged ring."""
    space = image_space(4, (1, 64, 64))
    buffer = LatentReplayBuffer(2_000, space, name_space(), device="cpu", n_stack=4)
    buffer.set_encoder(StubEncoder(space.shape, (1, 1000)))
    frames = np.random.RandomState(0).randint(0, 256, size=(3_504, 64, 64)).astype(np.uint8)
    for i in range(3_500):
        buffer.add(frames[None, i : i + 4], frames[None, i + 1 : i + 5], *np.zeros((3, 1)), [{}])
    assert buffer.full and buffer.pos > 0
    tracemalloc.start()
    buffer.to_latents()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # A chunk is 32 stacks of 16 kB, and it is there about three times: frames, stacks, encoder inputs
    assert peak < 5e6 < buffer.nbytes - 3e6


@pytest.mark.parametrize("padding", ["zeros", "repeat"])
def test_padding_is_hardly_stored(padding: str) -> None:
    """An episode costs one frame more for zeros before its first frame, and none for that frame repeated."""
    oracle = make_oracle(1_000, n_stack=4, padding=padding)
    oracle.streams[0].break_stacks = oracle.streams[0].reset_unannounced = False
    oracle.add(500)
    n_episodes = 1 + sum(step["done"] for (step,) in oracle.steps[:-1])
    # The last frame of an episode, and perhaps one of padding before its first
    assert oracle.buffer.extra_bytes <= n_episodes * 72 * (2 if padding == "zeros" else 1)


@pytest.mark.parametrize(
    "buffer_size, frame_shape, n_stack, shape, n_augmentations, capacity",
    [
        (1_000, (3, 100, 100), 3, (2, 50), 4, 18_750),
        (2_000, (3, 100, 100), 3, (2, 50), 4, 37_500),
        (10_000, (1, 84, 84), 4, (1, 576), 1, 30_625),
    ],
)
@pytest.mark.parametrize("latent_dtype, factor", [("float32", 1), ("float16", 2), ("uint8", 4)])
def test_capacity_is_the_papers(
    buffer_size: int,
    frame_shape: tuple[int, int, int],
    n_stack: int,
    shape: tuple[int, int],
    n_augmentations: int,
    capacity: int,
    latent_dtype: str,
    factor: int,
) -> None:
    space = image_space(n_stack, frame_shape)
    kwargs: dict[str, Any] = dict(n_stack=n_stack, n_augmentations=n_augmentations, augmentation=CycledCrop(4))
    for cap in (None, buffer_size, 20_000):
        buffer = LatentReplayBuffer(
            buffer_size, space, name_space(), latent_dtype=latent_dtype, max_latent_buffer_size=cap, **kwargs
        )
        buffer.encoder.codec = (
            LatentCodec("uint8", np.ones(shape), np.zeros(shape)) if latent_dtype == "uint8" else buffer.encoder.codec
        )
        buffer.set_encoder(StubEncoder((1, 1, 1), shape))
        expected = min(factor * capacity, cap or factor * capacity)
        plan = buffer.plan()
        assert (plan.image_transitions, plan.image_bytes) == (buffer_size, buffer_size * int(np.prod(frame_shape)))
        assert plan.latent_transitions == expected and plan.latent_bytes <= plan.image_bytes == buffer.nbytes
        assert f"{expected:,} transitions" in str(plan)
        buffer.to_latents()
        assert buffer.buffer_size == expected
        assert buffer.plan() == plan


def test_the_cap_is_over_all_envs() -> None:
    oracle = make_oracle(24, n_envs=3, max_latent_buffer_size=40)
    oracle.add(10)
    oracle.buffer.to_latents()
    assert oracle.buffer.buffer_size == 13
    oracle.add(30)
    check(oracle)


@pytest.mark.parametrize("n_envs", [1, 3])
def test_float16_latents_are_rounded_and_never_infinite(n_envs: int) -> None:
    oracle = make_oracle(n_envs=n_envs, latent_dtype="float16")
    oracle.buffer.encoder.policy.weights *= 40.0
    oracle.add(20)
    oracle.buffer.to_latents()
    oracle.add(20)
    assert oracle.buffer.encoder.n_clipped > 0
    samples = sample_all(oracle.buffer)
    obs = np.stack([oracle.expected(name, 1, GAMMA)["obs"] for name in samples.actions[:, 0].long().tolist()])
    exact = oracle.buffer.encoder.policy.encode(th.as_tensor(obs)).clamp(-65504.0, 65504.0)
    assert samples.observations.values.dtype == th.float32
    th.testing.assert_close(samples.observations.values, exact, rtol=2**-11, atol=0.0)


def test_uint8_latents_keep_their_range_and_count_what_leaves_it() -> None:
    oracle = make_oracle(40, latent_dtype="uint8", n_augmentations=2, crop=True)
    oracle.add(35)
    buffer, encoder = oracle.buffer, oracle.buffer.encoder.policy
    buffer.to_latents()

    def errors() -> tuple[np.ndarray, np.ndarray]:
        samples = sample_all(buffer, which=1)
        obs = [oracle.expected(name, 1, GAMMA)["obs"] for name in samples.actions[:, 0].long().tolist()]
        exact = encoder.encode(th.as_tensor(np.stack([buffer.encoder.augmentation.crop(o, 1) for o in obs]))).numpy()
        return np.abs(samples.observations.values.numpy() - exact), exact

    scale, offset = buffer.encoder.codec.scale, buffer.encoder.codec.offset
    error, exact = errors()
    inside = (exact >= offset - scale / 2) & (exact <= offset + 255.5 * scale)
    assert inside.mean() > 0.9 and (error <= 0.51 * scale)[inside].all()
    # The range comes from the observations it was fitted on, at most a little wider
    assert (255 * scale <= 1.05 * np.ptp(exact, axis=0) * 2).all()
    pickled(oracle)
    buffer, n_clipped = oracle.buffer, oracle.buffer.encoder.n_clipped
    encoder.weights *= 100.0
    oracle.add(3)
    assert buffer.encoder.n_clipped > n_clipped
    encoder.weights /= 100.0
    assert (sample_all(buffer).observations.values.numpy() <= offset + 255.0 * scale + 1e-3).all()


def test_uint8_zeros_of_a_relu_stay_exact() -> None:
    latents = np.random.RandomState(0).randn(50, 2, 3).clip(0.0).astype(np.float32)
    latents[:, 0, 0] = 0.0  # a dead unit
    codec = LatentCodec.fit(latents)
    codes, n_clipped = codec.encode(latents)
    assert n_clipped == 0 and codes.dtype == np.uint8
    decoded = codec.decode(th.as_tensor(codes)).numpy()
    assert (decoded[latents == 0.0] == 0.0).all()
    assert np.abs(decoded - latents).max() <= 0.51 * codec.scale.max()
    constant = np.full((4, 1, 1), 3.0, dtype=np.float32)
    codec = LatentCodec.fit(constant)
    for latents in (constant, constant + 0.5):
        np.testing.assert_allclose(codec.decode(th.as_tensor(codec.encode(latents)[0])), latents, atol=0.01)


def test_uint8_of_one_network_does_not_depend_on_the_range_of_another() -> None:
    latents = np.random.RandomState(0).randn(50, 2, 3).astype(np.float32)
    small = LatentCodec.fit(latents).scale
    latents[:, 0] *= 1000.0
    np.testing.assert_array_equal(LatentCodec.fit(latents).scale[1], small[1])


def test_uint8_needs_something_to_be_fitted_on() -> None:
    buffer = make_oracle(latent_dtype="uint8").buffer
    with pytest.raises(ValueError, match="codec"):
        buffer.to_latents()
    assert buffer.stage == "images"
    buffer.encoder.codec = LatentCodec("uint8", np.ones((2, 3)), np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"codec.*must have shape \(2, 2\).*got \(2, 3\)"):
        buffer.to_latents()
    buffer.encoder.codec = LatentCodec("uint8", np.ones((2, 2)), np.zeros((2, 2)))
    buffer.to_latents()
    assert buffer.stage == "latents"


@pytest.mark.parametrize("stage", ["images", "latents"])
def test_a_pickled_buffer_goes_on_exactly(stage: str) -> None:
    """Invariant 9: also with its ring wrapped, and one that was never added to."""
    oracle, other = make_oracle(n_envs=2, n_steps=3), make_oracle(n_envs=2, n_steps=3)
    pickled(oracle)
    for each in (oracle, other):
        each.add(40)
        if stage == "latents":
            each.buffer.to_latents()
        each.add(40)
    pickled(oracle)
    assert oracle.buffer.encoder_fingerprint == (None if stage == "images" else "stub")
    for each in (oracle, other):
        each.add(9)
        check(each)
    batches = []
    for each in (oracle, other):
        np.random.seed(0)
        samples = each.buffer.sample(32)
        batches.append([item.values if isinstance(item, Latents) else item for item in samples])
    assert all(map(th.equal, *batches))


@pytest.mark.parametrize("stage", ["images", "latents"])
def test_samples_go_to_the_device_that_the_buffer_was_given_last(stage: str) -> None:
    """SB3 sets ``device`` where a pickled buffer is loaded on another machine."""
    oracle = make_oracle(8, views=0.0)
    oracle.add(8)
    if stage == "latents":
        oracle.buffer.to_latents()
    oracle.buffer.device = th.device("meta")
    samples = oracle.buffer.sample(2)
    observations = [samples.observations, samples.next_observations]
    if stage == "latents":
        observations = [part.values for part in observations]
    for tensor in (*observations, samples.actions, samples.rewards, samples.dones):
        assert tensor.device.type == "meta"


def test_a_pickled_latent_buffer_asks_for_its_encoder() -> None:
    oracle = make_oracle()
    oracle.add(5)
    oracle.buffer.to_latents()
    oracle.buffer = pickle.loads(pickle.dumps(oracle.buffer))
    oracle.buffer.sample(4)
    with pytest.raises(RuntimeError, match="set_encoder"):
        oracle.add()


def test_a_freeze_that_fails_leaves_nothing_half_converted() -> None:
    oracle = make_oracle(200)
    oracle.add(200)
    encode, n_calls = oracle.buffer.encoder.policy.encode, []

    def fails(images: th.Tensor) -> th.Tensor:
        n_calls.append(len(images))
        if len(n_calls) == 3:
            raise MemoryError
        return encode(images)

    oracle.buffer.encoder.policy.encode = fails
    with pytest.raises(MemoryError):
        oracle.buffer.to_latents()
    assert max(n_calls) <= MAX_ENCODER_INPUTS
    assert oracle.buffer.stage == "images" and oracle.buffer.size() == 0
    oracle.n_held = 0
    oracle.add(30)
    check(oracle)


@pytest.mark.parametrize("fails_at", [3, 10, -1])
def test_a_freeze_that_fails_can_be_tried_again(fails_at: int) -> None:
    """Whatever it was doing: no array is left at another size, no range of latents is left that was fitted for it."""
    oracle, other = (make_oracle(60, n_envs=2, latent_dtype="uint8", prioritized=True) for _ in range(2))
    other.add(50)
    other.buffer.to_latents()
    n_calls = len(other.buffer.encoder.policy.n_inputs)
    oracle.add(50)
    policy = oracle.buffer.encoder.policy
    encode = policy.encode

    def fails(images: th.Tensor) -> th.Tensor:
        if len(policy.n_inputs) == fails_at % n_calls:
            raise MemoryError
        return encode(images)

    policy.encode = fails
    with pytest.raises(MemoryError):
        oracle.buffer.to_latents()
    policy.encode = encode
    assert oracle.buffer.size() == 0 and oracle.buffer.encoder.codec is None
    oracle.n_held, oracle.max_priority = 0, 1.0
    oracle.add(40)
    check(oracle)
    oracle.buffer.to_latents()
    assert oracle.buffer.size() == 30 and oracle.buffer.encoder.codec is not None


def test_integers_of_numpy_are_integers() -> None:
    oracle = make_oracle(np.int64(24), n_envs=np.int32(2), n_augmentations=np.int64(2), crop=True, n_steps=np.int64(3))
    oracle.add(20)
    saved(oracle)
    check(oracle)


def test_beta_stays_in_its_range_when_training_goes_on_for_a_few_steps() -> None:
    buffer = make_oracle(prioritized=True, beta=0.4, final_beta=0.8).buffer
    for progress_remaining, beta in ((1.0, 0.4), (0.5, 0.6), (0.0, 0.8), (-0.2, 0.8)):
        buffer.priorities.progress_remaining = progress_remaining
        assert buffer.priorities.beta == pytest.approx(beta)


def test_timeouts_work_together_with_optimize_memory_usage() -> None:
    """SB3 issue 934: SB3's own buffer refuses the two together."""
    oracle = make_oracle(optimize_memory_usage=True, handle_timeout_termination=True)
    oracle.add(60)
    check(oracle)


def test_what_is_sampled_is_not_shared() -> None:
    oracle = make_oracle()
    oracle.add(10)
    for tensor in sample_all(oracle.buffer)[:3]:
        tensor.zero_()
    check(oracle)


@pytest.mark.parametrize("views", [0.0, 1.0])
def test_arrays_that_were_added_may_be_written_over(views: float) -> None:
    """As by environments that use their arrays again."""
    oracle = make_oracle(n_envs=2, views=views)
    add = oracle.buffer.add

    def add_and_overwrite(obs: np.ndarray, next_obs: np.ndarray, *args: Any) -> None:
        add(obs, next_obs, *args)
        obs[:] = next_obs[:] = 7

    oracle.buffer.add = add_and_overwrite
    for _ in range(40):
        oracle.add()
        check(oracle)


@pytest.mark.parametrize("views", [0.0, 1.0])
def test_a_single_byte_that_did_not_move_on_is_kept(views: float) -> None:
    """Invariant 7: a stack is only rebuilt from its neighbours if every byte of it can be."""
    oracle, space, rng = make_oracle(views=views), image_space(3, (2, 3, 4)), np.random.RandomState(0)
    n_bytes, n_new = int(np.prod(space.shape)), 2 * 3 * 4
    for changed in range(n_bytes):
        frames = rng.randint(0, 256, size=(10, 3, 4)).astype(np.uint8)
        stacks = [frames[2 * i : 2 * i + 6].copy() for i in range(3)]
        stacks[1].flat[changed] ^= 1
        buffer = LatentReplayBuffer(3, space, name_space(), device="cpu", n_stack=3)
        for obs, next_obs in (stacks[:2], stacks[1:]):
            buffer.add(oracle.batch([obs]), oracle.batch([next_obs]), *np.zeros((3, 1)), [{}])
        samples = sample_all(buffer)
        np.testing.assert_array_equal(samples.observations, np.stack(stacks[:2]))
        np.testing.assert_array_equal(samples.next_observations, np.stack(stacks[1:]))
        # The first stack has 2 older frames, and so has the second unless it is the newest frame that differs
        assert buffer.extra_bytes == (2 if changed >= n_bytes - n_new else 4) * n_new


BAD_INPUT = [
    (dict(n_augmentations=0), "`n_augmentations` must be an integer >= 1, got 0"),
    (dict(n_augmentations=1.5), "`n_augmentations`.*1.5"),
    (dict(n_augmentations=2), "`n_augmentations` must be 1 without an augmentation, got 2"),
    (dict(latent_dtype="int8"), "`latent_dtype` must be one of 'float32', 'float16', 'uint8', got 'int8'"),
    (dict(n_stack=4), "`n_stack` must divide.*got 4"),
    (dict(n_stack=0), "`n_stack`.*>= 1, got 0"),
    (dict(n_steps=0), "`n_steps`.*>= 1, got 0"),
    (dict(buffer_size=60.0), "`buffer_size`.*>= 1, got 60.0"),
    (dict(max_latent_buffer_size=9), "`max_latent_buffer_size`.*buffer_size=10, got 9"),
    (dict(observation_space=spaces.Box(0, 1, (6,))), "`observation_space` must be a Box of images"),
    (dict(observation_space=spaces.Discrete(6)), "`observation_space` must be a Box of images"),
    (dict(observation_space=spaces.Dict(vector=spaces.Box(0, 1, (6,)))), "`observation_space`.*a Dict with some, got Dict"),
    (dict(prioritized=True, alpha=1.5), "`alpha` must be between 0 and 1, got 1.5"),
    (dict(prioritized=True, beta=-0.5), "`beta` must be between 0 and 1, got -0.5"),
    (dict(prioritized=True, final_beta=2.0), "`final_beta` must be between 0 and 1, got 2.0"),
]


@pytest.mark.parametrize("kwargs, message", BAD_INPUT)
def test_bad_input_names_parameter_and_what_is_allowed(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LatentReplayBuffer(**{**dict(buffer_size=10, observation_space=image_space(3), action_space=name_space()), **kwargs})


def test_a_latent_larger_than_its_image_is_refused_with_the_ways_out() -> None:
    oracle = make_oracle(100, n_augmentations=3, crop=True)  # 72 bytes a frame, 48 bytes of latents
    oracle.buffer.encoder.policy.latent_shape = (2, 5)  # 120 bytes
    oracle.buffer.set_encoder(oracle.buffer.encoder.policy)
    oracle.add(10)
    for refuses in (oracle.buffer.plan().check_capacity, oracle.buffer.to_latents):
        with pytest.raises(ValueError) as error:
            refuses()
        for way_out in ("'float16' holds 120", "'uint8' holds 240", "n_augmentations=1 holds 180", "has 3 numbers", "to 60"):
            assert way_out in str(error.value)
    check(oracle)


@pytest.mark.parametrize("interrupted", ["before", "after"])
@pytest.mark.parametrize("n_stack", [1, 3])
@pytest.mark.parametrize("stage", ["images", "latents"])
def test_ctrl_c_does_not_part_rows_from_their_observations(
    stage: str, n_stack: int, interrupted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the step is added that was interrupted or not: those before and after it are right."""
    oracle = make_oracle(40, n_envs=2, n_stack=n_stack)
    oracle.add(12)
    if stage == "latents":
        oracle.buffer.to_latents()
    oracle.add(60)
    buffer, store = oracle.buffer, cast(Any, oracle.buffer.store)
    advance = store._advance

    def interrupt(continues: np.ndarray) -> None:
        if interrupted == "after":
            advance(continues)
        raise KeyboardInterrupt

    n_before = 2 * len(oracle.steps)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store, "_advance", interrupt)
        oracle.add()
    oracle.add(3)
    samples = sample_all(buffer)
    names = samples.actions[:, 0].long().tolist()
    assert max(names) == n_before + 7 and ((n_before in names) == (interrupted == "after"))
    for i, name in enumerate(names):
        if name // 2 == n_before // 2:
            continue
        wanted = oracle.expected(name, 1, GAMMA)
        for got, image in ((samples.observations, wanted["obs"]), (samples.next_observations, wanted["next_obs"])):
            if isinstance(got, Latents):
                got, image = got.values, buffer.encoder.policy.encode(th.as_tensor(image[None]))[0]
            np.testing.assert_array_equal(got[i], image)


def test_what_takes_much_memory_beside_the_arena_is_said() -> None:
    def fill(n_stack: int, shifted: bool, n_steps: int) -> LatentReplayBuffer:
        buffer = make_oracle(40, n_stack=n_stack).buffer
        frames = np.random.RandomState(0).randint(256, size=(200, 2, 6, 6), dtype=np.uint8)
        for i in range(100):
            first, step = (i, 1) if shifted else (2 * i % 100, n_stack)
            obs, next_obs = (np.concatenate(frames[start : start + n_stack])[None] for start in (first, first + step))
            end = np.array([(i + 1) % n_steps == 0])
            buffer.add(obs, next_obs, np.zeros((1, 1)), np.zeros(1), end, [{}])
        return buffer

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fill(3, True, 50).check_extra_frames()
    with pytest.warns(UserWarning, match=r"stored images: the observations' stacks of 3 frames do not shift"):
        fill(3, False, 50).check_extra_frames()
    with pytest.warns(UserWarning, match=r"these episodes are short$"):
        fill(3, True, 1).check_extra_frames()
    buffer = fill(1, True, 1)
    with pytest.warns(UserWarning, match=r"stored images: an episode of n steps has n \+ 1 observations"):
        buffer.check_extra_frames()
    buffer.to_latents()
    with pytest.warns(UserWarning, match=r"stored latents: an episode of n steps"):
        for _ in range(300):
            image = np.zeros((1, 2, 6, 6), np.uint8)
            buffer.add(image, image, np.zeros((1, 1)), np.zeros(1), np.ones(1), [{}])
        buffer.check_extra_frames()

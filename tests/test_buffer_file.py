"""Replay buffers as files: what is written, what is refused, and what a kill leaves behind."""

import json
import os
import pickle
import random
import signal
import time
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3 import DQN
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer

from sb3_seer import SEERDQN, SEERQRDQN, SEERSAC
from sb3_seer.common.buffer_file import CHUNK_BYTES, load_buffer, save_buffer
from sb3_seer.common.replay import LatentReplayBuffer
from tests.helpers import DialEnv, LightEnv, TinyEncoder, assert_same, make_model, train_on
from tests.replay_oracle import Oracle, Stream, StubEncoder, image_space, make_oracle, name_space, sample_all, saved


def transitions(buffer: Any) -> dict[int, tuple[np.ndarray, ...]]:
    """:return: every transition that is held, by its name (its action)"""
    n_rows, found = buffer.size(), {}
    for env in range(buffer.n_envs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(np.random, "randint", lambda *_, env=env, **kwargs: np.full(kwargs["size"], env))
            samples = buffer._get_samples(np.arange(n_rows))
        for parts in zip(*(part.numpy() for part in samples if part is not None), strict=True):
            found[int(parts[1][0])] = parts
    return found


@pytest.mark.parametrize("n_steps", [0, 17, 40])
@pytest.mark.parametrize("optimize_memory_usage", [False, True])
@pytest.mark.parametrize("n_envs", [1, 3])
def test_a_pickle_of_sb3_loads(n_envs: int, optimize_memory_usage: bool, n_steps: int, tmp_path: Path) -> None:
    """Empty, partly full, and wrapped."""
    spaces = image_space(3), name_space()
    # SB3 cannot do both
    kwargs = dict(optimize_memory_usage=optimize_memory_usage, handle_timeout_termination=not optimize_memory_usage)
    theirs = ReplayBuffer(24 * n_envs, *spaces, device="cpu", n_envs=n_envs, **kwargs)
    rng = np.random.RandomState(0)
    streams = [Stream(rng, 3, "zeros") for _ in range(n_envs)]
    for stream in streams:
        # There, the next observation of an unannounced reset is lost
        stream.reset_unannounced = False
    Oracle(theirs, streams).add(n_steps)
    with open(tmp_path / "sb3.pkl", "wb") as file:
        pickle.dump(theirs, file)

    def make_buffer(**kwargs: Any) -> LatentReplayBuffer:
        return LatentReplayBuffer(
            observation_space=spaces[0], action_space=spaces[1], device="cpu", n_envs=n_envs, n_stack=3, **kwargs
        )

    encoder = StubEncoder(spaces[0].shape)
    ours = load_buffer(tmp_path / "sb3.pkl", make_buffer, encoder, frozen=False)
    assert ours.buffer_size == theirs.buffer_size and ours.stage == "images"
    # In that mode of SB3's, the next observation overwrites the oldest one, and is lost where an episode ended
    assert ours.size() == theirs.size() - (optimize_memory_usage and theirs.full)
    if n_steps:
        expected, got = transitions(theirs), transitions(ours)
        assert len(got) == ours.size() * n_envs and set(got) <= set(expected)
        for name, parts in got.items():
            for part, wanted in zip(parts, expected[name], strict=True):
                np.testing.assert_array_equal(part, wanted)


def test_a_project_that_changes_its_import_keeps_its_buffer(tmp_path: Path) -> None:
    """Pickles of DQN go on as images in SEERDQN, and as latents where it is frozen."""
    for n_steps, kind in ((1, ReplayBuffer), (3, NStepReplayBuffer)):
        upstream = DQN("CnnPolicy", LightEnv(size=48), buffer_size=50, learning_starts=10, n_steps=n_steps, device="cpu")
        assert type(upstream.replay_buffer) is kind
        upstream.learn(70)
        upstream.save_replay_buffer(tmp_path / "dqn")
        for frozen in (False, True):
            kwargs = dict(buffer_size=50, learning_starts=10, n_steps=n_steps, device="cpu", freeze_after=None)
            model = SEERDQN("CnnPolicy", LightEnv(size=48), policy_kwargs=dict(features_extractor_class=TinyEncoder), **kwargs)
            if frozen:
                with pytest.warns(UserWarning, match="before its first gradient step"):
                    model.freeze_encoder()
            model.load_replay_buffer(tmp_path / "dqn.pkl")
            assert model.replay_buffer.size() == 50 and model.replay_buffer.n_steps == n_steps
            assert model.replay_buffer.stage == ("latents" if frozen else "images")
            model.learn(20)
            assert model.replay_buffer.size() == (70 if frozen else 50)


@pytest.mark.parametrize("stage", ["images", "latents"])
def test_files_of_version_0_1_0_load(stage: str) -> None:
    """Wrapped and prioritised images; latents of a ring that has grown, in uint8. They were written, and sampled, by 0.1.0."""
    path = Path(__file__).parent / "data" / f"0.1.0_{stage}"
    with np.load(f"{path}_expected.npz") as arrays:
        expected = dict(arrays)
    kwargs = dict(prioritized=True) if stage == "images" else dict(n_augmentations=2, crop=True, latent_dtype="uint8")
    oracle = make_oracle(20, n_envs=2, n_stack=3, **kwargs)
    saved(oracle, f"{path}.pkl", frozen=stage == "latents")
    buffer = oracle.buffer
    assert buffer.stage == stage and buffer.size() == (10 if stage == "images" else 14)

    def check_all() -> None:
        for which in range(buffer.encoder.n_augmentations if stage == "latents" else 1):
            samples = sample_all(buffer, which)
            rows = [samples.actions[:, 0].tolist().index(name) for name in expected["actions"][:, 0].tolist()]
            for name in ("observations", "next_observations"):
                got = getattr(samples, name)
                got = got.values if stage == "latents" else got
                np.testing.assert_array_equal(got[rows], expected[f"{name}_{which}"])
            for name in ("rewards", "dones"):
                np.testing.assert_array_equal(getattr(samples, name)[rows], expected[name])
            if stage == "images":
                np.testing.assert_array_equal(buffer.priorities.values[samples.indices[rows]], expected["priorities"])

    check_all()
    if stage == "latents":  # there is room: it goes on with the episodes
        assert not expected["last_done"].any()
        buffer.encoder.policy.n_inputs.clear()
        obs = expected["last_next"]
        buffer.add(obs, obs, np.full((2, 1), 1e6), np.zeros(2), np.zeros(2), [{}, {}])
        assert buffer.encoder.policy.n_inputs == [2 * 2 + 2]  # the observations were encoded already
        check_all()
    saved(oracle)
    buffer = oracle.buffer
    check_all()


@pytest.mark.parametrize("stage", ["images", "latents"])
def test_only_what_is_filled_is_written_a_chunk_at_a_time(stage: str, tmp_path: Path) -> None:
    space = image_space(4, (1, 84, 84))
    make_buffer = partial(LatentReplayBuffer, observation_space=space, action_space=name_space(), device="cpu")
    buffer = make_buffer(buffer_size=4_000, n_stack=4)
    encoder = StubEncoder(space.shape, (1, 576))
    buffer.set_encoder(encoder)
    oracle = Oracle(buffer, [Stream(np.random.RandomState(0), 4, "repeat", frame_shape=(1, 84, 84))])
    oracle.streams[0].break_stacks = False
    oracle.add(1_000)
    if stage == "latents":
        buffer.to_latents()
    n_bytes = 1_000 * (7_056 if stage == "images" else 2_304)

    tracemalloc.start()
    save_buffer(buffer, tmp_path / "buffer")
    peak = tracemalloc.get_traced_memory()[1]
    file_size = (tmp_path / "buffer.pkl").stat().st_size
    assert peak < (file_size - n_bytes) + 1.5 * CHUNK_BYTES
    assert n_bytes < file_size < n_bytes + 4e6
    tracemalloc.reset_peak()
    loaded = load_buffer(tmp_path / "buffer", make_buffer, encoder, frozen=stage == "latents")
    own = loaded.nbytes + loaded.buffer_size * loaded.plan().step_bytes
    # The whole buffer (tracemalloc counts pages of it that were never touched), and the extra frames or a chunk twice
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < own + 2 * (file_size - n_bytes) + 1.5 * CHUNK_BYTES
    # numpy opens the file, too
    with np.load(tmp_path / "buffer.pkl", allow_pickle=False) as arrays:
        observations = [array for name, array in arrays.items() if name.startswith("observations/")]
        assert max(array.nbytes for array in observations) <= CHUNK_BYTES
        assert sum(array.nbytes for array in observations) == n_bytes
        np.testing.assert_array_equal(arrays["rewards/0"][:, 0], [step["reward"] for (step,) in oracle.steps])


def test_a_file_that_is_not_whole_is_refused_and_the_model_keeps_its_buffer(tmp_path: Path) -> None:
    model = make_model(SEERQRDQN, freeze_after=None)
    model.learn(60)
    model.save_replay_buffer(tmp_path / "buffer")
    whole, kept = (tmp_path / "buffer.pkl").read_bytes(), model.replay_buffer
    path = tmp_path / "damaged.pkl"

    def refuses(content: bytes, message: str) -> None:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path}.*{message}"):
            model.load_replay_buffer(path)
        assert model.replay_buffer is kept

    refuses(b"", "damaged")
    refuses(whole[:-100], "damaged")
    refuses(whole[: len(whole) // 2], "damaged")
    middle = whole.index(b"observations/0.npy") + 1_000
    refuses(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :], "damaged.*observations/0.npy")
    with np.load(tmp_path / "buffer.pkl") as saved:
        arrays = dict(saved)
    later = {**arrays, "meta": np.array(json.dumps({**json.loads(str(arrays["meta"])), "version": 99}))}
    np.savez(tmp_path / "later.npz", **later)
    refuses((tmp_path / "later.npz").read_bytes(), "version 99. Update sb3_seer")
    np.savez(tmp_path / "short.npz", **{**arrays, "rewards/0": arrays["rewards/0"][1:]})
    refuses((tmp_path / "short.npz").read_bytes(), "damaged.*rewards/1")
    # Any other zip, such as a saved model
    model.save(tmp_path / "model")
    refuses((tmp_path / "model.zip").read_bytes(), "not a replay buffer")
    path.write_bytes(whole)
    model.load_replay_buffer(path)
    assert_same(train_on(model), train_on(model_with(kept)))


def model_with(replay_buffer: LatentReplayBuffer) -> SEERQRDQN:
    model = make_model(SEERQRDQN, freeze_after=None)
    model.learn(60)
    model.replay_buffer = replay_buffer
    return model


def test_a_save_that_fails_leaves_the_file_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(SEERDQN, freeze_after=20)
    model.learn(30)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"model.zip", "buffer.pkl"}
    model.learn(30)

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(th, "save", full)
        with pytest.raises(OSError, match="No space left"):
            model.save(tmp_path / "model")
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        with pytest.raises(OSError, match="No space left"):
            model.save_replay_buffer(tmp_path / "buffer")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("algorithm", [SEERSAC, SEERDQN])
def test_a_prioritised_buffer_is_saved_and_survives_the_freeze(algorithm: Any, tmp_path: Path) -> None:
    model = make_model(algorithm, freeze_after=40, replay_buffer_kwargs=dict(prioritized=True, alpha=0.5))
    model.learn(60)
    buffer = model.replay_buffer
    assert buffer.stage == "latents" and len(np.unique(buffer.priorities.values)) > 10
    # The schedule of beta ends with the training
    assert buffer.priorities.beta == pytest.approx(1.0, abs=0.02)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = algorithm.load(tmp_path / "model", env=DialEnv() if algorithm is SEERSAC else LightEnv(), device="cpu")
    loaded.load_replay_buffer(tmp_path / "buffer")
    np.testing.assert_array_equal(loaded.replay_buffer.priorities.values, buffer.priorities.values)
    assert loaded.replay_buffer.priorities.beta == buffer.priorities.beta
    assert_same(train_on(model), train_on(loaded))


def test_priorities_come_and_go_with_the_model_that_loads() -> None:
    oracle = make_oracle(n_envs=2)
    oracle.add(30)
    saved(oracle, prioritized=True)
    assert set(oracle.buffer.priorities.values) == {1.0}
    saved(oracle, prioritized=False)
    assert oracle.buffer.priorities is None
    oracle.buffer.sample(4)


def save_over_and_over(model: SEERQRDQN, folder: Path, ready: int) -> None:
    """The child: saves, trains on, saves over that..."""
    while True:
        model.save(folder / "model")
        model.save_replay_buffer(folder / "buffer")
        os.write(ready, b".")
        model.learn(1, reset_num_timesteps=False)


def test_settings_of_numpy_are_saved(tmp_path: Path) -> None:
    settings = dict(handle_timeout_termination=np.bool_(False), prioritized=True, alpha=np.float32(0.5))
    model = make_model(SEERDQN, replay_buffer_kwargs=settings).learn(20)
    model.save_replay_buffer(tmp_path / "buffer")
    priorities = model.replay_buffer.priorities.values.copy()
    model.load_replay_buffer(tmp_path / "buffer")
    assert not model.replay_buffer.handle_timeout_termination
    np.testing.assert_array_equal(model.replay_buffer.priorities.values, priorities)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
def test_a_killed_process_leaves_whole_files(tmp_path: Path) -> None:
    """30 kills at random moments, 10 or more while saving: there always is a model and a buffer to go on with."""
    rng, n_killed, n_killed_while_saving = random.Random(0), 0, 0
    model = make_model(SEERQRDQN, freeze_after=50, buffer_size=4_000)
    model.learn(40)
    n_transitions = model.replay_buffer.size()
    while n_killed < 30 or n_killed_while_saving < 10 or not model.encoder_frozen:
        n_killed += 1
        assert n_killed < 200
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                save_over_and_over(model, tmp_path, writer)
            finally:
                os._exit(1)
        os.close(writer)
        for _ in range(rng.randint(1, 3)):
            assert os.read(reader, 1) == b"."
        time.sleep(rng.uniform(0.0, 0.1))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)

        temporary = [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"]
        n_killed_while_saving += len(temporary) > 0
        # What processes left that were killed before is gone
        assert all(f".{pid}-" in name for name in temporary)
        model = SEERQRDQN.load(tmp_path / "model", env=model.get_env(), device="cpu")
        model.load_replay_buffer(tmp_path / "buffer")
        # At most the buffer is one save older
        assert n_transitions <= model.replay_buffer.size() <= model.num_timesteps
        n_transitions = model.replay_buffer.size()
        model.replay_buffer.sample(4)
    assert model.replay_buffer.stage == "latents"

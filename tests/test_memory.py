"""The benchmark of memory: what it feeds the buffers with, and what it reports."""

import json
import os
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import DQN
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack

from benchmarks import memory


def test_buffers_are_fed_what_sb3_stores() -> None:
    n, size = 28, 36
    env = DummyVecEnv([partial(memory.NoiseEnv, spaces.Box(0, 255, (size, size, 1), np.uint8), spaces.Discrete(2), 7)])
    env.seed(0)
    model = DQN("CnnPolicy", VecFrameStack(env, 3), buffer_size=n, learning_starts=n + 1, train_freq=1)
    model.learn(n)
    stored: Any = model.replay_buffer

    env.seed(0)
    steps = list(islice(memory.play(env, n_stack=3), n))
    for key, arrays in dict(
        obs=stored.observations, next_obs=stored.next_observations, done=stored.dones, reward=stored.rewards
    ).items():
        np.testing.assert_array_equal([getattr(step, key) for step in steps], arrays)
    assert sum(step.infos[0]["TimeLimit.truncated"] for step in steps) == stored.timeouts.sum() == 4
    for step, after in pairwise(steps):
        assert step.done[0] or np.array_equal(after.obs, step.next_obs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, transitions, image, frame, latents",
    [("alien", 100, 4 * 84 * 84, 84 * 84, 576), ("walker", 10, 9 * 100 * 100, 3 * 100 * 100, 4 * 2 * 50)],
)
def test_the_benchmark_has_a_row_for_everything(
    name: str, transitions: int, image: int, frame: int, latents: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = memory.TASKS[name]
    try:
        task.make_env().close()
    except Exception as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"{task.name} cannot be drawn on this machine: {error!r}")
    path = tmp_path / "memory.json"
    # A fifth of the transitions for walker
    total = transitions * 5 if name == "walker" else transitions
    memory.main(["--quick", "--on", name, "--transitions", str(total), "--json", str(path)])
    results = json.loads(path.read_text())

    ours = {
        "images stage": frame,
        **{f"latents stage, {k}": b * latents for k, b in dict(float32=4, float16=2, uint8=1).items()},
    }
    per_transition = {row["buffer"]: row for row in results["bytes"]}
    for buffer, observation_bytes in {"SB3 ReplayBuffer": 2 * image, **ours}.items():
        row = per_transition[buffer]
        assert row["observation_bytes"] == observation_bytes
        # An action, a reward, a done and a timeout at least; a few whole frames, which are many bytes in so small a buffer
        assert observation_bytes + 4 * 4 <= row["all_bytes"] < 2 * observation_bytes + 200 + 10 * frame / transitions
        assert 1 / row["fit_in_1_GB"] == pytest.approx(row["all_bytes"] / 1e9, rel=0.01)

    times = {row["buffer"]: row for row in results["times"]}
    assert {"SB3 ReplayBuffer", *ours} <= set(times)
    assert ("images stage, random crop" in times) == (name == "walker")
    assert times["SB3 ReplayBuffer"]["ratio"] == 1.0
    assert all(row["sample_ms"] > 0 for row in times.values())
    assert all(times[buffer]["full_add_us"] > 0 for buffer in ("SB3 ReplayBuffer", "images stage"))

    for section in ("latent_adds", "freezes"):
        assert [row["latents"] for row in results[section]] == ["float32", "float16", "uint8"]
    assert all(row["add_ms"] > 0.5 * row["encoder_alone_ms"] > 0 for row in results["latent_adds"])
    assert len(results["peaks"]) == 1

    printed = capsys.readouterr().out
    assert all(title in printed for title in memory.TITLES.values())
    assert f"{2 * image:,}" in printed


def test_a_process_that_fails_is_no_measurement() -> None:
    with pytest.raises(RuntimeError, match="ended with exit code 1"):
        memory.peak_memory("no such task", 1)

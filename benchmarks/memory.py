"""
What a transition costs in memory and in time: SB3's replay buffer, a compressed one, and ours, before and after the freeze.

    python -m benchmarks.memory [--quick] [--on alien walker] [--transitions 10000] [--json memory.json]

The frames come from real environments with a random policy, the same for every buffer, and one torch thread does
everything. It takes up to 3 GB with the default of 10,000 transitions of Alien and a fifth of that of walker. The rows
of sb3-extra-buffers are left out where it is not installed: pip install "sb3-extra-buffers[zstd,lz4]==0.5.0".
"""

import argparse
import gc
import importlib
import json
import logging
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from unittest.mock import patch

import ale_py  # noqa: F401 (makes the games known)
import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecTransposeImage

from benchmarks.common import NoiseEnv, Row, in_turn, seconds, show
from sb3_seer import SEERDQN, SEERSAC, DataEfficientCNN, LatentReplayBuffer, PixelEncoder
from sb3_seer.common.encoding import MAX_ENCODER_INPUTS
from sb3_seer.common.memory import LATENT_DTYPES
from sb3_seer.common.seer import SEERMixin
from sb3_seer.envs import ActionRepeat, DMControlPixels

MB = 10**6
# Over the announced bytes: the encoder's activations, a chunk of the freeze, the allocator
PEAK_ALLOWANCE = 64 * MB
SB3, IMAGES, CROPPED, LATENTS = "SB3 ReplayBuffer", "images stage", "images stage, random crop", "latents stage"
# Methods of sb3-extra-buffers, and the modules that they need: zstd at its default level, of which python-zstd 1.5.7
# never gives back what it reserves to compress into; and what really takes the least memory, and the least time
COMPRESSIONS = {"zstd": "zstd", "gzip6": "gzip", "lz4-block/1": "lz4.block"}
# Times of a sample and of an added transition, relative to SB3's
SAMPLE_LIMITS = {IMAGES: 1.0, **{f"{LATENTS}, {dtype}": 0.2 for dtype in LATENT_DTYPES}}
ADD_LIMIT = 1.5
FREEZE_LIMIT = 60  # seconds
# Calls of one buffer before it is another's turn: what that leaves in the processor's caches is not to be measured
ADDS_IN_A_ROW, SAMPLES_IN_A_ROW = 50, 10

INSTALL = 'pip install "sb3-extra-buffers[zstd,lz4]==0.5.0"'

# ---- what is measured on ----


@dataclass(frozen=True)
class Task:
    """
    An environment, and how the paper learns it.

    :param name: of the environment
    :param make_env: makes it, with channels last
    :param observation_space: what the agent sees: channels first, ``n_stack`` frames
    :param action_space: actions of the agent
    :param n_stack: frames in an observation
    :param episode_length: steps of the agent in an episode, about
    :param batch_size: transitions sampled for a gradient step
    :param algorithm: of the agent
    :param policy_kwargs: of its networks
    :param crop: pixels that an observation is cropped to, None for no augmentation
    :param n_augmentations: K
    :param image_limit: bytes a transition that the images stage may hold, all included
    :param latent_limits: bytes a transition of stored latents, for each dtype
    """

    name: str
    make_env: Callable[[], VecEnv]
    observation_space: spaces.Box
    action_space: spaces.Space
    n_stack: int
    episode_length: int
    batch_size: int
    algorithm: type[SEERMixin]
    policy_kwargs: dict[str, Any]
    crop: int | None
    n_augmentations: int
    image_limit: int
    latent_limits: dict[str, int]

    def noise(self) -> VecEnv:
        """:return: an environment with the same spaces, channels last, whose frames no memory compresses"""
        channels, height, width = self.observation_space.shape
        space = spaces.Box(0, 255, (height, width, channels // self.n_stack), np.uint8)
        return make_vec_env(lambda: NoiseEnv(space, self.action_space, self.episode_length), seed=0)

    def images(self, n: int) -> th.Tensor:
        """:return: images for the encoder"""
        channels, height, width = self.observation_space.shape
        return th.zeros(n, channels, self.crop or height, self.crop or width, dtype=th.uint8)

    def model(self, transitions: int, augment: bool = True, **kwargs: Any) -> tuple[SEERMixin, LatentReplayBuffer]:
        """
        :param transitions: to hold as images
        :param augment: False for images that are sampled as they are
        :param kwargs: further arguments of the algorithm
        :return: a new agent, and its buffer
        """
        if augment and self.crop is not None:
            kwargs |= dict(augmentation="random_crop", augmentation_kwargs=dict(size=self.crop))
            kwargs |= dict(n_augmentations=self.n_augmentations)
        kwargs |= dict(buffer_size=transitions, policy_kwargs=self.policy_kwargs, device="cpu", seed=0)
        model = self.algorithm("CnnPolicy", VecFrameStack(self.noise(), self.n_stack), **kwargs)
        assert model.replay_buffer is not None
        return model, model.replay_buffer


def make_alien() -> VecEnv:
    return make_atari_env("AlienNoFrameskip-v4", seed=0)


def make_walker() -> VecEnv:
    return make_vec_env(lambda: DMControlPixels(ActionRepeat(gym.make("dm_control/walker-walk-v0"), repeat=2)), seed=0)


TASKS = {
    "alien": Task(
        name="AlienNoFrameskip-v4",
        make_env=make_alien,
        observation_space=spaces.Box(0, 255, (4, 84, 84), np.uint8),
        action_space=spaces.Discrete(18),
        n_stack=4,
        episode_length=200,
        batch_size=32,
        algorithm=SEERDQN,
        policy_kwargs=dict(features_extractor_class=DataEfficientCNN, net_arch=[256]),
        crop=None,
        n_augmentations=1,
        image_limit=7_400,
        latent_limits=dict(float32=2_304, float16=1_152, uint8=600),
    ),
    "walker": Task(
        name="dm_control/walker-walk-v0",
        make_env=make_walker,
        observation_space=spaces.Box(0, 255, (9, 100, 100), np.uint8),
        action_space=spaces.Box(-1, 1, (6,), np.float32),
        n_stack=3,
        episode_length=500,
        batch_size=128,
        algorithm=SEERSAC,
        policy_kwargs=dict(features_extractor_class=PixelEncoder, net_arch=[64]),
        crop=84,
        n_augmentations=4,
        image_limit=31_500,
        latent_limits=dict(float32=1_600, float16=800, uint8=450),
    ),
}


class Step(NamedTuple):
    """The arguments of ``ReplayBuffer.add``."""

    obs: np.ndarray
    next_obs: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    done: np.ndarray
    infos: list[dict[str, Any]]


def play(env: VecEnv, n_stack: int) -> Iterator[Step]:
    """
    :param env: one environment, channels last
    :param n_stack: frames to stack
    :return: what SB3 would store of a random policy, without an end. Neighbours share an observation
    """
    env = VecTransposeImage(VecFrameStack(env, n_stack))
    env.action_space.seed(0)
    obs = env.reset()
    assert isinstance(obs, np.ndarray)
    while True:
        action = np.array([env.action_space.sample()])
        new_obs, reward, done, infos = env.step(action)
        assert isinstance(new_obs, np.ndarray)
        next_obs = new_obs
        if done[0]:
            next_obs = infos[0]["terminal_observation"][None]
        yield Step(obs, next_obs, action, reward, done, infos)
        obs = new_obs


def record(task: Task, transitions: int) -> list[Step]:
    """:return: the first transitions of a random policy in the real environment"""
    env = task.make_env()
    steps = list(islice(play(env, task.n_stack), transitions))
    env.close()
    assert steps[0].obs.shape == (1, *task.observation_space.shape)
    return steps


def other_buffers(task: Task, transitions: int) -> dict[str, Callable[[], ReplayBuffer]]:
    """:return: makers of the buffers to compare with: SB3's, and sb3-extra-buffers' if installed"""
    arguments = (transitions, task.observation_space, task.action_space, "cpu")
    makers: dict[str, Callable[[], ReplayBuffer]] = {SB3: partial(ReplayBuffer, *arguments)}
    logging.getLogger("sb3_extra_buffers").setLevel(logging.ERROR)  # it lists what is installed
    for method, module in COMPRESSIONS.items():
        try:
            importlib.import_module(module)
            compressed = importlib.import_module("sb3_extra_buffers.compressed")
        except ImportError:
            continue
        maker = partial(compressed.CompressedReplayBuffer, *arguments, compression_method=method)
        makers[f"sb3-extra-buffers, {method}"] = maker
    return makers


Buffer = TypeVar("Buffer", bound=ReplayBuffer)


def fill(buffer: Buffer, steps: Iterable[Step]) -> Buffer:
    for step in steps:
        buffer.add(*step)
    return buffer


# ---- memory ----


@contextmanager
def counting() -> Iterator[Callable[[], int]]:
    """:return: a function that says how many bytes were allocated in this context and are still held"""

    def held() -> int:
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    gc.collect()
    tracemalloc.start()
    try:
        yield held
    finally:
        tracemalloc.stop()


def bytes_rows(task: Task, steps: list[Step]) -> list[Row]:
    """:return: bytes that a transition takes in each buffer when that is full: for its observations, and all included"""
    n = len(steps)
    rows: list[Row] = []

    def add_row(name: str, observation_bytes: float, total: float, limit: int | None = None, met: bool | None = None) -> None:
        row: Row = dict(environment=task.name, buffer=name, observation_bytes=round(observation_bytes))
        rows.append(row | dict(all_bytes=round(total), limit=limit, met=met, fit_in_1_GB=int(1e9 // total)))

    for name, make in other_buffers(task, n).items():
        with counting() as held:
            theirs = fill(make(), steps)
            total = held() / n
        arrays = theirs.observations, theirs.next_observations
        # Compressed observations are Python's bytes
        observation_bytes = sum(sum(map(len, a.flat)) if a.dtype == object else a.nbytes for a in arrays)
        add_row(name, observation_bytes / n, total)
        del theirs, arrays

    # Ours allocates with the first transition
    _, images = task.model(n)
    with counting() as held:
        fill(images, steps)
        total = held() / n
    add_row(IMAGES, images.nbytes / n, total, task.image_limit, total <= task.image_limit)

    for dtype, limit in task.latent_limits.items():
        model, latents = task.model(n, latent_dtype=dtype)
        # What latents say changes nothing in what they take
        shape = model.policy.latent_shape
        with (
            counting() as held,
            patch.object(model.policy, "encode", lambda images, shape=shape: th.zeros(len(images), *shape)),
        ):
            fill(latents, steps)
            latents.to_latents()
            fill(latents, islice(cycle(steps), latents.buffer_size - n))
            assert latents.full
            total = held() / latents.buffer_size
        record_bytes = latents.plan().record_bytes
        add_row(f"{LATENTS}, {dtype}", record_bytes, total, limit, record_bytes <= limit)
    return rows


def peak_rows(task_name: str, transitions: int) -> list[Row]:
    """:return: peak resident memory of a process that fills, freezes and refills a buffer until it is full again"""
    announced, peaks = peak_memory(task_name, transitions)
    row: Row = dict(environment=TASKS[task_name].name, images=transitions, announced_MB=announced / MB)
    row |= {f"{phase}_MB": peak / MB for phase, peak in peaks.items()}
    limit = announced + PEAK_ALLOWANCE
    return [row | dict(limit_MB=limit / MB, met=max(peaks.values()) <= limit)]


def peak_memory(task_name: str, transitions: int) -> tuple[int, dict[str, int]]:
    """
    Run ``child`` in its own process, and watch it from outside. Linux only.

    :param task_name: one of ``TASKS``
    :param transitions: to hold as images
    :return: the bytes that the buffer announces; for each phase, how far the resident memory rose over
        what it was before the buffer took any
    """
    code = f"from benchmarks.memory import child; child({task_name!r}, {transitions})"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        proc = Path(f"/proc/{process.pid}")
        baseline = announced = 0
        peaks: dict[str, int] = {}
        for line in process.stdout:
            phase, value = line.split()
            memory = dict(entry.split(":") for entry in (proc / "status").read_text().splitlines())
            if phase == "ready":
                baseline, announced = int(memory["VmRSS"].split()[0]) * 1024, int(value)
            else:
                peaks[phase] = int(memory["VmHWM"].split()[0]) * 1024 - baseline
            (proc / "clear_refs").write_text("5")  # the peak starts again, from what is resident now
            print(file=process.stdin, flush=True)
    if process.returncode != 0:
        raise RuntimeError(f"The process that was measured ended with exit code {process.returncode}")
    return announced, peaks


def child(task_name: str, transitions: int) -> None:
    """
    Fill, freeze and refill a buffer. Say when a phase is over, and wait until that was noted.

    :param task_name: one of ``TASKS``
    :param transitions: to hold as images
    """

    def report(phase: str, value: int = 0) -> None:
        gc.collect()
        print(phase, value, flush=True)
        sys.stdin.readline()

    th.set_num_threads(1)
    task = TASKS[task_name]
    steps = play(task.noise(), task.n_stack)
    model, buffer = task.model(transitions)
    # The memory that libraries take in their first call is not the buffer's
    model.policy.encode(task.images(MAX_ENCODER_INPUTS))
    next(steps)

    report("ready", buffer.plan().total_bytes)
    fill(buffer, islice(steps, transitions))
    report("fill")
    buffer.to_latents()
    report("freeze")
    fill(buffer, islice(steps, buffer.buffer_size - transitions))
    assert buffer.full
    report("refill")


# ---- time ----


def add_next(buffer: ReplayBuffer, steps: Iterator[Step]) -> None:
    buffer.add(*next(steps))


def time_rows(task: Task, steps: list[Step], repetitions: int) -> dict[str, list[Row]]:
    """:return: times of sampling and adding; of adding to latents, which calls the encoder; of the freeze"""
    n = len(steps)
    np.random.seed(0)
    buffers = {name: make() for name, make in other_buffers(task, n).items()}
    _, buffers[IMAGES] = task.model(n, augment=False)
    # Twice around the ring
    in_a_row = min(ADDS_IN_A_ROW, n)
    filling, full = (
        in_turn({name: partial(add_next, b, iter(steps)) for name, b in buffers.items()}, n, in_a_row) for _ in range(2)
    )

    if task.crop is not None:
        _, augmented = task.model(n)
        buffers[CROPPED] = fill(augmented, steps)
    freezes: list[Row] = []
    latent_adds: list[Row] = []
    # A new observation is encoded as often as it is augmented, and once without an augmentation to act on it
    n_inputs = 1 if task.crop is None else task.n_augmentations + 1
    images = task.images(n_inputs)
    for dtype in LATENT_DTYPES:
        model, latents = task.model(n, latent_dtype=dtype)
        fill(latents, steps)
        freeze = seconds(latents.to_latents)
        row: Row = dict(environment=task.name, latents=dtype, transitions=n, seconds=freeze)
        freezes.append(row | dict(limit=FREEZE_LIMIT, met=freeze <= FREEZE_LIMIT))
        functions = dict(add=partial(add_next, latents, cycle(steps)), encode=partial(model.policy.encode, images))
        times = in_turn(functions, repetitions)
        row = dict(environment=task.name, latents=dtype, add_ms=1e3 * times["add"])
        latent_adds.append(row | dict(encoder_alone_ms=1e3 * times["encode"], images_encoded=n_inputs))
        buffers[f"{LATENTS}, {dtype}"] = latents

    functions = {name: partial(b.sample, task.batch_size) for name, b in buffers.items()}
    samples = in_turn(functions, repetitions, SAMPLES_IN_A_ROW)
    rows: list[Row] = []
    for name, sample in samples.items():
        ratio, limit = sample / samples[SB3], SAMPLE_LIMITS.get(name)
        row = dict(environment=task.name, buffer=name, batch=task.batch_size, sample_ms=1e3 * sample)
        row |= dict(ratio=ratio, limit=limit, met=None if limit is None else ratio <= limit)
        row |= dict(add_us=None, full_add_us=None, add_ratio=None, add_met=None)
        if name in full:
            slowest = max(filling[name] / filling[SB3], full[name] / full[SB3])
            row |= dict(add_us=1e6 * filling[name], full_add_us=1e6 * full[name], add_ratio=slowest)
            row |= dict(add_met=slowest <= ADD_LIMIT if name == IMAGES else None)
        rows.append(row)
    return dict(times=rows, latent_adds=latent_adds, freezes=freezes)


# ---- what is shown ----

TITLES = {
    "bytes": "Bytes a transition in a full buffer (limits: on all bytes in the images stage, on the observation's as latents)",
    "times": "A sampled batch, and an added transition while the buffer fills and when it is full (medians; ratios to SB3's)",
    "latent_adds": "A transition added as latents, which takes a call of the encoder (medians)",
    "freezes": "Seconds for the freeze",
    "peaks": "Peak resident memory over the process's baseline, seen from outside",
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", nargs="+", choices=list(TASKS), default=list(TASKS), help="which environments")
    parser.add_argument("--transitions", type=int, help="of Alien; walker has a fifth (default: 10,000; 1,000 if quick)")
    parser.add_argument("--quick", action="store_true", help="everything small: a minute")
    parser.add_argument("--json", metavar="PATH", help="where to write the numbers")
    args = parser.parse_args(arguments)
    transitions = args.transitions or (1_000 if args.quick else 10_000)

    th.set_num_threads(1)
    results: dict[str, list[Row]] = {name: [] for name in TITLES}
    for name in args.on:
        task, n = TASKS[name], transitions // 5 if name == "walker" else transitions
        print(f"{task.name}: {n:,} transitions ...", file=sys.stderr)
        steps = record(task, n)
        results["bytes"] += bytes_rows(task, steps)
        for section, rows in time_rows(task, steps, repetitions=20 if args.quick else 200).items():
            results[section] += rows
        del steps
        results["peaks"] += peak_rows(name, n)

    for section, title in TITLES.items():
        show(title, results[section])
    missing = [method for method in COMPRESSIONS if not any(method in row["buffer"] for row in results["bytes"])]
    if missing:
        print(f"\nNot installed: sb3-extra-buffers ({', '.join(missing)}). To compare with it: {INSTALL}")
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

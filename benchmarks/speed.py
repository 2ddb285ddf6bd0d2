"""
How long a gradient step, an environment step and a whole run take: Stable-Baselines3's agents, and ours before and after the
freeze.

    python -m benchmarks.speed [--quick] [--threads 2] [--device auto] [--whole-run] [--json speed.json]

Each agent runs in its own process, as it does for its user, and all of a table are measured in turn, in the same run.
Our programs call ``tune_process()``, so the processes of SEER agents and of ``Rainbow`` do.
The frames are noise, in the sizes of the papers: control is 9x84x84 pixels (ours a random crop of 100x100, K = 4), batches
of 128, two hidden layers of 1024, 6 actions; Atari is 4x84x84 pixels, batches of 32, 18 actions. The environment step, and
with --whole-run (hours) the training, are of dm_control's cartpole-swingup.
"""

import argparse
import json
import multiprocessing as mp
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib import QRDQN
from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import get_device
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecFrameStack
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn
from torch import nn

from benchmarks.common import NoiseEnv, Row, seconds, show
from sb3_seer import SEERQRDQN, SEERSAC, DataEfficientCNN, PixelEncoder, Rainbow, SEERRainbow
from sb3_seer.common.process import tune_process
from sb3_seer.common.seer import SEERMixin
from sb3_seer.envs import ActionRepeat, DMControlPixels

# Transitions in a buffer that is sampled
N_TRANSITIONS = 400
CROP: dict[str, Any] = dict(augmentation="random_crop", augmentation_kwargs=dict(size=84), n_augmentations=4)
SAC_KWARGS: dict[str, Any] = dict(learning_starts=1_000, batch_size=128, buffer_size=10_000)
# Whole run: Table 4 of the paper's appendix, as in hyperparams/papers/sac_seer_paper.yml
RUN_STEPS, RUN_FREEZE, RUN_PARTS, EXTRAPOLATED_STEPS = 62_500, 10_000, 10, 200
RUN_KWARGS = SAC_KWARGS | dict(
    learning_rate=1e-3, tau=0.01, ent_coef="auto_0.1", train_freq=2, gradient_steps=2, target_update_interval=2
)


class PlainPixelEncoder(BaseFeaturesExtractor):
    """
    The layers of ``PixelEncoder``, written as one writes a features extractor for SB3.

    :param observation_space: 9 channels of 84x84 pixels
    """

    def __init__(self, observation_space: gym.Space) -> None:
        super().__init__(observation_space, features_dim=50)
        layers: list[nn.Module] = [nn.Conv2d(9, 32, kernel_size=3, stride=2), nn.ReLU()]
        for _ in range(3):
            layers += [nn.Conv2d(32, 32, kernel_size=3), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(39_200, 50), nn.LayerNorm(50))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        """:param observations: shape ``(batch_size, 9, 84, 84)``"""
        return self.net(observations)


# ---- the agents, each with its buffer filled ----


def filled(model: OffPolicyAlgorithm, freeze: bool = False) -> Callable[[], None]:
    """
    :param model: a new agent
    :param freeze: whether to freeze its encoder
    :return: one gradient step of it, with a buffer of random actions
    """
    if isinstance(model, SEERMixin | Rainbow):
        tune_process()
    model.learning_starts = N_TRANSITIONS + 1
    model.learn(N_TRANSITIONS)
    if freeze:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the encoder has learned nothing: here it is to be fast only
            model.freeze_encoder()  # type: ignore[attr-defined]
    return partial(model.train, gradient_steps=1, batch_size=model.batch_size)


def noise_env(action_space: spaces.Space, n_stack: int, episode_length: int, *shape: int) -> VecEnv:
    """:return: frames of this shape, stacked, or vectors"""
    is_image = len(shape) == 3
    space = spaces.Box(0, 255, shape, np.uint8) if is_image else spaces.Box(-np.inf, np.inf, shape)
    env = make_vec_env(lambda: NoiseEnv(space, action_space, episode_length), seed=0)
    return VecFrameStack(env, n_stack) if is_image else env


control_env = partial(noise_env, spaces.Box(-1, 1, (6,)), 3, 125)
atari_env = partial(noise_env, spaces.Discrete(18), 4, 200)


def sac(extractor: type[BaseFeaturesExtractor], device: str) -> Callable[[], None]:
    policy_kwargs = dict(features_extractor_class=extractor, net_arch=[1024, 1024])
    kwargs = SAC_KWARGS | dict(buffer_size=1_000)
    return filled(SAC("CnnPolicy", control_env(84, 84, 3), policy_kwargs=policy_kwargs, device=device, **kwargs))


def sac_on_vectors(device: str) -> Callable[[], None]:
    return filled(SAC("MlpPolicy", control_env(50), policy_kwargs=dict(net_arch=[1024, 1024]), device=device, **SAC_KWARGS))


def seer_sac(device: str, freeze: bool = False, encoder_dtype: str = "float32") -> Callable[[], None]:
    policy_kwargs = dict(features_extractor_class=PixelEncoder, net_arch=[1024, 1024], encoder_dtype=encoder_dtype)
    env, kwargs = control_env(100, 100, 3), CROP | SAC_KWARGS
    model = SEERSAC("CnnPolicy", env, policy_kwargs=policy_kwargs, freeze_after=None, device=device, **kwargs)
    return filled(model, freeze)


ATARI_KWARGS: dict[str, Any] = dict(buffer_size=10_000, batch_size=32, learning_rate=1e-4, gamma=0.99)


def qrdqn_on_vectors(device: str) -> Callable[[], None]:
    return filled(QRDQN("MlpPolicy", atari_env(576), policy_kwargs=dict(net_arch=[256]), device=device, **ATARI_KWARGS))


def seer_qrdqn(device: str) -> Callable[[], None]:
    policy_kwargs = dict(features_extractor_class=DataEfficientCNN, net_arch=[256])
    kwargs = ATARI_KWARGS | dict(policy_kwargs=policy_kwargs, freeze_after=None)
    return filled(SEERQRDQN("CnnPolicy", atari_env(84, 84, 1), device=device, **kwargs), freeze=True)


def rainbow(algorithm: type[Rainbow], device: str, freeze: bool = False) -> Callable[[], None]:
    optimizer = dict(optimizer_class=th.optim.Adam, optimizer_kwargs=dict(eps=1.5e-4, fused=True))
    policy_kwargs = dict(features_extractor_class=DataEfficientCNN, net_arch=[256], sigma0=0.1, **optimizer)
    kwargs = ATARI_KWARGS | dict(policy_kwargs=policy_kwargs, n_steps=20)
    if algorithm is SEERRainbow:
        kwargs |= dict(freeze_after=None)
    return filled(algorithm("CnnPolicy", atari_env(84, 84, 1), device=device, **kwargs), freeze)


# ---- the environment's loop ----


class StepTimer(VecEnvWrapper):
    """Counts the seconds that the environment takes for its steps."""

    seconds = 0.0

    def reset(self) -> Any:
        return self.venv.reset()

    def step_async(self, actions: np.ndarray) -> None:
        self.start = time.perf_counter()
        self.venv.step_async(actions)

    def step_wait(self) -> VecEnvStepReturn:
        result = self.venv.step_wait()
        self.seconds += time.perf_counter() - self.start
        return result


def cartpole(size: int) -> VecEnv:
    """:return: dm_control's cartpole-swingup, three frames of size x size pixels"""
    make_env = lambda: DMControlPixels(ActionRepeat(gym.make("dm_control/cartpole-swingup-v0"), repeat=8), size, size)  # noqa: E731
    return VecFrameStack(make_vec_env(make_env, seed=0), 3)


def seer_cartpole(device: str, env: VecEnv, freeze_after: int | None = None) -> SEERSAC:
    policy_kwargs = dict(features_extractor_class=PixelEncoder, net_arch=[1024, 1024])
    kwargs: dict[str, Any] = CROP | RUN_KWARGS | dict(policy_kwargs=policy_kwargs, freeze_after=freeze_after)
    return SEERSAC("CnnPolicy", env, device=device, **kwargs)


def sac_cartpole(device: str, starts: int) -> Callable[[], object]:
    """:return: as many steps of SB3's SAC as there are between its updates, with these, after ``starts`` random steps"""
    policy_kwargs = dict(features_extractor_class=PlainPixelEncoder, net_arch=[1024, 1024])
    model = SAC("CnnPolicy", cartpole(84), policy_kwargs=policy_kwargs, device=device, **RUN_KWARGS)
    model.learning_starts = starts
    model.learn(starts)
    return partial(model.learn, RUN_KWARGS["train_freq"], reset_num_timesteps=False)


def environment_step(device: str) -> Callable[[], tuple[float, float]]:
    """:return: a function that measures a step of the latents stage without the environment, and its encoding, in seconds"""
    env = StepTimer(cartpole(100))
    model = seer_cartpole(device, env)
    filled(model, freeze=True)
    model.learning_starts = 0
    model.train = lambda *args, **kwargs: None  # type: ignore[method-assign]
    encode, calls = model.policy.encode, []

    def timed_encode(images: th.Tensor) -> th.Tensor:
        # In its place, with the caches as the renderer leaves them: called in a row it takes two thirds of that
        start = time.perf_counter()
        latents = encode(images)
        if device.startswith("cuda"):
            th.cuda.synchronize(device)
        calls.append(time.perf_counter() - start)
        return latents

    model.policy.encode = timed_encode

    def step() -> tuple[float, float]:
        steps = 50
        env.seconds = 0.0
        calls.clear()
        whole = seconds(lambda: model.learn(steps, reset_num_timesteps=False))
        return (whole - env.seconds) / steps, sum(calls) / steps

    return step


# ---- processes ----


def serve(make: Callable[[], Callable[[], object]], n_threads: int, device: str, pipe: Connection) -> None:
    """Make an agent, and take its gradient steps when asked to: as many as are asked for. None is the end."""
    th.set_num_threads(n_threads)
    step = make()

    def timed() -> float:
        start = time.perf_counter()
        step()
        if device.startswith("cuda"):
            th.cuda.synchronize(device)
        return time.perf_counter() - start

    for _ in range(2):
        step()
    pipe.send("ready")
    while (n := pipe.recv()) is not None:
        pipe.send([timed() for _ in range(n)])


def spawn(make: Callable[[], Callable[[], object]], n_threads: int, device: str) -> tuple[BaseProcess, Connection]:
    """:return: a process that serves the gradient steps of a new agent, and where to ask it for them"""
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(make, n_threads, device, theirs), daemon=True)
    process.start()
    ours.recv()
    return process, ours


Agents = dict[str, Callable[[], Callable[[], object]]]


def measure(agents: Agents, rounds: int, in_a_row: int, n_threads: int, device: str) -> dict[str, float]:
    """
    :param agents: what makes each
    :param rounds: turns of each, every time in another order
    :param in_a_row: gradient steps in a turn
    :return: median milliseconds of a gradient step
    """
    processes = {name: spawn(make, n_threads, device) for name, make in agents.items()}
    times: dict[str, list[float]] = {name: [] for name in agents}
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        for name in rng.permutation(list(agents)):
            _, pipe = processes[name]
            pipe.send(in_a_row)
            times[name] += pipe.recv()
    for process, pipe in processes.values():
        pipe.send(None)
        process.join()
    return {name: 1e3 * float(np.median(values)) for name, values in times.items()}


# ---- what is shown ----

PIXELS, ENCODER, VECTORS = "SAC, pixels", "SAC, pixels, our PixelEncoder", "SAC, vectors of 50"
SAC_IMAGES, SAC_BFLOAT16, SAC_LATENTS = "SEERSAC, images", "SEERSAC, images, bfloat16", "SEERSAC, latents"
QRDQN_VECTORS, QRDQN_LATENTS = "QRDQN, vectors of 576", "SEERQRDQN, latents"
RAINBOW, RAINBOW_IMAGES, RAINBOW_LATENTS = "Rainbow, pixels", "SEERRainbow, images", "SEERRainbow, latents"

# Ours, what it is compared with, and how many times as fast it is to be
COMPARISONS: list[tuple[str, str, float | None]] = [
    (SAC_IMAGES, PIXELS, 2.5),
    (SAC_IMAGES, ENCODER, None),
    (SAC_BFLOAT16, PIXELS, 4.0),
    (SAC_LATENTS, VECTORS, 1.2),
    (SAC_LATENTS, PIXELS, 22.0),
    (QRDQN_LATENTS, QRDQN_VECTORS, 1.0),
    (RAINBOW_IMAGES, RAINBOW, 1.0),
    (RAINBOW_LATENTS, RAINBOW, 1.0),
    (RAINBOW_LATENTS, RAINBOW_IMAGES, 4.0),
]


def agents(device: str) -> list[Agents]:
    """:return: the agents that are measured in turn with each other"""
    control: Agents = {
        PIXELS: partial(sac, PlainPixelEncoder, device),
        ENCODER: partial(sac, PixelEncoder, device),
        VECTORS: partial(sac_on_vectors, device),
        SAC_IMAGES: partial(seer_sac, device),
        SAC_BFLOAT16: partial(seer_sac, device, encoder_dtype="bfloat16"),
        SAC_LATENTS: partial(seer_sac, device, freeze=True),
    }
    atari: Agents = {
        QRDQN_VECTORS: partial(qrdqn_on_vectors, device),
        QRDQN_LATENTS: partial(seer_qrdqn, device),
        RAINBOW: partial(rainbow, Rainbow, device),
        RAINBOW_IMAGES: partial(rainbow, SEERRainbow, device),
        RAINBOW_LATENTS: partial(rainbow, SEERRainbow, device, freeze=True),
    }
    return [control, atari]


def update_rows(device: str, n_threads: int, quick: bool) -> list[Row]:
    """:return: gradient steps"""
    control, atari = agents(device)
    times = measure(control, 3 if quick else 10, 3, n_threads, device)
    times |= measure(atari, 3 if quick else 20, 10, n_threads, device)
    rows = []
    for ours, theirs, limit in COMPARISONS:
        ratio = times[theirs] / times[ours]
        row: Row = {"ours": ours, "compared with": theirs, "ours ms": times[ours], "theirs ms": times[theirs]}
        rows.append(row | {"times as fast": ratio, "limit": limit, "met": None if limit is None else ratio >= limit})
    return rows


def environment_rows(device: str, n_threads: int, quick: bool) -> list[Row]:
    """:return: acting and storing latents in a step of cartpole-swingup, the environment itself left out"""
    th.set_num_threads(n_threads)
    measure_step = environment_step(device)
    step, encode = 1e3 * np.median([measure_step() for _ in range(3 if quick else 10)], axis=0)
    ratio = float(step / encode)
    name = "acting and storing, latents, K = 4"
    return [{"step": name, "ms": float(step), "encoder ms": float(encode), "ratio": ratio, "limit": 1.3, "met": ratio <= 1.3}]


def startup_rows(device: str, n_threads: int, quick: bool) -> list[Row]:
    """:return: what the start-up hook for RL Zoo adds to each Python process, with its modules compiled"""
    command = [sys.executable, "-X", "importtime", "-c", "pass"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    times = []
    for _ in range(5 if quick else 50):
        lines = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stderr.splitlines()
        # import time: self [us] | cumulative [us] | module
        times += [int(line.split("|")[1]) for line in lines if line.split("|")[-1].strip() == "zoo_integration.hook"]
    if not times:
        return [{"hook": "not installed", "ms": None, "limit": 1.0, "met": None}]
    fastest = min(times) / 1e3
    return [{"hook": "zoo_integration.hook", "ms": fastest, "limit": 1.0, "met": fastest <= 1.0}]


def whole_run_rows(device: str, n_threads: int, quick: bool) -> list[Row]:
    """:return: hours of a training; of SB3's SAC extrapolated from a few steps, taken in turn with parts of ours"""
    th.set_num_threads(n_threads)
    run_steps = RUN_STEPS // 100 if quick else RUN_STEPS
    tune_process()
    starts = 100 if quick else RUN_KWARGS["learning_starts"]
    ours = seer_cartpole(device, cartpole(100), freeze_after=run_steps * RUN_FREEZE // RUN_STEPS)
    ours.learning_starts = starts
    process, theirs = spawn(partial(sac_cartpole, device, starts), n_threads, device)
    theirs_seconds = ours_seconds = 0.0
    for _ in range(RUN_PARTS):  # a machine that others use, too, is not as fast for hours
        theirs.send(EXTRAPOLATED_STEPS // RUN_PARTS // RUN_KWARGS["train_freq"])
        theirs_seconds += sum(theirs.recv())
        ours_seconds += seconds(partial(ours.learn, run_steps // RUN_PARTS, reset_num_timesteps=False))
    theirs.send(None)
    process.join()
    theirs_hours, ours_hours = theirs_seconds / EXTRAPOLATED_STEPS * (run_steps - starts) / 3600, ours_seconds / 3600
    ratio = theirs_hours / ours_hours
    row: Row = {"run": f"cartpole-swingup, {run_steps:,} steps", "ours h": ours_hours, "SAC, pixels h": theirs_hours}
    return [row | {"times as fast": ratio, "limit": 8.0, "met": ratio >= 8.0}]


def machine(device: str, n_threads: int) -> str:
    """:return: what everything was measured on"""
    processor = platform.processor()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    accelerator = f", {th.cuda.get_device_name(device)}" if device.startswith("cuda") else ""
    return f"{processor}, {n_threads} threads{accelerator}, PyTorch {th.__version__}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions: for a first look")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch, on the CPU")
    parser.add_argument("--device", default="auto", help="of the agents")
    parser.add_argument("--whole-run", action="store_true", help="train on cartpole-swingup, too: hours")
    parser.add_argument("--json", metavar="PATH", help="where to write the numbers")
    args = parser.parse_args(arguments)
    device = str(get_device(args.device))
    if not device.startswith(args.device) and args.device != "auto":
        parser.error(f"`--device` must be there, got {args.device!r}")

    print(machine(device, args.threads))
    results: dict[str, Any] = dict(machine=machine(device, args.threads))
    tables: dict[str, tuple[str, Callable[[str, int, bool], list[Row]]]] = dict(
        updates=("A gradient step (medians)", update_rows),
        environment_step=("A step of cartpole-swingup, without the environment (medians)", environment_rows),
        startup=("The start of a Python process (fastest)", startup_rows),
    )
    if args.whole_run:
        tables |= dict(whole_run=("A whole run", whole_run_rows))
    for name, (title, rows) in tables.items():
        results[name] = rows(device, args.threads, args.quick)
        show(title, results[name])
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""
Train an agent on an Atari game through the freeze, in a few minutes on two cores, and show what the freeze changes.

    python -m benchmarks.demo [--game Alien] [--total-timesteps 20000] [--output demo.png]
"""

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path

import ale_py  # noqa: F401 (makes the games known)
import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecFrameStack

from sb3_seer import SEERDQN, DataEfficientCNN, LatentReplayBuffer
from sb3_seer.common.process import tune_process
from sb3_seer.plots import make_figure


@dataclass
class Stage:
    """What was measured in one stage of the replay buffer."""

    steps: int = 0
    seconds: float = 0.0
    updates: int = 0
    update_seconds: float = 0.0
    transitions: int = 0
    capacity: int = 0
    nbytes: int = 0
    returns: list[float] = field(default_factory=list)

    def column(self) -> list[str]:
        """:return: one column of the table, see ``ROWS``"""
        return [
            f"{self.steps / self.seconds:,.0f}",
            f"{1000 * self.update_seconds / self.updates:.2f}",
            f"{self.transitions:,}",
            f"{self.capacity:,}",
            f"{self.nbytes / 1e6:,.1f} MB",
            f"{np.mean(self.returns):.1f}" if self.returns else "-",
        ]


ROWS = [
    "steps per second",
    "milliseconds per update",
    "transitions held",
    "transitions that fit",
    "bytes for observations",
    "mean return of the episodes",
]


class Measure(BaseCallback):
    """
    Times the rollouts and the updates between them, before and after the freeze. What has no update (the steps
    before learning starts) is not measured, nor is the rollout in which the images become latents.
    """

    model: SEERDQN

    def __init__(self) -> None:
        super().__init__()
        self.stages = {"images": Stage(), "latents": Stage()}
        self.episodes: list[tuple[int, float]] = []
        self.freeze_step = 0
        self._rollout_start: tuple[float, str] | None = None
        self._rollout_end = 0.0
        self._n_updates = 0
        self._n_calls = 0

    @property
    def buffer(self) -> LatentReplayBuffer:
        assert self.model.replay_buffer is not None
        return self.model.replay_buffer

    def _on_rollout_start(self) -> None:
        now, name = time.perf_counter(), self.buffer.stage
        n_updates = self.model._n_updates - self._n_updates
        if self._rollout_start is not None and self._rollout_start[1] == name and n_updates > 0:
            stage = self.stages[name]
            stage.steps += self.n_calls - self._n_calls
            stage.seconds += now - self._rollout_start[0]
            stage.updates += n_updates
            stage.update_seconds += now - self._rollout_end
        self._rollout_start, self._n_updates, self._n_calls = (now, name), self.model._n_updates, self.n_calls

    def _on_rollout_end(self) -> None:
        self._rollout_end = time.perf_counter()

    def _on_step(self) -> bool:
        buffer = self.buffer
        stage = self.stages[buffer.stage]
        stage.transitions, stage.capacity, stage.nbytes = buffer.size(), buffer.buffer_size, buffer.nbytes
        if buffer.stage == "images":
            self.freeze_step = self.num_timesteps
        for info in self.locals["infos"]:
            if "episode" in info:
                stage.returns.append(info["episode"]["r"])
                self.episodes.append((self.num_timesteps, info["episode"]["r"]))
        return True


def show(measure: Measure, title: str, path: str) -> None:
    """Print the table, and draw it above the returns of the training."""
    columns = [stage.column() for stage in measure.stages.values()]
    cells = [[before, after] for before, after in zip(*columns, strict=True)]
    print(f"\n{title}\n{'':<30}{'before the freeze':>20}{'after it':>20}")
    for row, (before, after) in zip(ROWS, cells, strict=True):
        print(f"{row:<30}{before:>20}{after:>20}")

    figure = make_figure(8, 6)
    top, bottom = figure.subplots(2, height_ratios=(1, 1.4))
    top.axis("off")
    top.set_title(title)
    table = top.table(cells, rowLabels=ROWS, colLabels=["before the freeze", "after it"], loc="center", cellLoc="right")
    table.scale(0.65, 1.4)
    steps, returns = zip(*measure.episodes, strict=True) if measure.episodes else ((), ())
    bottom.plot(steps, returns, ".", label="episode")
    bottom.axvline(measure.freeze_step, linestyle=":", color="black", label="freeze")
    bottom.set(xlabel="steps", ylabel="return")
    bottom.legend()
    figure.savefig(path, dpi=120)
    print(f"\nDrawn in {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--game", default="Alien", help="an Atari game of ale-py")
    parser.add_argument("--total-timesteps", type=int, default=20_000)
    parser.add_argument("--output", default="demo.png", help="where to draw")
    args = parser.parse_args()
    if args.total_timesteps < 1000:
        parser.error(f"`--total-timesteps` must be >= 1,000, got {args.total_timesteps}")
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)

    tune_process()
    # The networks are small: more threads would mostly wait for each other
    th.set_num_threads(1)
    env = VecFrameStack(make_atari_env(f"{args.game}NoFrameskip-v4", seed=0), n_stack=4)
    # The settings of hyperparams/dqn_seer.yml, for a short run
    model = SEERDQN(
        "CnnPolicy",
        env,
        buffer_size=args.total_timesteps // 3,
        freeze_after=0.3,
        learning_starts=min(1000, args.total_timesteps // 10),
        n_steps=20,
        train_freq=1,
        target_update_interval=2000,
        exploration_fraction=0.2,
        policy_kwargs=dict(features_extractor_class=DataEfficientCNN, net_arch=[256]),
        seed=0,
    )
    print(model.replay_buffer.plan())
    measure = Measure()
    model.learn(args.total_timesteps, callback=measure, progress_bar=True)
    show(measure, f"SEERDQN on {args.game}, {args.total_timesteps:,} steps, one CPU thread", args.output)
    env.close()


if __name__ == "__main__":
    main()

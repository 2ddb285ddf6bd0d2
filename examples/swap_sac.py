"""
Swap SAC for SEERSAC in an existing project: the same script with both, and what changes.

    python examples/swap_sac.py --algo sac
    python examples/swap_sac.py --algo sac_seer [--env CarRacing-v3] [--total-timesteps 100000]

The lines that the swap needs are marked. docs/guides/existing_project.md goes through them step by step.
"""

import argparse
import time
from typing import Any

import gymnasium as gym
import torch as th
from gymnasium.wrappers import ResizeObservation
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback

from sb3_seer import SEERSAC  # <- the import
from sb3_seer.common.process import tune_process

ALGORITHMS: dict[str, type[SAC]] = {"sac": SAC, "sac_seer": SEERSAC}


class GradientSteps(BaseCallback):
    """Times the updates: what lies between the end of a rollout and the start of the next."""

    model: SAC

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[bool, list[float]] = {False: [], True: []}  # by whether the encoder was frozen
        self.end: float | None = None

    def _on_rollout_start(self) -> None:
        if self.end is not None and self.num_timesteps > self.model.learning_starts:
            self.seconds[getattr(self.model, "encoder_frozen", False)].append(time.perf_counter() - self.end)

    def _on_rollout_end(self) -> None:
        self.end = time.perf_counter()

    def _on_step(self) -> bool:
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algo", choices=list(ALGORITHMS), default="sac_seer")
    parser.add_argument("--env", default="CarRacing-v3")
    parser.add_argument("--total-timesteps", type=int, default=100_000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=th.get_num_threads())
    args = parser.parse_args()

    tune_process()
    th.set_num_threads(args.threads)
    env = ResizeObservation(gym.make(args.env), (64, 64))
    kwargs: dict[str, Any] = dict(
        buffer_size=args.total_timesteps, batch_size=args.batch_size, learning_starts=args.total_timesteps // 10, seed=0
    )
    if args.algo == "sac_seer":
        # <- T_f, and a buffer of the images until then: in the same bytes, it holds all later transitions as latents
        kwargs |= dict(freeze_after=args.total_timesteps // 5, buffer_size=args.total_timesteps // 5)
    model = ALGORITHMS[args.algo]("CnnPolicy", env, verbose=1, **kwargs)
    timer = GradientSteps()
    model.learn(args.total_timesteps, callback=timer)

    for frozen, seconds in timer.seconds.items():
        if seconds:
            stage = "after the freeze" if frozen else "from images"
            print(f"{stage}: {1000 * sum(seconds) / len(seconds):.1f} ms an update")
    model.save(f"{args.algo}_{args.env}")


if __name__ == "__main__":
    main()

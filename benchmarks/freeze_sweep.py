"""
When should an encoder be frozen? Trains with T_f at several fractions of the steps, never, and "auto": a table and a figure.

    PYTHONPATH=examples python -m benchmarks.freeze_sweep puck catch --seeds 0 1 -o freeze_sweep
    PYTHONPATH=examples python -m benchmarks.freeze_sweep "sac_seer dm_control/cartpole-swingup-v0 -conf \
        sac_seer_small_images.yml --eval-freq 2500 --eval-episodes 10" --params buffer_size:37500 -o cartpole_freeze

On the two small tasks, the fractions go on from checkpoints of the run that is never frozen: until a freeze they are the same.
Anything else is a training of RL Zoo (algorithm, environment, more arguments), made from the start if its logs are not there.
"""

import argparse
import csv
import hashlib
import io
import shlex
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecFrameStack

from sb3_seer.plots import Run, make_figure
from tests.helpers import PuckEnv, make_puck_model

FRACTIONS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6)
STEPS = dict(puck=2000, catch=5000)
Row = namedtuple("Row", "task seed freeze_after frozen_at mean_return flops")


def make_env(task: str, seed: int) -> Any:
    from own_environment import Catch  # in examples/, only for the small tasks

    return make_vec_env(Catch, seed=seed) if task == "catch" else VecFrameStack(make_vec_env(PuckEnv, seed=seed), 2)


def make_agent(task: str, seed: int, freeze_after: str | None) -> Any:
    from own_environment import make_model

    kwargs: Any = dict(buffer_size=STEPS[task], freeze_after=freeze_after, learning_starts=STEPS[task] // 40, seed=seed)
    return make_model(STEPS[task], **kwargs) if task == "catch" else make_puck_model(make_env(task, seed), **kwargs)


def sweep_small(task: str, seed: int) -> Iterator[Row]:
    def row(model: Any, freeze_after: Any) -> Row:
        mean_return = float(np.mean(evaluate_policy(model, make_env(task, 1000 + seed), n_eval_episodes=30)[0]))
        frozen_at = next((row.timesteps for row in model.flops_count.rows if row.frozen), None)
        return Row(task, seed, str(freeze_after), frozen_at, mean_return, model.flops_count.flops)

    checkpoints = {fraction: (io.BytesIO(), io.BytesIO()) for fraction in FRACTIONS}

    def keep(locals_: dict[str, Any], _: dict[str, Any]) -> bool:
        fraction = locals_["self"].num_timesteps / STEPS[task]
        if fraction in checkpoints:
            locals_["self"].save(checkpoints[fraction][0])
            locals_["self"].save_replay_buffer(checkpoints[fraction][1])
        return True

    never = make_agent(task, seed, None).learn(STEPS[task], keep)
    yield row(never, None)
    for fraction, (agent, replay_buffer) in checkpoints.items():
        agent.seek(0), replay_buffer.seek(0)
        model = type(never).load(agent, make_env(task, seed), freeze_after=0)
        model.load_replay_buffer(replay_buffer)
        yield row(model.learn(STEPS[task] - model.num_timesteps, reset_num_timesteps=False), fraction)
    yield row(make_agent(task, seed, "auto").learn(STEPS[task]), "auto")


def sweep_zoo(task: str, seed: int, params: list[str], folder: Path) -> Iterator[Row]:
    algo, env, *arguments = shlex.split(task)
    settings = hashlib.sha256(shlex.join([*arguments, *params]).encode()).hexdigest()[:8]
    for freeze_after in (None, *FRACTIONS, "auto"):
        logs = folder / f"{algo}_{env.replace('/', '-')}_{settings}_freeze_{freeze_after}_seed_{seed}"
        running = logs.with_name(f"{logs.name}_running")
        if not logs.exists():
            shutil.rmtree(running, ignore_errors=True)
            command = [sys.executable, "-m", "rl_zoo3.train", "--algo", algo, "--env", env, *arguments, "--seed", str(seed)]
            subprocess.run([*command, "-f", str(running), "-params", f"freeze_after:{freeze_after!r}", *params], check=True)
            if not list(running.glob("*/*/evaluations.npz")):
                raise SystemExit(f"{task} was never evaluated: set a smaller --eval-freq. Its logs are in {running}")
            running.rename(logs)
        run = Run(next(logs.glob("*/*/evaluations.npz")).parent)
        yield Row(f"{algo} {env}", seed, str(freeze_after), run.freeze(), float(run.returns[-1]), run.rows[-1].flops)


def plot(rows: list[Row]) -> Any:
    tasks = sorted({row.task for row in rows})
    figure = make_figure(4.5 * len(tasks), 3.2)
    for panel, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for name in dict.fromkeys(row.freeze_after for row in rows):
            some = [row for row in rows if (row.task, row.freeze_after) == (task, name)]
            style = dict(marker="*", s=120, color="black", zorder=3) if name == "auto" else dict(s=25)
            x, y = [row.flops for row in some], [row.mean_return for row in some]
            panel.scatter(x, y, label=name.replace("None", "never"), **style)
        panel.set(title=task, xlabel="operations", ylabel="return at the end")
    figure.legend(*panel.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize="small", title="T_f")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("tasks", nargs="+", help='puck, catch, or "algorithm environment [arguments of rl_zoo3.train]"')
    parser.add_argument("--params", nargs="+", default=[], help="-params of rl_zoo3.train")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("freeze_sweep"), help="of .csv, .png and a folder of logs")
    args = parser.parse_args()
    if args.params and set(args.tasks) & set(STEPS):
        parser.error(f"`--params` are for trainings of RL Zoo, got them with {', '.join(set(args.tasks) & set(STEPS))}")
    if any(param.startswith("freeze_after:") for param in args.params):
        parser.error("`--params` must not have freeze_after, which is what is compared")
    if short := [task for task in args.tasks if task not in STEPS and len(shlex.split(task)) < 2]:
        parser.error(f'a task must be puck, catch, or "algorithm environment [arguments]", got {short[0]!r}')
    args.output.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for task, seed in ((task, seed) for task in args.tasks for seed in args.seeds):
        for row in sweep_small(task, seed) if task in STEPS else sweep_zoo(task, seed, args.params, args.output):
            print(*row, sep=",", flush=True)
            rows.append(row)
            with open(f"{args.output}.csv", "w", newline="") as file:
                csv.writer(file).writerows([Row._fields, *rows])
    plot(rows).savefig(f"{args.output}.png", dpi=150)


if __name__ == "__main__":
    main()

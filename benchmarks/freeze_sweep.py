"""
When should an encoder be frozen? Trains with T_f at several fractions of the steps, never, and "auto": a table and a figure.

    PYTHONPATH=examples python -m benchmarks.freeze_sweep puck catch --seeds 0 1 -o freeze_sweep
    python -m benchmarks.freeze_sweep "sac_seer dm_control/cartpole-swingup-v0 -conf sac_seer_small_images.yml" \
        --params buffer_size:37500 --jobs 2 -o cartpole_freeze

The fractions go on from checkpoints of the run that is never frozen: until a freeze they are the same. All but puck and catch
is trained by RL Zoo: algorithm, environment, and its -conf, -n, --eval-freq, --eval-episodes and --gym-packages. The same
command again goes on where it was stopped.
"""

import argparse
import csv
import hashlib
import io
import shlex
import shutil
import textwrap
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecFrameStack

from benchmarks.reproduce.manifest import Row, read_settings
from benchmarks.reproduce.runner import run
from sb3_seer.plots import Run, make_figure
from tests.helpers import PuckEnv, make_puck_model

FRACTIONS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6)
STEPS = dict(puck=2000, catch=5000)
RESERVED_PARAMS = dict(
    freeze_after=", which is what is compared",
    n_timesteps=": give -n with the task",
    callback=": put it into a file for -conf",
)
Result = namedtuple("Result", "task seed freeze_after frozen_at mean_return flops")


def make_env(task: str, seed: int) -> Any:
    from own_environment import Catch  # in examples/, only for the small tasks

    return make_vec_env(Catch, seed=seed) if task == "catch" else VecFrameStack(make_vec_env(PuckEnv, seed=seed), 2)


def make_agent(task: str, seed: int, freeze_after: str | None) -> Any:
    from own_environment import make_model

    kwargs: Any = dict(buffer_size=STEPS[task], freeze_after=freeze_after, learning_starts=STEPS[task] // 40, seed=seed)
    return make_model(STEPS[task], **kwargs) if task == "catch" else make_puck_model(make_env(task, seed), **kwargs)


def sweep_small(task: str, seed: int) -> Iterator[Result]:
    def row(model: Any, freeze_after: Any) -> Result:
        mean_return = float(np.mean(evaluate_policy(model, make_env(task, 1000 + seed), n_eval_episodes=30)[0]))
        frozen_at = next((row.timesteps for row in model.flops_count.rows if row.frozen), None)
        return Result(task, seed, str(freeze_after), frozen_at, mean_return, model.flops_count.flops)

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


def make_rows(task: str, seed: int, params: list[str]) -> dict[str, Row]:
    """:return: the trainings of a task, by T_f. All but "auto" go on from the first one, which is never frozen"""
    parser = argparse.ArgumentParser(prog=task)
    parser.add_argument("algo")
    parser.add_argument("env")
    parser.add_argument("-conf")
    parser.add_argument("-n", type=int)
    parser.add_argument("--eval-freq", type=int)
    parser.add_argument("--eval-episodes", type=int, default=10)
    parser.add_argument("--gym-packages", nargs="+", default=[])
    args = parser.parse_args(shlex.split(task))
    n_timesteps = args.n or int(read_settings(args.algo, args.conf, args.env)["n_timesteps"])
    steps = {fraction: round(fraction * n_timesteps) for fraction in FRACTIONS}
    # Other settings are another training
    settings = hashlib.sha256(shlex.join([task, *params]).encode()).hexdigest()[:8]

    def row(name: Any, freeze_after: Any, **kwargs: Any) -> Row:
        return Row(
            f"{args.algo}-{settings}-freeze_{name}",
            *(args.algo, args.env, seed, n_timesteps, args.eval_freq or max(n_timesteps // 25, 1), args.conf),
            params=(f"freeze_after:{freeze_after!r}", *params),
            packages=tuple(args.gym_packages),
            eval_episodes=args.eval_episodes,
            **kwargs,
        )

    never = row(None, None, keep=tuple(steps.values()))
    frozen = {str(fraction): row(fraction, step, after=never, from_step=step) for fraction, step in steps.items()}
    return {"None": never, **frozen, "auto": row("auto", "auto")}


def sweep_zoo(task: str, rows: dict[str, Row], folder: Path, jobs: int) -> Iterator[Result]:
    failed = run(list(rows.values()), folder, jobs=jobs)
    for freeze_after, row in rows.items():
        if row.is_finished(folder):
            logs = Run(row.run_folder(folder))
            result = logs.freeze(), float(logs.returns[-1]), logs.rows[-1].flops
            yield Result(task, row.seed, freeze_after, *result)
    if failed:
        raise SystemExit("\n".join(f"{row.name} failed: {problem}" for row, problem in failed))
    shutil.rmtree(folder / rows["None"].name / "checkpoint", ignore_errors=True)


def plot(rows: list[Result]) -> Any:
    tasks = sorted({row.task for row in rows})
    figure = make_figure(4.5 * len(tasks), 3.2)
    for panel, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for name in dict.fromkeys(row.freeze_after for row in rows):
            some = [row for row in rows if (row.task, row.freeze_after) == (task, name)]
            style = dict(marker="*", s=120, color="black", zorder=3) if name == "auto" else dict(s=25)
            x, y = [row.flops for row in some], [row.mean_return for row in some]
            panel.scatter(x, y, label=name.replace("None", "never"), **style)
        panel.set(xlabel="operations", ylabel="return at the end")
        panel.set_title(textwrap.fill(task, 40), fontsize="medium")
    figure.legend(*panel.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize="small", title="T_f")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("tasks", nargs="+", help='puck, catch, or "algorithm environment [arguments of rl_zoo3.train]"')
    parser.add_argument("--params", nargs="+", default=[], help="-params of rl_zoo3.train")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=1, help="trainings of RL Zoo at a time, of one thread each")
    parser.add_argument("-o", "--output", type=Path, default=Path("freeze_sweep"), help="of .csv, .png and a folder of logs")
    args = parser.parse_args()
    if args.params and set(args.tasks) & set(STEPS):
        parser.error(f"`--params` are for trainings of RL Zoo, got them with {', '.join(set(args.tasks) & set(STEPS))}")
    for name, reason in RESERVED_PARAMS.items():
        if any(param.startswith(f"{name}:") for param in args.params):
            parser.error(f"`--params` must not have {name}{reason}")
    try:  # before hours of training
        rows_of = {
            (task, seed): make_rows(task, seed, args.params) for task in args.tasks if task not in STEPS for seed in args.seeds
        }
    except ValueError as error:
        parser.error(str(error))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    for task, seed in ((task, seed) for task in args.tasks for seed in args.seeds):
        if task in STEPS:
            sweep = sweep_small(task, seed)
        else:
            sweep = sweep_zoo(task, rows_of[task, seed], args.output.resolve(), args.jobs)
        for result in sweep:
            print(*result, sep=",", flush=True)
            results.append(result)
            with open(f"{args.output}.csv", "w", newline="") as file:
                csv.writer(file).writerows([Result._fields, *results])
    plot(results).savefig(f"{args.output}.png", dpi=150)


if __name__ == "__main__":
    main()

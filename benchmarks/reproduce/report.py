"""Tables and figures of what is finished, beside published results."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from benchmarks.reproduce.manifest import Point, Row
from sb3_seer.plots import Curve, Run, plot

PUBLISHED = Path(__file__).with_name("published.csv")

# Score of a random agent and of a human, as in https://arxiv.org/abs/1511.06581 and in Atari-100k
# (https://arxiv.org/abs/1903.00374)
RANDOM_HUMAN = {
    "Alien": (227.8, 7127.7),
    "Amidar": (5.8, 1719.5),
    "BankHeist": (14.2, 753.1),
    "CrazyClimber": (10780.5, 35829.4),
    "Krull": (1598.0, 2665.5),
    "PrivateEye": (24.9, 69571.3),
    "Qbert": (163.9, 13455.0),
    "RoadRunner": (11.5, 7845.0),
    "Seaquest": (68.4, 42054.7),
}


class Result(NamedTuple):
    """
    :param row: what was trained
    :param run: its evaluations
    """

    row: Row
    run: Run


def load_results(rows: Sequence[Row], folder: Path) -> list[Result]:
    """
    :param rows: a manifest
    :param folder: where the rows are
    :return: the rows that are finished
    """
    return [Result(row, Run(row.run_folder(folder))) for row in rows if row.is_finished(folder)]


def normalise(env: str, scores: np.ndarray) -> np.ndarray:
    """
    :param env: id of an environment
    :param scores: returns, of any shape
    :return: 0 for a random agent and 1 for a human in Atari games, 1 for the most that can be reached in control tasks;
        other environments' as they are
    """
    game = env.removesuffix("NoFrameskip-v4")
    if game in RANDOM_HUMAN:
        random, human = RANDOM_HUMAN[game]
        return (scores - random) / (human - random)
    return scores / 1000 if env.startswith("dm_control/") else scores


def scores(results: Sequence[Result], point: Point) -> pd.DataFrame:
    """
    :param results: finished rows
    :param point: where to read their curves
    :return: environment, agent, seed, steps and score of the last evaluation until then, without runs that ended before, and
        at equal operations without environments that an agent lacks
    """
    agents = {row.agent for row, _ in results}
    x = {result.row: _positions(result, point.axis) for result in results}
    rows = []
    for row, run in results:
        limit = point.value
        if limit is None:
            others = [other.row for other in results if other.row.env == row.env]
            if {other.agent for other in others} != agents:
                continue
            limit = min(x[other][-1] for other in others)
        # Updates before the freeze are equal up to a rounding of floating point numbers
        until = np.flatnonzero(x[row] <= limit * (1 + 1e-9))
        ended_before = math.isfinite(limit) and limit > x[row][-1] * (1 + 1e-9)
        if len(until) and not ended_before:
            rows.append((row.env, row.agent, row.seed, int(run.timesteps[until[-1]]), float(run.returns[until[-1]])))
    return pd.DataFrame(rows, columns=["environment", "agent", "seed", "steps", "score"])


def _positions(result: Result, axis: str) -> np.ndarray:
    if axis == "frames":
        return result.run.timesteps * result.row.action_repeat
    return result.run.x(axis, result.run.timesteps)


def score_table(table: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """
    :param table: see :func:`scores`
    :param published: published results at the same point
    :return: a row for each environment; mean, standard deviation and number of seeds of our agents and of the published ones
    """

    def cell(mean: float, std: float, n: float) -> str:
        text = f"{mean:,.0f}" if math.isnan(std) else f"{mean:,.0f} ± {std:,.0f}"
        return text if math.isnan(n) else f"{text} ({n:.0f})"

    columns: dict[str, dict[str, str]] = {}
    for (agent, env), group in table.groupby(["agent", "environment"], sort=False):
        std = group.score.std(ddof=0) if len(group) > 1 else math.nan
        columns.setdefault(agent, {})[env] = cell(group.score.mean(), std, len(group))
    envs = list(dict.fromkeys(table.environment))
    for row in published[published.environment.isin(envs)].itertuples():
        columns.setdefault(row.method, {})[row.environment] = cell(row.mean, row.std, row.runs)
    return pd.DataFrame(columns, index=pd.Index(envs, name="environment")).fillna("")


def complete(table: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """
    :param table: see :func:`scores`
    :return: the rows of the environments that all agents have, and the fewest seeds of an agent in one of them
    """
    agents = table.groupby("environment").agent.transform("nunique")
    table = table[agents == table.agent.nunique()]
    return table, int(table.groupby(["agent", "environment"]).size().min()) if len(table) else 0


def aggregate_table(table: pd.DataFrame, published: pd.DataFrame, reps: int = 2000) -> pd.DataFrame:
    """
    :param table: see :func:`scores`
    :param published: published results at the same point
    :param reps: resamples of the bootstrap
    :return: for each agent interquartile mean and mean of normalised scores, with 95% intervals of the stratified bootstrap
        where there is more than one seed; and the mean of published methods in the same environments. All over the
        environments that all agents have, and as many seeds as each has in each
    :raises ImportError: without rliable
    """
    try:
        from rliable import library, metrics
    except ImportError as error:
        raise ImportError('Statistics need rliable: pip install "sb3_seer[benchmarks]"') from error

    agents = list(dict.fromkeys(table.agent))
    table, n_seeds = complete(table)
    envs = list(dict.fromkeys(table.environment))
    rows = []
    if envs:
        matrices = {
            agent: np.stack(
                [
                    normalise(env, group[group.environment == env].sort_values("seed").score.to_numpy()[:n_seeds])
                    for env in envs
                ],
                axis=1,
            )  # (n_seeds, n_envs)
            for agent, group in table.groupby("agent", sort=False)
        }
        np.random.seed(0)  # rliable draws from NumPy's global generator
        points, intervals = library.get_interval_estimates(
            matrices, lambda matrix: np.array([metrics.aggregate_iqm(matrix), metrics.aggregate_mean(matrix)]), reps=reps
        )
        for agent in agents:
            cells = [
                f"{value:.3f}" if n_seeds == 1 else f"{value:.3f} [{low:.3f}, {high:.3f}]"
                for value, low, high in zip(points[agent], *intervals[agent], strict=True)
            ]
            rows.append((agent, *cells, f"{len(envs)} x {n_seeds}"))
    for method, group in published.groupby("method", sort=False):
        have = group[group.environment.isin(envs)]
        if len(have):
            mean = np.mean([normalise(row.environment, np.array(row.mean)) for row in have.itertuples()])
            note = "" if len(have) == len(envs) else ", not in all"
            rows.append((method, "", f"{mean:.3f}", f"{len(have)} published{note}"))
    return pd.DataFrame(rows, columns=["agent", "IQM", "mean", "environments x seeds"]).set_index("agent")


def caution(n_seeds: int) -> str:
    """
    :param n_seeds: fewest seeds of an agent in an environment
    :return: how much a comparison of so few shows
    """
    if n_seeds == 0:
        return "No environment has finished runs of all agents."
    if n_seeds == 1:
        return "**One seed.** Nothing here says how much of a difference is chance, so there are no intervals."
    if n_seeds < 5:
        return (
            f"**{n_seeds} seeds.** The bootstrap only knows the spread of {n_seeds} runs, so the intervals are too narrow. "
            "Agents whose intervals overlap are not told apart, and a single game says next to nothing."
        )
    return f"{n_seeds} seeds. Agents whose intervals overlap are not told apart."


def write_report(title: str, rows: Sequence[Row], points: Sequence[Point], folder: Path, output: Path) -> None:
    """
    Write ``report.md`` with all tables, a ``.csv`` for each of them, all evaluations as ``evaluations.csv``, and
    ``figure.png``: return against steps, operations and time.

    :param title: of the report
    :param rows: the manifest
    :param points: where the curves are read
    :param folder: where the rows are
    :param output: where to write
    :raises ValueError: if no row is finished
    """
    results = load_results(rows, folder)
    if not results:
        raise ValueError(f"No row of {title} is finished in {folder}")
    output.mkdir(parents=True, exist_ok=True)
    published = pd.read_csv(PUBLISHED)
    parts = [f"# {title}", f"{len(results)} of {len(rows)} rows are finished."]
    for point in points:
        table = scores(results, point)
        if table.empty:
            parts.append(f"## {point.label}\n\nNo finished run reaches this point.")
            continue
        beside = published[published.point == point.label]
        by_env, aggregate = score_table(table, beside), aggregate_table(table, beside)
        name = "".join(c if c.isalnum() else "_" for c in point.label)
        table.to_csv(output / f"{name}.csv", index=False)
        aggregate.to_csv(output / f"{name}_aggregate.csv")
        steps = table.groupby("agent", sort=False).steps.agg(["min", "max"])
        parts += [
            f"## {point.label}",
            "Return of the last evaluation until then: mean ± standard deviation over seeds (number of seeds). Steps of the "
            "agent: "
            + ", ".join(
                f"{agent} {low:,}" if low == high else f"{agent} {low:,} to {high:,}"
                for agent, low, high in steps.itertuples()
            )
            + ".",
            by_env.to_markdown(stralign="right"),
            "Normalised returns (Atari: 0 random, 1 human; control: 1 is 1,000), with 95% intervals of the stratified "
            "bootstrap over seeds, in the environments that all agents have:",
            aggregate.to_markdown(stralign="right", disable_numparse=True),
            caution(complete(table)[1]),
        ]
        sources = beside[beside.environment.isin(table.environment)].drop_duplicates(["method", "source"])
        if len(sources):
            parts.append("\n".join(f"* {row.method}: {row.source}" for row in sources.itertuples()))
    evaluations = [
        pd.DataFrame(
            dict(
                environment=row.env,
                agent=row.agent,
                seed=row.seed,
                steps=run.timesteps,
                flops=run.x("flops", run.timesteps),
                seconds=run.x("time", run.timesteps),
                score=run.returns,
            )
        )
        for row, run in results
    ]
    pd.concat(evaluations).to_csv(output / "evaluations.csv", index=False, float_format="%.12g")
    runs: dict[tuple[str, str], list[Run]] = {}
    for row, run in results:
        runs.setdefault((row.env, row.agent), []).append(run)
    curves = [Curve(env, agent, group) for (env, agent), group in runs.items()]
    plot(curves, ("steps", "flops", "time")).savefig(output / "figure.png", dpi=150)
    parts.append("![Return against steps, FLOPs and time](figure.png)")
    (output / "report.md").write_text("\n\n".join(parts) + "\n")

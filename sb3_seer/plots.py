"""
Draw the papers' figures from RL Zoo's log folders: return against steps, floating point operations and wall-clock time.

    python -m sb3_seer.plots logs/rainbow_seer/AlienNoFrameskip-v4_* logs/rainbow/AlienNoFrameskip-v4_* \\
        -x steps flops time -o alien.png --csv alien.csv

Folders of one algorithm and environment are runs of one curve: their mean, and one standard deviation around it. Those of an
experiment that was named with ``-conf`` have a curve with its name. A dotted line of the same colour is where the encoder was
frozen. Any folder will do in which an ``EvalCallback`` wrote its ``evaluations.npz``, as ``python -m rl_zoo3.train`` does
unless ``--eval-freq`` is negative.

Operations and time are those of the ``flops.csv`` that SEER algorithms write beside it, and others with a
:class:`~sb3_seer.common.flops.FlopsCallback`. Without this file, they come from what SB3 and RL Zoo save: the operations from
the parameters of the saved model, the time from the monitor files, in which evaluations take part of it.
"""

import argparse
import csv
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from stable_baselines3.common.monitor import LoadMonitorResultsError

from sb3_seer.common.run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# By name: the label, and the number of seconds, steps or operations that is one there
AXES: dict[str, tuple[str, float]] = {
    "steps": ("environment steps", 1),
    "flops": ("FLOPs", 1),
    "time": ("wall-clock time (hours)", 3600),
}


@dataclass(frozen=True)
class Curve:
    """
    The runs of one algorithm in one environment, at the evaluations that all of them have.

    :param environment: its name
    :param name: of the algorithm, or of the experiment
    :param runs: some, with other seeds
    """

    environment: str
    name: str
    runs: list[Run]

    @cached_property
    def timesteps(self) -> np.ndarray:
        """
        of the evaluations, shape ``(n,)``

        :raises ValueError: if the runs have none in common
        """
        timesteps = reduce(np.intersect1d, [run.timesteps for run in self.runs])
        if len(timesteps) == 0:
            folders = ", ".join(str(run.folder) for run in self.runs)
            raise ValueError(f"{folders} were never evaluated at the same step: allowed are runs with the same --eval-freq")
        return timesteps

    @cached_property
    def returns(self) -> np.ndarray:
        """of each run, shape ``(n_runs, n)``"""
        return np.stack([run.returns[np.isin(run.timesteps, self.timesteps)] for run in self.runs])

    def x(self, axis: str) -> np.ndarray:
        """:return: steps, operations or seconds (see ``AXES``) of the evaluations, the mean of the runs, shape ``(n,)``"""
        return np.mean([run.x(axis, self.timesteps) for run in self.runs], axis=0)

    def freeze(self, axis: str) -> float | None:
        """:return: the same of the freeze; None if the encoder was not frozen"""
        steps = [(run, step) for run in self.runs if (step := run.freeze()) is not None]
        return float(np.mean([run.x(axis, np.array([step])) for run, step in steps])) if steps else None


def load_curves(folders: Sequence[str | Path]) -> list[Curve]:
    """
    :param folders: log folders, in any order
    :return: a curve for each environment and algorithm (or experiment), in the order of the first folder of each
    :raises ValueError: if a folder has no evaluations
    """
    runs: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in map(Run.load, folders):
        runs[run.environment, run.name].append(run)
    return [Curve(*names, runs_of_one) for names, runs_of_one in runs.items()]


def plot(curves: Sequence[Curve], axes: Sequence[str] = ("steps",)) -> "Figure":
    """
    :param curves: what to draw
    :param axes: names in ``AXES``: one panel for each, in a row for each environment
    :return: the figure: mean returns, one standard deviation around them, a dotted line at the freeze
    :raises ImportError: without matplotlib
    :raises ValueError: if a folder does not have what an axis needs
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.ticker import EngFormatter
    except ImportError as error:
        raise ImportError('Plots need matplotlib: pip install "sb3_seer[plots]"') from error

    environments = list(dict.fromkeys(curve.environment for curve in curves))
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(curve.name for curve in curves))}
    figure = Figure(figsize=(3.8 * len(axes), 2.7 * len(environments) + 0.5), layout="constrained")
    panels = figure.subplots(len(environments), len(axes), squeeze=False)
    any_freeze = False
    for curve in curves:
        mean, spread = curve.returns.mean(axis=0), curve.returns.std(axis=0)
        row = panels[environments.index(curve.environment)]
        for panel, axis in zip(row, axes, strict=True):
            unit, colour = AXES[axis][1], colours[curve.name]
            x = curve.x(axis) / unit
            # A line through one point is none
            panel.plot(x, mean, color=colour, linewidth=1.8, marker="." if len(x) == 1 else None, label=curve.name)
            if len(curve.runs) > 1:
                panel.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)
            freeze = curve.freeze(axis)
            if freeze is not None:
                any_freeze = True
                panel.axvline(freeze / unit, color=colour, linestyle=":", linewidth=1.5)
    for environment, row in zip(environments, panels, strict=True):
        row[0].set_ylabel("return")
        for panel, axis in zip(row, axes, strict=True):
            panel.set_title(environment, fontsize="medium")
            panel.set_xlabel(AXES[axis][0])
            panel.set_xlim(left=0)
            if axis != "time":  # where 20 m would be thousandths of an hour
                panel.xaxis.set_major_formatter(EngFormatter())  # 45 T
            panel.grid(alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
    handles = [Line2D([], [], color=colour, linewidth=1.8, label=name) for name, colour in colours.items()]
    if any_freeze:
        handles.append(Line2D([], [], color="grey", linestyle=":", linewidth=1.5, label="encoder frozen"))
    figure.legend(handles=handles, loc="outside upper center", ncols=2 * len(axes), frameon=False)
    return figure


def write_csv(curves: Sequence[Curve], file: str | Path, axes: Sequence[str] = ("steps",)) -> None:
    """
    Write what is drawn: a row for each evaluation of each curve.

    :param curves: what to write
    :param file: where to
    :param axes: names in ``AXES``: a column for each (time in seconds)
    """
    with Path(file).open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["environment", "name", "runs", *axes, "frozen", "return_mean", "return_std"])
        for curve in curves:
            freeze = curve.freeze("steps")
            frozen = np.full(len(curve.timesteps), 0) if freeze is None else (curve.timesteps >= freeze).astype(int)
            columns = [*(curve.x(axis) for axis in axes), frozen, curve.returns.mean(axis=0), curve.returns.std(axis=0)]
            for row in zip(*(column.tolist() for column in columns), strict=True):
                writer.writerow([curve.environment, curve.name, len(curve.runs), *(f"{value:.12g}" for value in row)])


def main(arguments: Sequence[str] | None = None) -> None:
    """
    :param arguments: of the command line, those of this process by default
    """
    parser = argparse.ArgumentParser(
        "python -m sb3_seer.plots", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", help="log folders: logs/<algorithm>/<environment>_<number>")
    parser.add_argument("-x", "--x-axis", nargs="+", choices=list(AXES), default=["steps"], help="a panel for each")
    parser.add_argument("-o", "--output", default="plot.png", help="where to draw: a .png, .pdf or .svg")
    parser.add_argument("--csv", help="where to write what is drawn, a .csv")
    args = parser.parse_args(arguments)
    try:
        curves = load_curves(args.folders)
        figure = plot(curves, args.x_axis)
        if args.csv is not None:
            write_csv(curves, args.csv, args.x_axis)
        figure.savefig(args.output, dpi=200)
    except (ImportError, ValueError, OSError, LoadMonitorResultsError) as error:
        parser.error(str(error))
    print(f"Drawn in {args.output}")


if __name__ == "__main__":
    main()

"""
Draw the papers' figures from RL Zoo's log folders: return against steps, floating point operations and wall-clock time.

    python -m sb3_seer.plots logs/rainbow_seer/AlienNoFrameskip-v4_* logs/rainbow/AlienNoFrameskip-v4_* \\
        -x steps flops time -o alien.png --csv alien.csv

Folders of one algorithm and environment are runs of one curve: their mean, and one standard deviation around it. Runs with
``-conf`` have a curve with the name of that file (after the algorithm's, if several were given it). A dotted line of the same
colour marks the freeze. A folder must have the ``evaluations.npz`` of an ``EvalCallback``, which ``python -m rl_zoo3.train``
writes unless ``--eval-freq`` is negative or larger than the training.

Operations, time and the freeze come from the ``flops.csv`` that a :class:`~sb3_seer.common.flops.FlopsCallback` writes beside
it, as each SEER algorithm does.
"""

import argparse
import csv
import re
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sb3_seer.common.flops import FLOPS_FILE, FlopsRow
from sb3_seer.common.utils import warn

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# By name: the label, and its unit
AXES: dict[str, tuple[str, float]] = {
    "steps": ("steps of the agent", 1),
    "flops": ("FLOPs", 1),
    "time": ("wall-clock time (hours)", 3600),
}


@dataclass(frozen=True)
class Run:
    """
    What a training has written to its log folder, which RL Zoo names ``<algorithm>/<environment>_<number>``.

    :param folder: the log folder
    """

    folder: Path

    @property
    def is_evaluated(self) -> bool:
        """whether there are evaluations"""
        return (self.folder / "evaluations.npz").is_file()

    @cached_property
    def evaluations(self) -> tuple[np.ndarray, np.ndarray]:
        """
        steps of the evaluations, in ascending order, and mean return of each, both of shape ``(n,)``

        :raises ValueError: if there are none, if the file is damaged, or if its steps do not ascend
        """
        if not self.is_evaluated:
            raise ValueError(
                f"{self.folder} has no evaluations.npz. It must be the log folder of an evaluated run, such as "
                "logs/<algorithm>/<environment>_<number> of python -m rl_zoo3.train --eval-freq <steps>"
            )
        try:
            with np.load(self.folder / "evaluations.npz") as evaluations:
                timesteps, returns = evaluations["timesteps"], evaluations["results"].mean(axis=1)
        except (zipfile.BadZipFile, EOFError, KeyError, ValueError) as error:  # EvalCallback was killed while it wrote
            raise ValueError(f"{self.folder / 'evaluations.npz'} is damaged: {error}") from error
        if np.any(np.diff(timesteps) <= 0):
            raise ValueError(f"{self.folder / 'evaluations.npz'} must be of one learn(), got the steps {timesteps.tolist()}")
        return timesteps, returns

    @property
    def timesteps(self) -> np.ndarray:
        """steps of the ``evaluations``"""
        return self.evaluations[0]

    @property
    def returns(self) -> np.ndarray:
        """returns of the ``evaluations``"""
        return self.evaluations[1]

    @cached_property
    def args(self) -> dict[str, Any]:
        """the arguments of RL Zoo's command, none if it did not write them"""
        return self._written("args.yml")

    @cached_property
    def settings(self) -> dict[str, Any]:
        """the hyperparameters, with the ``-params`` of RL Zoo's command, none if it did not write them"""
        return self._written("config.yml")

    def _written(self, name: str) -> dict[str, Any]:
        file = self.folder / self.environment / name
        if not file.is_file():
            return {}
        import yaml

        # RL Zoo writes an object of Python, and reads it in the same way
        try:
            return dict(yaml.load(file.read_text(), Loader=yaml.UnsafeLoader) or {})
        except yaml.YAMLError as error:
            raise ValueError(f"{file} cannot be read: {error}") from error

    @property
    def algorithm(self) -> str:
        """RL Zoo's name of the algorithm: the folder above"""
        return self.folder.resolve().parent.name

    @property
    def environment(self) -> str:
        """the name of the folder, without the number of the run"""
        return re.sub(r"_\d+(_[0-9a-f-]{36})?$", "", self.folder.resolve().name)

    @property
    def name(self) -> str:
        """the name of the file that was given as ``-conf``, or else of the algorithm"""
        conf_file = self.args.get("conf_file")
        return self.algorithm if conf_file is None else re.sub(r"\.(yml|yaml|py)$", "", Path(conf_file).name)

    @cached_property
    def rows(self) -> list[FlopsRow]:
        """
        the rows of the ``flops.csv``, none if there is no such file

        :raises ValueError: if it has other columns, or is damaged
        """
        file = self.folder / FLOPS_FILE
        if not file.is_file():
            return []
        with file.open(newline="") as stream:
            header, *rows = list(csv.reader(stream)) or [[]]
        if tuple(header) != FlopsRow._fields:
            raise ValueError(f"{file} must have the columns {', '.join(FlopsRow._fields)}, got {', '.join(header)}")
        try:
            return [FlopsRow(int(timesteps), int(flops), float(time), int(frozen)) for timesteps, flops, time, frozen in rows]
        except ValueError as error:
            raise ValueError(f"{file} is damaged: {error}") from error

    def x(self, axis: str, timesteps: np.ndarray) -> np.ndarray:
        """
        :param axis: ``"steps"``, ``"flops"`` or ``"time"``
        :param timesteps: steps of the training, shape ``(n,)``
        :return: steps, operations or seconds until then, shape ``(n,)``
        :raises ValueError: if the folder has no ``flops.csv``, or one that ends before these steps
        """
        if axis == "steps":
            return timesteps
        if not self.rows:
            raise ValueError(
                f"{self.folder} must have a {FLOPS_FILE} for -x {axis}. SEER algorithms write it, others with "
                "callback: sb3_seer.common.flops.FlopsCallback"
            )
        if timesteps.max() > self.rows[-1].timesteps:
            raise ValueError(
                f"{self.folder / FLOPS_FILE} must go on until step {timesteps.max():,}, as the evaluations do, got "
                f"{self.rows[-1].timesteps:,}"
            )
        values = [row.flops if axis == "flops" else row.seconds for row in self.rows]
        return np.interp(timesteps, [row.timesteps for row in self.rows], values)

    def freeze(self) -> int | None:
        """:return: the step at which the encoder was frozen; None if it never was, or always, or without a ``flops.csv``"""
        frozen = [row.timesteps for row in self.rows if row.frozen]
        return frozen[0] if frozen and not self.rows[0].frozen else None


@dataclass(frozen=True)
class Curve:
    """
    The runs of one algorithm in one environment, at the evaluations that all of them have.

    :param environment: name of the environment
    :param name: name of the algorithm, or of the file given as ``-conf``
    :param runs: runs with different seeds
    """

    environment: str
    name: str
    runs: list[Run]

    @cached_property
    def timesteps(self) -> np.ndarray:
        """
        steps of the evaluations, shape ``(n,)``

        :raises ValueError: if the runs have none in common
        """
        timesteps = reduce(np.intersect1d, [run.timesteps for run in self.runs])
        if len(timesteps) == 0:
            folders = ", ".join(str(run.folder) for run in self.runs)
            raise ValueError(f"{folders} were never evaluated at the same step. They must have the same --eval-freq")
        if any(run.timesteps[-1] > timesteps[-1] for run in self.runs):
            warn(f"{self.name}: the runs differ in length. Drawn until step {timesteps[-1]:,}, as far as all of them go")
        if any(len(timesteps) < np.sum(run.timesteps <= timesteps[-1]) for run in self.runs):
            warn(f"{self.name}: the runs were evaluated at different steps. Drawn are the {len(timesteps)} that all have")
        return timesteps

    @cached_property
    def returns(self) -> np.ndarray:
        """mean return of each evaluation of each run, shape ``(n_runs, n)``"""
        return np.stack([run.returns[np.isin(run.timesteps, self.timesteps)] for run in self.runs])

    def x(self, axis: str) -> np.ndarray:
        """:return: steps, operations or seconds (see ``AXES``) of the evaluations, the mean of the runs, shape ``(n,)``"""
        return np.mean([run.x(axis, self.timesteps) for run in self.runs], axis=0)

    def freeze(self, axis: str) -> float | None:
        """:return: steps, operations or seconds until the freeze, the mean of the runs; None if the encoder was not frozen"""
        steps = [(run, step) for run in self.runs if (step := run.freeze()) is not None]
        return float(np.mean([run.x(axis, np.array([step])) for run, step in steps])) if steps else None


def load_curves(folders: Sequence[str | Path]) -> list[Curve]:
    """
    :param folders: log folders, in any order
    :return: a curve for each environment and algorithm (or experiment), in the order of the first folder of each. A folder
        without evaluations is left out, with a warning
    :raises ValueError: if none has evaluations
    """
    runs: dict[tuple[str, str, str], list[Run]] = defaultdict(list)
    given = [Run(folder) for folder in {folder.resolve(): folder for folder in map(Path, folders)}.values()]
    evaluated = [run for run in given if run.is_evaluated] or given[:1]
    if left_out := [str(run.folder) for run in given if run not in evaluated]:
        warn(f"Left out, without evaluations: {', '.join(left_out)}")
    for run in evaluated:
        _ = run.evaluations  # an error now, not when they are drawn
        if run.args.get("trained_agent") and not (run.rows and run.rows[0].flops == 0):
            warn(f"{run.folder} is a training that was resumed with -i: its steps begin at 0 again")
        runs[run.environment, run.name, run.algorithm].append(run)
    for (environment, name, _), runs_of_one in runs.items():
        params = [{**run.settings, "callback": None} for run in runs_of_one]
        if any(some != params[0] for some in params):
            warn(
                f"{name} in {environment}: runs with different hyperparameters are drawn as one curve. Give each kind a "
                "-conf file with a name of its own"
            )
    algorithms: dict[str, set[str]] = defaultdict(set)
    for _, name, algorithm in runs:
        algorithms[name].add(algorithm)
    return [
        Curve(environment, name if len(algorithms[name]) == 1 else f"{algorithm}, {name}", runs_of_one)
        for (environment, name, algorithm), runs_of_one in runs.items()
    ]


def make_figure(width: float, height: float) -> "Figure":
    """
    :param width: inches
    :param height: inches
    :return: an empty figure
    :raises ImportError: without matplotlib
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Figures need matplotlib: pip install "sb3_seer[plots]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def plot(curves: Sequence[Curve], axes: Sequence[str] = ("steps",)) -> "Figure":
    """
    :param curves: what to draw
    :param axes: names in ``AXES``: one panel for each, in a row for each environment
    :return: the figure: mean returns, one standard deviation around them, a dotted line at the freeze
    :raises ImportError: without matplotlib
    :raises ValueError: for another axis; if a folder does not have what an axis needs
    """
    if isinstance(axes, str) or not set(axes) <= set(AXES):
        raise ValueError(f"`axes` must be a list with some of {', '.join(map(repr, AXES))}, got {axes!r}")
    environments = list(dict.fromkeys(curve.environment for curve in curves))
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(curve.name for curve in curves))}
    figure = make_figure(3.8 * len(axes), 2.7 * len(environments) + 0.5)
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter

    panels = figure.subplots(len(environments), len(axes), squeeze=False)
    any_freeze = False
    for curve in curves:
        mean, spread = curve.returns.mean(axis=0), curve.returns.std(axis=0)
        row = panels[environments.index(curve.environment)]
        for panel, axis in zip(row, axes, strict=True):
            unit, colour = AXES[axis][1], colours[curve.name]
            x = curve.x(axis) / unit
            # A line through one point cannot be seen
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
    for n_columns in range(2 * len(axes), 0, -1):  # as many as the figure is wide
        legend = figure.legend(handles=handles, loc="outside upper center", ncols=n_columns, frameon=False)
        if n_columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            break
        legend.remove()
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
            if freeze is None and any(row.frozen for run in curve.runs for row in run.rows):
                freeze = 0.0  # frozen from the first step
            frozen = np.full(len(curve.timesteps), 0) if freeze is None else (curve.timesteps >= freeze).astype(int)
            columns = [*(curve.x(axis) for axis in axes), frozen, curve.returns.mean(axis=0), curve.returns.std(axis=0)]
            for row in zip(*(column.tolist() for column in columns), strict=True):
                writer.writerow([curve.environment, curve.name, len(curve.runs), *(f"{value:.12g}" for value in row)])


def main(arguments: Sequence[str] | None = None) -> None:
    """
    :param arguments: arguments of the command line, None for ``sys.argv``
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
    except (ImportError, ValueError, OSError) as error:
        parser.error(str(error))
    print(f"Drawn in {args.output}")


if __name__ == "__main__":
    main()

"""
Draw the figure of the README: return, time and memory of Rainbow on Atari, with SEER and without.

    python -m benchmarks.front_figure [--output docs/images/gain.png]

The returns are of the runs in ``benchmarks/results/README.md``. ``costs.csv`` has what ``python -m benchmarks.speed`` and
``python -m benchmarks.memory`` measured (Alien: 84x84 pixels, stack 4, batches of 32, K = 1).
"""

import argparse
import csv
from itertools import groupby
from pathlib import Path
from typing import Any

from sb3_seer.plots import make_figure

RESULTS = Path(__file__).parent / "results"
GAMES = ("alien", "amidar")
COLORS = {"rainbow": "C1", "rainbow_seer": "C0"}


def read(name: str) -> list[dict[str, str]]:
    with open(RESULTS / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def draw_returns(axes: Any, game: str) -> None:
    """Return against steps, a line an agent, and the freeze."""
    for name, rows in groupby(read(game), key=lambda row: row["name"]):
        points = [(int(row["steps"]) / 1000, float(row["return_mean"]), row["frozen"] == "1") for row in rows]
        steps, returns, frozen = zip(*points, strict=True)
        axes.plot(steps, returns, color=COLORS[name], label=name, zorder=3 if name == "rainbow_seer" else 2)
        if any(frozen):
            axes.axvline(steps[frozen.index(True)], color="gray", linestyle=":", label="freeze")
    axes.set(title=f"{game.capitalize()}: return", xlabel="thousand steps", ylim=(0, None))


def draw_costs(axes: Any, quantity: str) -> None:
    """A bar for each agent, with its number."""
    rows = [row for row in read("costs") if row["quantity"] == quantity][::-1]
    names = [row["agent"].replace(" ", "\n", 1) for row in rows]
    colors = [COLORS["rainbow_seer" if "seer" in row["agent"] else "rainbow"] for row in rows]
    bars = axes.barh(names, [float(row["value"]) for row in rows], color=colors)
    axes.bar_label(bars, labels=[f"{float(row['value']):,g}" for row in rows], padding=3)
    axes.set(title=quantity[0].upper() + quantity[1:], xlim=(0, 1.25 * float(rows[-1]["value"])), xticks=[])
    axes.spines["bottom"].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="docs/images/gain.png", help="where to draw")
    args = parser.parse_args()
    figure = make_figure(9, 5.2)
    panels = figure.subplots(2, 2)
    for axes, game in zip(panels[0], GAMES, strict=True):
        draw_returns(axes, game)
    panels[0][0].legend(frameon=False, loc="lower right")
    for axes, quantity in zip(panels[1], ("milliseconds of a gradient step", "bytes of a transition"), strict=True):
        draw_costs(axes, quantity)
    for axes in panels.flat:
        axes.title.set_fontsize(11)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(args.output, dpi=150)
    print(f"Drawn in {args.output}")


if __name__ == "__main__":
    main()

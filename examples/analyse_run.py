"""
What the encoder of a run has learned: train with RL Zoo and keep checkpoints, then look at them. Two minutes on one core.

    python examples/analyse_run.py [--total-timesteps 10000]

For a run of your own: python -m sb3_seer.analysis, see docs/guides/analysis.md.
"""

import argparse
import sys
from pathlib import Path

from rl_zoo3.train import train

from sb3_seer.analysis import AnalysedRun, plot_probe, plot_similarity


def train_with_checkpoints(total_timesteps: int) -> Path:
    """
    :param total_timesteps: steps of the training, with a checkpoint after each tenth of them
    :return: the log folder of the run
    """
    settings = dict(
        learning_rate=1e-3,
        buffer_size=total_timesteps // 3,
        learning_starts=total_timesteps // 20,
        freeze_after=total_timesteps * 3 // 10,
        gamma=0.9,
        train_freq=1,
        target_update_interval=200,
        policy_kwargs="dict(features_extractor_class=sb3_seer.DataEfficientCNN, net_arch=[128])",
    )
    sys.argv = [
        *"rl_zoo3.train --algo dqn_seer --env Catch-v0 --gym-packages own_environment --seed 0 --eval-freq -1".split(),
        *("-n", str(total_timesteps), "--save-freq", str(total_timesteps // 10), "-f", "logs"),
        *("-params", *(f"{name}:{value}" for name, value in settings.items())),
    ]
    train()
    return max(Path("logs/dqn_seer").glob("Catch-v0_*"), key=lambda folder: int(folder.name.rpartition("_")[2]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--total-timesteps", type=int, default=10_000)
    args = parser.parse_args()

    run = AnalysedRun(train_with_checkpoints(args.total_timesteps))
    episodes = run.play(min(args.total_timesteps, 1_000))
    for name, (figure, rows) in {
        "similarity": plot_similarity(run, episodes),  # of each layer to itself at the next checkpoint
        "probe": plot_probe(run, episodes),  # what a linear map reads from the latents: column and row of the ball, paddle
    }.items():
        figure.savefig(f"{name}.png", dpi=150)
        for row in rows:
            print(*(f"{value:.2f}" if isinstance(value, float) else value for value in row), sep=",")


if __name__ == "__main__":
    main()

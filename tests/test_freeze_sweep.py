"""The sweep of T_f, with a stand-in for RL Zoo."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.freeze_sweep import FRACTIONS, main, sweep_zoo


def test_each_task_has_trainings_of_its_own_and_an_interrupted_one_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []

    def train(command: list[str], check: bool) -> None:
        algo, env, logs = (command[command.index(name) + 1] for name in ("--algo", "--env", "-f"))
        trained.append(env)
        folder = Path(logs) / algo / f"{env.replace('/', '-')}_1"
        folder.mkdir(parents=True)
        np.savez(folder / "evaluations.npz", timesteps=[10], results=[[len(trained)]])
        (folder / "flops.csv").write_text("timesteps,flops,seconds,frozen\n10,7,0.1,0\n")
        if len(trained) == 3:
            raise KeyboardInterrupt

    def sweep(task: str, *params: str) -> list[Any]:
        return [row.mean_return for row in sweep_zoo(task, 0, list(params), tmp_path)]

    monkeypatch.setattr(subprocess, "run", train)
    with pytest.raises(KeyboardInterrupt):
        sweep("sac_seer my/One-v0")
    n = len(FRACTIONS) + 2
    assert sweep("sac_seer my/One-v0") == [1, 2, *range(4, n + 2)]
    assert sweep("sac_seer my/Two-v0") == [*range(n + 2, 2 * n + 2)]
    assert sweep("sac_seer my/One-v0") == [1, 2, *range(4, n + 2)]
    assert trained == ["my/One-v0"] * (n + 1) + ["my/Two-v0"] * n
    # Other settings are another training
    assert sweep("sac_seer my/One-v0", "gamma:0.9") == [*range(2 * n + 2, 3 * n + 2)]
    assert sweep("sac_seer my/One-v0 -n 9") == [*range(3 * n + 2, 4 * n + 2)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["puck", "--params", "gamma:0.9"], "`--params` are for trainings of RL Zoo"),
        (["dqn_seer my/One-v0", "--params", "freeze_after:9"], "`--params` must not have freeze_after"),
        (["cartpole"], "got 'cartpole'"),
    ],
)
def test_what_would_have_no_effect_is_refused(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["freeze_sweep", *arguments])
    with pytest.raises(SystemExit):
        main()
    assert message in capsys.readouterr().err


def test_a_training_without_evaluations_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, check: None)
    with pytest.raises(SystemExit, match="was never evaluated"):
        list(sweep_zoo("sac_seer my/One-v0", 0, [], tmp_path))

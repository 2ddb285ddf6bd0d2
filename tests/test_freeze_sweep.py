"""The sweep of T_f over a training of RL Zoo."""

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.freeze_sweep import FRACTIONS, main, make_rows, sweep_zoo
from benchmarks.reproduce.manifest import read_settings
from sb3_seer import SEERDQN
from sb3_seer.plots import Run
from tests.helpers import LightEnv
from tests.reproduce_env import Killed

TASK = "dqn_seer TinyLight-v0 -n 100 --eval-freq 20 --eval-episodes 1 --gym-packages tests.reproduce_env"
PARAMS = [
    "policy_kwargs:dict(features_extractor_class=sb3_seer.DataEfficientCNN,net_arch=[8])",
    *("learning_starts:4", "buffer_size:100", "train_freq:1"),
]


def test_all_fractions_go_on_from_one_training(train_here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, n_calls = LightEnv.step, 0

    def killed(self: LightEnv, action: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls in (90, 400):  # while it is never frozen, and later
            raise Killed
        return step(self, action)

    monkeypatch.setattr(LightEnv, "step", killed)
    rows = make_rows(TASK, 0, PARAMS)
    results = list(sweep_zoo(TASK, rows, tmp_path, jobs=1))
    assert [result.freeze_after for result in results] == ["None", *map(str, FRACTIONS), "auto"]
    never, *frozen, _ = results
    assert never.frozen_at is None and [result.frozen_at for result in frozen] == [5, 10, 20, 30, 40, 60]
    flops = [result.flops for result in (*frozen, never)]
    assert flops == sorted(set(flops))
    first = Run(rows["None"].run_folder(tmp_path))
    commands: dict[str, list[list[str]]] = {}
    for name, row in rows.items():
        log = (tmp_path / row.name / "log.txt").read_text()
        commands[name] = [shlex.split(line) for line in log.splitlines() if "-m rl_zoo3.train" in line]
        model, run = SEERDQN.load(row.model(tmp_path)), Run(row.run_folder(tmp_path))
        assert model.num_timesteps == 100 and model._n_updates == 96 and run.timesteps.tolist() == [20, 40, 60, 80, 100]
        shared = run.timesteps <= (row.from_step or 0)
        assert run.returns[shared].tolist() == first.returns[shared].tolist()
    # Two were killed, and went on
    assert sorted(len(started) for started in commands.values()) == [1] * 6 + [2] * 2 and len(commands["None"]) == 2
    for fraction in FRACTIONS:
        command = commands[str(fraction)][0]
        start = Path(command[command.index("-i") + 1])
        assert start == tmp_path / rows["None"].name / "checkpoint" / "kept" / str(round(100 * fraction)) / "model.zip"
        assert not start.exists()  # the sweep is complete
    assert "-i" not in commands["auto"][0]

    monkeypatch.setattr(LightEnv, "step", None)  # nothing is trained again
    assert list(sweep_zoo(TASK, rows, tmp_path, jobs=1)) == results


def test_other_settings_are_other_trainings() -> None:
    names = [make_rows(task, 0, params)["auto"].name for task in (TASK, f"{TASK} -n 50") for params in (PARAMS, PARAMS[1:])]
    assert len(set(names)) == 4


def test_settings_are_those_that_rl_zoo_takes(tmp_path: Path) -> None:
    assert read_settings("rainbow_seer", None, "ALE/Alien-v5") == read_settings("rainbow_seer", None, "AlienNoFrameskip-v4")
    (tmp_path / "mine.yml").write_text("my/One-v0: {n_timesteps: 7}")
    assert read_settings("dqn_seer", str(tmp_path / "mine.yml"), "my/One-v0") == dict(n_timesteps=7)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["puck", "--params", "gamma:0.9"], "`--params` are for trainings of RL Zoo"),
        (["dqn_seer my/One-v0", "--params", "freeze_after:9"], "`--params` must not have freeze_after"),
        (["dqn_seer my/One-v0", "--params", "gamma:0.9", "n_timesteps:9"], "`--params` must not have n_timesteps: give -n"),
        (["dqn_seer my/One-v0", "--params", "callback:'mine'"], "`--params` must not have callback: put it into a file"),
        (["cartpole"], "the following arguments are required: env"),
        (["dqn_seer my/One-v0 --eval-frequency 9"], "unrecognized arguments: --eval-frequency 9"),
        (["dqn_seer my/One-v0 -conf none.yml"], "none.yml must be a file in"),
    ],
)
def test_what_would_have_no_effect_is_refused(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["freeze_sweep", *arguments])
    with pytest.raises(SystemExit):
        main()
    assert message in capsys.readouterr().err

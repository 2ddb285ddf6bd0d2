"""The papers' tables by one command: manifests, and runs of them that lose nothing when something is killed."""

import json
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import trim_mean

from benchmarks.reproduce import report, runner
from benchmarks.reproduce.__main__ import main
from benchmarks.reproduce.manifest import TABLES, Point, Row, Table
from sb3_seer import SEERDQN
from sb3_seer.plots import Run
from tests.helpers import LightEnv
from tests.reproduce_env import Killed

REPOSITORY = Path(__file__).parent.parent
TINY = Row(
    agent="dqn_seer",
    algo="dqn_seer",
    env="TinyLight-v0",
    seed=0,
    n_timesteps=60,
    eval_freq=20,
    params=(
        "policy_kwargs:dict(features_extractor_class=sb3_seer.DataEfficientCNN,net_arch=[8])",
        *("learning_starts:10", "buffer_size:100", "freeze_after:30", "train_freq:1"),
    ),
    packages=("tests.reproduce_env",),
    eval_episodes=1,
)


def seeds(n: int, row: Row = TINY) -> list[Row]:
    return [replace(row, seed=seed) for seed in range(n)]


def write_model(file: Path, num_timesteps: int) -> None:
    with zipfile.ZipFile(file, "w") as model:
        model.writestr("data", json.dumps(dict(num_timesteps=num_timesteps)))


# ---- manifests ----


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_a_manifest_of_rl_zoo_commands(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    table = TABLES[name]
    assert main([name, "--seeds", "2", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(set(lines)) == 2 * (len(table.envs) * len(table.agents) + (table.pretraining is not None))
    for line in lines:
        assert line.startswith("python -m rl_zoo3.train --algo ")
        assert "--seed 0" in line or "--seed 1" in line


def test_games_seeds_and_resolution_are_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    main(["atari100k", "--games", "qbert", "Alien", "--seeds", "1", "--half-resolution", "--dry-run"])
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [line[line.index("--env") + 1] for line in lines] == ["AlienNoFrameskip-v4"] * 2 + ["QbertNoFrameskip-v4"] * 2
    configs = ["rainbow_half_resolution.yml", "rainbow_seer_half_resolution.yml"]
    assert [line[line.index("-conf") + 1] for line in lines] == configs * 2


def test_a_shorter_training_freezes_earlier() -> None:
    # The papers' T_f: 50,000 of 500,000 in Alien, 100,000 in Qbert; 12,500 of 62,500 in our cartpole
    (_, alien), (_, qbert) = (TABLES["table1-left"].rows([game], 1, 100_000) for game in ("Alien", "Qbert"))
    assert alien.params == ("freeze_after:10000",) and qbert.params == ("freeze_after:20000",)
    never, cartpole = TABLES["dmc"].rows(["cartpole"], 1, 100_000)
    assert cartpole.n_timesteps == 12_500 and cartpole.params == ("freeze_after:2500",)
    assert never.params == ("freeze_after:None", "buffer_size:12500")
    # As it is in the file
    assert TABLES["table1-left"].rows(["Alien"], 1)[1].params == ()


def test_what_is_not_in_a_table_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["atari100k", "--games", "Alien", "Pong"], "`--games` must be among AlienNoFrameskip-v4"),
        (["atari100k", "--seeds", "0"], "`--seeds` must be >= 1, got 0"),
        (["atari100k", "--steps", "1000000"], "`--steps` must be from 1 to 500,000"),
        (["atari100k", "--steps", "2000"], "`--steps` must be larger: rainbow_seer's T_f="),
        (["transfer", "--steps", "7"], "`--steps` must be larger: sac trains for 3, learning_starts=1,000"),
        (["table1-right", "--half-resolution"], "no settings for --half-resolution"),
        (["table1-left", "--half-resolution"], "no settings for --half-resolution"),
        (["atari100k", "--seeds", "1", "--row", "18"], "`--row` must be from 0 to 17, got 18"),
        (["atari100k", "--ray", "--jobs", "0"], "`--jobs` must be >= 1"),
        (["atari100k", "--ray", "--address", "auto", "--jobs", "2"], "not be given with --address, got 2"),
        (["atari100k", "--address", "auto"], "`--address` needs --ray"),
        (["atari100k", "--games", "Alien", "-f", "/dev/null/rows"], "/dev/null"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err


def test_a_table_with_pretraining_starts_from_its_model(tmp_path: Path) -> None:
    first, scratch, transfer, *_ = TABLES["transfer"].rows(seeds=1)
    assert first.env == "dm_control/walker-stand-v0" and transfer.after == first and scratch.after is None
    (pretrained,) = [word for word in transfer.command(tmp_path) if word.startswith("pretrained_encoder:")]
    assert eval(pretrained.split(":", 1)[1]) == str(first.model(tmp_path))
    # The paper: all networks for another task of the domain, the encoder for another domain
    params = {row.env: row.params for row in TABLES["transfer"].rows(seeds=1) if row.after is not None}
    assert "pretrained_part:'policy'" in params["dm_control/walker-walk-v0"]
    assert params["dm_control/hopper-hop-v0"] == ("freeze_after:0",)


def test_a_row_is_finished_once_its_last_step_and_evaluation_are_saved(tmp_path: Path) -> None:
    row = replace(TINY, n_timesteps=70)  # the last evaluation is at 60
    finish(row, tmp_path, [1, 2, 3], [10, 20, 30])
    model, evaluations = row.model(tmp_path), row.run_folder(tmp_path) / "evaluations.npz"
    assert row.is_finished(tmp_path)
    write_model(model, 65)  # after Ctrl-C
    assert not row.is_finished(tmp_path)
    model.write_bytes(b"PK")
    assert not row.is_finished(tmp_path)
    write_model(model, 70)
    whole = evaluations.read_bytes()
    for damaged in (b"", bytes(len(whole)), whole[: len(whole) // 2]):
        evaluations.write_bytes(damaged)
        assert not row.is_finished(tmp_path)
    evaluations.write_bytes(whole)
    assert row.is_finished(tmp_path)
    # RL Zoo evaluates 9 environments every 18 steps, not every 20
    for timesteps, finished in (([18, 36, 54], True), ([18, 36], False)):
        np.savez(evaluations, timesteps=timesteps, results=np.ones((len(timesteps), 1)))
        assert row.is_finished(tmp_path) == finished


# ---- one row, with RL Zoo in this process ----


@pytest.mark.parametrize("kill_at", [25, 50, 55])
def test_a_killed_training_goes_on_from_its_checkpoint(
    kill_at: int, train_here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, n_calls = LightEnv.step, 0

    def killed(self: LightEnv, action: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls == kill_at + kill_at // 20 * 10:  # 10 steps in each evaluation
            raise Killed
        return step(self, action)

    monkeypatch.setattr(LightEnv, "step", killed)
    assert runner.run_row(TINY, tmp_path).problem is None
    log = (tmp_path / TINY.name / "log.txt").read_text()
    first, second = (line for line in log.splitlines() if "-m rl_zoo3.train" in line)
    assert " -i " not in first and f"/checkpoint/{kill_at // 20 * 20}/model.zip" in second
    # As without the kill: steps, updates, evaluations, operations, and the freeze in its place
    run = Run(TINY.run_folder(tmp_path))
    assert run.timesteps.tolist() == [20, 40, 60]
    model = SEERDQN.load(TINY.model(tmp_path))
    assert model.num_timesteps == 60 and model._n_updates == 50 and model.encoder_frozen
    assert [row.timesteps for row in run.rows if row.timesteps % 20 == 0][-3:] == [20, 40, 60]
    assert run.freeze() == 30 and np.all(np.diff(run.x("flops", run.timesteps)) > 0)
    assert not (tmp_path / TINY.name / "checkpoint").exists()
    assert (TINY.run_folder(tmp_path) / "best_model.zip").is_file()
    # Interrupted while the evaluations were written
    assert TINY.is_finished(tmp_path)
    evaluations = TINY.run_folder(tmp_path) / "evaluations.npz"
    evaluations.write_bytes(evaluations.read_bytes()[:100])
    assert not TINY.is_finished(tmp_path)


def test_callbacks_of_the_settings_stay(tmp_path: Path) -> None:
    row = replace(TINY, algo="td3_seer", env="dm_control/cartpole-swingup-v0", params=())
    (callbacks,) = [word for word in runner.training_command(row, tmp_path) if word.startswith("callback:")]
    assert "NoiseScheduleCallback" in callbacks and "FlopsCallback" in callbacks and "Checkpoint" in callbacks


# ---- many rows, with a stand-in for RL Zoo that takes half a second ----

STAND_IN = """
import os, signal, sys, time, zipfile
from pathlib import Path
import numpy as np

def argument(name):
    return sys.argv[sys.argv.index(name) + 1]

seed, home = argument("--seed"), Path(argument("-f"))
(home / "worker").write_text(str(os.getppid()))
with (home / "trainings.txt").open("a") as file:
    print(*sys.argv, file=file)
if seed == os.environ.get("FAIL"):
    sys.exit("no such thing")
checkpoint = home / "checkpoint" / "20" / "model.zip"
if "-i" not in sys.argv:
    time.sleep(0.3)
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    if seed == os.environ.get("INTERRUPT"):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    if seed == os.environ.get("KILL"):
        os.kill(os.getpid(), signal.SIGKILL)
time.sleep(0.3)
env = argument("--env").replace("/", "-")
folder = home / argument("--algo") / f"{env}_1"
folder.mkdir(parents=True)
np.savez(folder / "evaluations.npz", timesteps=[int(argument("-n"))], results=np.ones((1, 1)))
with zipfile.ZipFile(folder / f"{env}.zip", "w") as file:
    file.writestr("data", f'{{"num_timesteps": {argument("-n")}}}')
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module rl_zoo3.train for the processes that start. Returns a folder for the rows."""
    package = tmp_path / "stand_in" / "rl_zoo3"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "train.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setenv("SB3_SEER_NO_ZOO_HOOK", "1")
    return tmp_path / "rows"


def trainings(row: Row, folder: Path) -> list[str]:
    """:return: the arguments of each training that was started for it"""
    return (folder / row.name / "trainings.txt").read_text().splitlines()


@pytest.fixture
def needs_ray() -> None:
    pytest.importorskip("ray", reason="It is in the extra for clusters")
    if os.getloadavg()[0] > 2 * (os.cpu_count() or 1):
        pytest.skip("Ray gives its processes 15 seconds to start: too few on a machine this busy")


def test_a_failed_row_is_reported_and_does_not_stop_the_others(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = seeds(3)
    monkeypatch.setenv("FAIL", "0")
    ((row, problem),) = runner.run(rows, stand_in, jobs=2)
    log = stand_in / rows[0].name / "log.txt"
    assert row == rows[0] and problem == f"exit code 1, see {log}" and "no such thing" in log.read_text()
    assert f"{rows[0].name} failed: {problem}" in capsys.readouterr().out
    assert [row.is_finished(stand_in) for row in rows] == [False, True, True]
    # Again: only what is not finished
    monkeypatch.delenv("FAIL")
    assert runner.run(rows, stand_in, jobs=2) == []
    assert "3/3" in capsys.readouterr().err
    assert [len(trainings(row, stand_in)) for row in rows] == [2, 1, 1]


def test_a_row_that_starts_from_another_comes_after_it(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = TINY
    rows = [replace(TINY, seed=1, after=first), first]
    monkeypatch.setenv("FAIL", "0")
    assert [outcome.row for outcome in runner.run(rows, stand_in, jobs=2)] == [first, rows[0]]
    assert not (stand_in / rows[0].name).exists()
    monkeypatch.delenv("FAIL")
    assert runner.run(rows, stand_in, jobs=2) == []


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.02)


def test_a_killed_training_is_resumed(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = seeds(2)
    monkeypatch.setenv("KILL", "1")
    assert runner.run(rows, stand_in, jobs=2) == []
    assert len(trainings(rows[0], stand_in)) == 1
    first, second = trainings(rows[1], stand_in)
    assert " -i " not in first and " -i " in second


def test_an_interrupted_training_is_not_started_again(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERRUPT", "0")
    interrupted = TINY.run_folder(stand_in)
    interrupted.mkdir(parents=True)
    (stand_in / TINY.name / "interrupted_2").mkdir()  # the first one was removed
    (stand_in / TINY.name / "interrupted_2" / "log").touch()
    ((_, problem),) = runner.run([TINY], stand_in, jobs=1)
    assert problem is not None and len(trainings(TINY, stand_in)) == 1
    assert (stand_in / TINY.name / "interrupted_3").is_dir()


@pytest.mark.parametrize("n_finished", [0, 1, 2])
def test_a_killed_runner_loses_no_finished_row_and_trains_none_twice(n_finished: int, stand_in: Path) -> None:
    rows = seeds(4)
    code = f"""
    from pathlib import Path
    from benchmarks.reproduce.manifest import Row
    from benchmarks.reproduce.runner import run
    run({rows!r}, Path({str(stand_in)!r}), jobs=2)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    started = stand_in / rows[1].name / "trainings.txt"
    wait_for(lambda: started.exists() and sum(row.is_finished(stand_in) for row in rows) >= n_finished)
    process.kill()
    process.wait()
    before = {row: row.model(stand_in).stat().st_mtime_ns for row in rows if row.is_finished(stand_in)}
    assert n_finished <= len(before) < 4
    # Trainings that the runner left behind go on. The next runner waits for them
    assert runner.run(rows, stand_in, jobs=2) == []
    assert {row: row.model(stand_in).stat().st_mtime_ns for row in before} == before
    assert [len(trainings(row, stand_in)) for row in rows] == [1, 1, 1, 1]
    assert not list(stand_in.glob("*/interrupted_*"))


def test_a_killed_worker_of_ray_loses_no_row(needs_ray: None, stand_in: Path) -> None:
    rows = seeds(4)
    killed: list[Row] = []

    def kill() -> None:
        # The worker of a training that has started, when another row is finished
        wait_for(lambda: any(row.is_finished(stand_in) for row in rows))
        while not killed and not all(row.is_finished(stand_in) for row in rows):
            for row in rows:
                worker = stand_in / row.name / "worker"
                if not killed and worker.exists() and worker.read_text() and not row.is_finished(stand_in):
                    os.kill(int(worker.read_text()), signal.SIGKILL)
                    killed.append(row)
            time.sleep(0.02)

    thread = threading.Thread(target=kill)
    thread.start()
    failed = runner.run(rows, stand_in, on_ray=True, jobs=2)
    thread.join()
    assert killed and failed == []
    assert all(row.is_finished(stand_in) for row in rows)
    assert all(len(trainings(row, stand_in)) == 1 for row in rows if row not in killed)


def test_sbatch_prints_an_array_of_what_is_not_finished(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stand_in / "a folder"
    arguments = ["transfer", "--seeds", "1", "-f", str(folder)]
    assert main([*arguments, "--sbatch"]) == 0
    script = capsys.readouterr().out
    assert f'#SBATCH --output="{folder}/slurm-%A_%a.txt"\n' in script
    assert folder.is_dir()  # before a task runs
    # Rows 2 and 4 start from the model of row 0
    assert "#SBATCH --array=0,1,3\n" in script and "# 2 more rows start from models of these" in script
    assert f"-m benchmarks.reproduce {shlex.join(arguments)} --row $SLURM_ARRAY_TASK_ID" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    # A task, and what is left then
    assert main([*arguments, "--row", "0"]) == 0
    main([*arguments, "--sbatch"])
    script = capsys.readouterr().out
    assert "#SBATCH --array=1,2,3,4\n" in script and "more rows" not in script
    for row in "1234":
        main([*arguments, "--row", row])
    with pytest.raises(SystemExit):
        main([*arguments, "--sbatch"])
    assert f"All rows in {folder} are finished" in capsys.readouterr().err


# ---- Ray and RL Zoo ----


@pytest.mark.slow
def test_ray_runs_a_manifest_and_the_report_shows_it(needs_ray: None, tmp_path: Path) -> None:
    rows = [TINY, replace(TINY, agent="never", params=(*TINY.params[:-2], "freeze_after:None", "train_freq:1"))]
    assert runner.run(rows, tmp_path, on_ray=True, jobs=2) == []
    points = (Point("60 steps", "steps", 60), Point("equal FLOPs", "flops", None))
    report.write_report("Tiny", rows, points, tmp_path, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "2 of 2 rows are finished" in text and "**One seed.**" in text
    assert (tmp_path / "report" / "figure.png").stat().st_size > 10_000
    evaluations = pd.read_csv(tmp_path / "report" / "evaluations.csv")
    assert evaluations.groupby("agent").steps.apply(list).to_dict() == {"dqn_seer": [20, 40, 60], "never": [20, 40, 60]}
    assert np.all(evaluations.flops > 0)


# ---- reports ----


def finish(row: Row, folder: Path, returns: list[float], flops: list[int]) -> None:
    """Write what RL Zoo would have."""
    run = row.run_folder(folder)
    run.mkdir(parents=True)
    steps = row.eval_freq * np.arange(1, 1 + len(returns))
    np.savez(run / "evaluations.npz", timesteps=steps, results=np.array(returns)[:, None])
    lines = [f"{step},{count},{step / 10},0" for step, count in zip(steps, flops, strict=True)]
    (run / "flops.csv").write_text("\n".join(["timesteps,flops,seconds,frozen", *lines]))
    write_model(row.model(folder), row.n_timesteps)


@pytest.fixture
def atari(tmp_path: Path) -> tuple[Table, list[Row], Path]:
    """Three seeds of two agents in four games, with returns of chance. The second agent needs half of the operations."""
    table, rng = TABLES["atari100k"], np.random.default_rng(0)
    rows = table.rows(["Alien", "Amidar", "Qbert", "Krull"], seeds=3)
    for row in rows:
        cost = 10 if row.agent == "rainbow" else 5
        finish(row, tmp_path, rng.uniform(100, 2000, 10).tolist(), [cost * i for i in range(1, 11)])
    return table, rows, tmp_path


def test_scores_are_read_at_equal_steps_and_at_equal_flops(atari: tuple[Table, list[Row], Path]) -> None:
    table, rows, folder = atari
    results = report.load_results(rows, folder)
    at_steps, at_flops = (report.scores(results, point) for point in table.points)
    for row, run in results:
        for frame, step in ((at_steps, 100_000), (at_flops, 50_000 if row.agent == "rainbow" else 100_000)):
            chosen = frame[(frame.agent == row.agent) & (frame.environment == row.env) & (frame.seed == row.seed)]
            assert chosen.steps.item() == step and chosen.score.item() == run.returns[run.timesteps == step].item()
    # Equal to whose?
    one_lacks = [result for result in results if result.row.agent == "rainbow" or "Alien" not in result.row.env]
    environments = [set(report.scores(one_lacks, point).environment) for point in table.points]
    assert environments[0] - environments[1] == {"AlienNoFrameskip-v4"} and len(environments[1]) == 3
    # Nobody came so far
    assert report.scores(results, Point("later", "steps", 200_000)).empty


def test_aggregates_are_those_of_rliable_and_scipy(atari: tuple[Table, list[Row], Path]) -> None:
    pytest.importorskip("rliable", reason="It is in the extra for benchmarks")
    table, rows, folder = atari
    frame = report.scores(report.load_results(rows, folder), table.points[0])
    published = pd.read_csv(report.PUBLISHED)
    aggregates = report.aggregate_table(frame, published[published.point == "100K steps"], reps=200)
    human = {"Alien": (227.8, 7127.7), "Amidar": (5.8, 1719.5), "Qbert": (163.9, 13455.0), "Krull": (1598.0, 2665.5)}
    for agent in ("rainbow", "rainbow_seer"):
        normalised = [
            (row.score - low) / (high - low)
            for row in frame[frame.agent == agent].itertuples()
            for low, high in [human[row.environment.removesuffix("NoFrameskip-v4")]]
        ]
        for name, value in (("IQM", trim_mean(normalised, 0.25)), ("mean", np.mean(normalised))):
            text, interval = aggregates.loc[agent, name].split(" ", 1)
            low, high = map(float, interval.strip("[]").split(","))
            assert float(text) == pytest.approx(value, abs=5e-4) and low < value < high
    der = {"Alien": 740, "Amidar": 189, "Qbert": 1153, "Krull": 2852}
    mean = np.mean([(der[game] - low) / (high - low) for game, (low, high) in human.items()])
    assert float(aggregates.loc["DER", "mean"]) == pytest.approx(mean, abs=5e-4)


def test_the_report_puts_published_results_beside_ours_and_says_how_little_few_seeds_show(
    atari: tuple[Table, list[Row], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rliable", reason="It is in the extra for benchmarks")
    _, rows, folder = atari
    shape = ["--games", "Alien", "Amidar", "Qbert", "Krull", "--seeds", "3", "-f", str(folder)]
    assert main(["atari100k", *shape, "--report"]) == 0
    text = (folder / "atari100k" / "report.md").read_text()
    assert "24 of 24 rows" in text and "**3 seeds.**" in text
    alien = next(line for line in text.splitlines() if line.startswith("|") and "Alien" in line)
    assert alien.count("(3)") == 2 and "740" in alien and "1,173" in alien
    assert "* DER: data-efficient Rainbow (https://arxiv.org/abs/1906.05243)" in text
    assert len(pd.read_csv(folder / "atari100k" / "evaluations.csv")) == 10 * len(rows)
    # What is not finished is missing, and said to be
    rows[-1].model(folder).unlink()
    main(["atari100k", *shape, "--report"])
    text = (folder / "atari100k" / "report.md").read_text()
    assert "23 of 24 rows" in text and "**2 seeds.**" in text
    capsys.readouterr()


def test_seeds_are_counted_in_the_environments_that_all_agents_have() -> None:
    alien = [("Alien", agent, seed) for agent in ("rainbow", "rainbow_seer") for seed in range(3)]
    table = pd.DataFrame([*alien, ("Krull", "rainbow", 0)], columns=["environment", "agent", "seed"])
    complete, n_seeds = report.complete(table)
    assert set(complete.environment) == {"Alien"} and len(complete) == 6 and n_seeds == 3
    assert report.complete(table[5:])[1] == 0 and "No environment" in report.caution(0)


def test_every_published_result_has_a_source_and_belongs_to_a_table() -> None:
    published = pd.read_csv(report.PUBLISHED)
    assert published.source.str.len().min() > 10 and not published.duplicated(["point", "environment", "method"]).any()
    places = {(point.label, env) for table in TABLES.values() for point in table.points for env in table.envs}
    assert set(zip(published.point, published.environment, strict=True)) <= places

"""From log folders to figures: what is drawn is what was logged."""

import csv
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor

from sb3_seer import Rainbow, SEERRainbow
from sb3_seer.common.flops import FlopsCallback
from sb3_seer.plots import AXES, Curve, Run, load_curves, main, plot
from tests.helpers import LightEnv, TinyEncoder

FREEZE_STEP = 60


def train(cls: type, folder: Path, seed: int, callbacks: list[Any], **kwargs: Any) -> Any:
    """What RL Zoo leaves of a training: evaluations every 40 steps, monitor files, the model at the end."""
    env = make_vec_env(LightEnv, seed=seed, monitor_dir=str(folder))
    evaluations = EvalCallback(Monitor(LightEnv()), eval_freq=40, log_path=str(folder), verbose=0, warn=False)
    model = cls(
        "CnnPolicy",
        env,
        buffer_size=200,
        learning_starts=10,
        batch_size=16,
        train_freq=1,
        policy_kwargs=dict(features_extractor_class=TinyEncoder),
        seed=seed,
        **kwargs,
    )
    model.learn(120, callback=[evaluations, *callbacks])
    model.save(folder / "Light-v0")
    return model


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs with SEER, and two without."""
    logs = tmp_path_factory.mktemp("logs")
    for seed in (1, 2):
        train(SEERRainbow, logs / "rainbow_seer" / f"Light-v0_{seed}", seed, [], freeze_after=FREEZE_STEP)
        train(Rainbow, logs / "rainbow" / f"Light-v0_{seed}", seed, [FlopsCallback()])
    return logs


def folders(logs: Path, *patterns: str) -> list[Path]:
    return [folder for pattern in patterns for folder in sorted(logs.glob(pattern))]


def evaluations(folder: Path) -> np.ndarray:
    """:return: the mean return of each evaluation"""
    with np.load(folder / "evaluations.npz") as file:
        return np.array([np.mean(results) for results in file["results"]])


def test_runs_are_grouped_by_environment_and_algorithm(logs: Path) -> None:
    curves = load_curves(folders(logs, "rainbow_seer/*", "rainbow/*"))
    assert [(curve.environment, curve.name, len(curve.runs)) for curve in curves] == [
        ("Light-v0", "rainbow_seer", 2),
        ("Light-v0", "rainbow", 2),
    ]


def test_an_experiment_has_the_name_of_its_file(logs: Path, tmp_path: Path) -> None:
    """``args.yml`` is what RL Zoo writes of its command line."""
    for number, conf_file in enumerate([None, "curl.yml", "/somewhere/curl.yml", "my.setups", None]):
        folder = tmp_path / "curl_seer" / f"dm_control-walker-walk-v0_{number}"
        shutil.copytree(logs / "rainbow" / "Light-v0_1", folder)
        arguments = folder / "dm_control-walker-walk-v0" / "args.yml"
        arguments.parent.mkdir()
        arguments.write_text(yaml.dump(OrderedDict(algo="curl_seer", conf_file=conf_file, env="dm_control/walker-walk-v0")))
    curves = load_curves(folders(tmp_path, "curl_seer/*"))
    assert [(curve.name, len(curve.runs)) for curve in curves] == [("curl_seer", 2), ("curl", 2), ("my.setups", 1)]


def test_algorithms_with_the_same_file_are_curves_of_their_own(logs: Path, tmp_path: Path) -> None:
    for algo, conf_file in (("sac_seer", "my.yml"), ("curl_seer", "my.yml"), ("sac_seer", "other.yml")):
        folder = tmp_path / algo / f"Light-v0_{len(conf_file)}"
        shutil.copytree(logs / "rainbow" / "Light-v0_1", folder)
        (folder / "Light-v0").mkdir()
        (folder / "Light-v0" / "args.yml").write_text(yaml.dump(OrderedDict(conf_file=conf_file)))
    curves = load_curves(folders(tmp_path, "*_seer/*"))
    assert [(curve.name, len(curve.runs)) for curve in curves] == [("curl_seer, my", 1), ("sac_seer, my", 1), ("other", 1)]


def test_names_of_folders(tmp_path: Path) -> None:
    def environment(name: str) -> str:
        return Run(tmp_path / "dqn_seer" / name).environment

    assert environment("AlienNoFrameskip-v4_12") == "AlienNoFrameskip-v4"
    assert environment("dm_control-cartpole-swingup-v0_1") == "dm_control-cartpole-swingup-v0"
    assert environment("Light-v0_3_0b6cf7e8-6f0c-4b3b-9a0e-5f4f4f6d9b1e") == "Light-v0"


def test_the_figure_shows_mean_spread_and_freeze(logs: Path) -> None:
    figure = plot(load_curves(folders(logs, "rainbow_seer/*", "rainbow/*")), ["steps", "flops", "time"])
    runs = folders(logs, "rainbow_seer/*")
    returns = np.stack([evaluations(folder) for folder in runs])
    rows = [Run(folder).rows for folder in runs]
    at_evaluations = [[row for row in run if row.timesteps % 40 == 0 and row.timesteps > 0] for run in rows]
    at_freeze = [next(row for row in run if row.frozen) for run in rows]
    expected = [
        (np.array([40, 80, 120]), FREEZE_STEP),
        (np.mean([[row.flops for row in run] for run in at_evaluations], axis=0), np.mean([row.flops for row in at_freeze])),
        (
            np.mean([[row.seconds for row in run] for run in at_evaluations], axis=0) / 3600,
            np.mean([row.seconds for row in at_freeze]) / 3600,
        ),
    ]
    for panel, (x, freeze), (label, _) in zip(figure.axes, expected, AXES.values(), strict=True):
        curve, line, baseline = panel.lines
        assert curve.get_label() == "rainbow_seer" and baseline.get_label() == "rainbow"
        np.testing.assert_allclose(curve.get_xdata(), x)
        np.testing.assert_allclose(curve.get_ydata(), returns.mean(axis=0))
        np.testing.assert_allclose(line.get_xdata(), [freeze, freeze])
        spread = panel.collections[0].get_datalim(panel.transData)
        assert spread.ymin == pytest.approx((returns.mean(axis=0) - returns.std(axis=0)).min())
        assert spread.ymax == pytest.approx((returns.mean(axis=0) + returns.std(axis=0)).max())
        assert panel.get_xlabel() == label
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["rainbow_seer", "rainbow", "encoder frozen"]


@pytest.mark.parametrize("axes", [["step"], "steps"])
def test_unknown_axes_are_refused(axes) -> None:
    with pytest.raises(ValueError, match="`axes` must be a list with some of 'steps', 'flops', 'time'"):
        plot([], axes)


def test_the_legend_fits_into_the_figure(logs: Path) -> None:
    runs = [Run(folder) for folder in folders(logs, "rainbow/*")]
    figure = plot([Curve("Light-v0", f"an agent with settings {number}", runs) for number in range(4)])
    figure.draw_without_rendering()
    legend = figure.legends[-1].get_window_extent()
    assert figure.bbox.x0 <= legend.x0 and legend.x1 <= figure.bbox.x1
    assert len(figure.legends) == 1


def test_a_single_run_has_no_spread(logs: Path) -> None:
    (panel,) = plot(load_curves([logs / "rainbow" / "Light-v0_1"])).axes
    assert len(panel.lines) == 1 and not panel.collections
    np.testing.assert_allclose(panel.lines[0].get_ydata(), evaluations(logs / "rainbow" / "Light-v0_1"))


def test_runs_of_other_lengths_are_drawn_as_far_as_they_go_together(tmp_path: Path) -> None:
    def run(name: str, timesteps: list[int], returns: list[float]) -> Run:
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "evaluations.npz", timesteps=timesteps, results=np.array(returns)[:, None])
        return Run(tmp_path / name)

    runs = [run("a", [10, 20, 30], [1.0, 2.0, 3.0]), run("b", [20, 30, 40], [4.0, 5.0, 6.0])]
    curve = Curve("env", "algorithm", runs)
    assert curve.timesteps.tolist() == [20, 30]
    assert curve.returns.tolist() == [[2.0, 3.0], [4.0, 5.0]]

    runs.append(run("c", [15], [1.0]))
    with pytest.raises(ValueError, match=r"a, .*/b, .*/c were never evaluated at the same step"):
        _ = Curve("env", "algorithm", runs).timesteps


def test_an_encoder_that_was_always_frozen_has_no_line(tmp_path: Path) -> None:
    (tmp_path / "flops.csv").write_text("timesteps,flops,seconds,frozen\n0,0,0.0,1\n40,80,1.0,1\n")
    assert Run(tmp_path).freeze() is None


@pytest.mark.parametrize("axis", ["flops", "time"])
def test_without_a_meter_there_are_steps_alone(axis: str, logs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "rainbow" / "Light-v0_1"
    shutil.copytree(logs / "rainbow" / "Light-v0_1", folder)
    (folder / "flops.csv").unlink()
    run = Run(folder)
    assert run.x("steps", run.timesteps).tolist() == [40, 80, 120]
    assert run.freeze() is None
    with pytest.raises(
        ValueError, match=f"{folder} must have a flops.csv for -x {axis}. .* sb3_seer.common.flops.FlopsCallback"
    ):
        run.x(axis, run.timesteps)


# ---- the command ----


def test_the_command_draws_and_writes(logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output, table = tmp_path / "figure.png", tmp_path / "figure.csv"
    main([*map(str, folders(logs, "*/*")), "-x", "steps", "flops", "-o", str(output), "--csv", str(table)])
    assert output.read_bytes().startswith(b"\x89PNG") and str(output) in capsys.readouterr().out
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["environment", "name", "runs", "steps", "flops", "frozen", "return_mean", "return_std"]
    seer = [row for row in rows if row["name"] == "rainbow_seer"]
    assert [(row["runs"], row["steps"], row["frozen"]) for row in seer] == [
        ("2", "40", "0"),
        ("2", "80", "1"),
        ("2", "120", "1"),
    ]
    returns = np.stack([evaluations(folder) for folder in folders(logs, "rainbow_seer/*")])
    np.testing.assert_allclose([float(row["return_mean"]) for row in seer], returns.mean(axis=0))
    np.testing.assert_allclose([float(row["return_std"]) for row in seer], returns.std(axis=0))
    counted = [row.flops for row in Run(logs / "rainbow_seer" / "Light-v0_1").rows]
    assert [float(row["flops"]) for row in seer] == [counted[1], counted[3], counted[4]]
    assert all(row["frozen"] == "0" for row in rows if row["name"] == "rainbow")


@pytest.mark.parametrize("folder", ["", "rainbow_seer", "nowhere"])
def test_a_folder_without_evaluations_is_named(folder: str, logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main([str(logs / folder), "-o", str(tmp_path / "figure.png")])
    error = capsys.readouterr().err
    assert f"{logs / folder} has no evaluations.npz" in error and "--eval-freq" in error
    assert not (tmp_path / "figure.png").exists()


def test_what_cannot_be_drawn_together_is_said(tmp_path: Path) -> None:
    def run(name: str, n: int, settings: Any = None, **args: Any) -> Path:
        folder = tmp_path / "dqn_seer" / name
        (folder / "Light-v0").mkdir(parents=True)
        (folder / "Light-v0" / "args.yml").write_text(yaml.dump(dict(conf_file=None, **args)))
        (folder / "Light-v0" / "config.yml").write_text(yaml.dump(OrderedDict(settings or {})))
        if n > 0:
            np.savez(folder / "evaluations.npz", timesteps=10 * np.arange(1, n + 1), results=np.ones((n, 2)))
        return folder

    folders = [run("Light-v0_1", 3), run("Light-v0_2", 0)]
    folders.append(run("Light-v0_3", 2, settings=dict(gamma=0.5), trained_agent="model.zip"))
    folders.append(run("Light-v0_4", 2, settings=dict(callback="any"), trained_agent="model.zip"))
    (folders[-1] / "flops.csv").write_text("timesteps,flops,seconds,frozen\n0,0,0.0,0\n")  # its steps go on
    folders.append(folders[0].parent / ".." / "dqn_seer" / folders[0].name)  # the same folder
    with pytest.warns(UserWarning) as said:
        (curve,) = load_curves(folders)
        assert len(curve.runs) == 3 and curve.timesteps.tolist() == [10, 20]
    messages = [str(warning.message) for warning in said if warning.category is UserWarning]
    assert [message.replace(str(tmp_path), "") for message in messages] == [
        "Left out, without evaluations: /dqn_seer/Light-v0_2",
        "/dqn_seer/Light-v0_3 is a training that was resumed with -i: its steps begin at 0 again",
        "dqn_seer in Light-v0: runs with different hyperparameters are drawn as one curve. Give each kind a -conf file with a "
        "name of its own",
        "dqn_seer: the runs differ in length. Drawn until step 20, as far as all of them go",
    ]


def test_evaluations_that_not_all_runs_have_are_mentioned(tmp_path: Path) -> None:
    for seed, timesteps in (1, [10, 20, 30]), (2, [15, 30]):
        folder = tmp_path / "dqn" / f"Light-v0_{seed}"
        folder.mkdir(parents=True)
        np.savez(folder / "evaluations.npz", timesteps=timesteps, results=np.ones((len(timesteps), 2)))
    (curve,) = load_curves(sorted((tmp_path / "dqn").iterdir()))
    with pytest.warns(UserWarning, match="evaluated at different steps. Drawn are the 1 that all have"):
        assert curve.timesteps.tolist() == [30]


def test_an_agent_that_was_frozen_from_the_first_step_is_frozen_in_the_table(tmp_path: Path) -> None:
    folder = tmp_path / "dqn_seer" / "Light-v0_1"
    folder.mkdir(parents=True)
    np.savez(folder / "evaluations.npz", timesteps=[10, 20], results=np.ones((2, 2)))
    (folder / "flops.csv").write_text("timesteps,flops,seconds,frozen\n0,0,0,1\n10,7,1,1\n20,9,2,1\n")
    main([str(folder), "-o", str(tmp_path / "figure.png"), "--csv", str(tmp_path / "table.csv")])
    assert [row["frozen"] for row in csv.DictReader((tmp_path / "table.csv").open())] == ["1", "1"]


@pytest.mark.parametrize("content", [b"", b"PK", bytes(100)])
def test_evaluations_that_were_killed_while_written_are_named(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "rainbow" / "Light-v0_1"
    folder.mkdir(parents=True)
    (folder / "evaluations.npz").write_bytes(content)
    with pytest.raises(SystemExit):
        main([str(folder), "-o", str(tmp_path / "figure.png")])
    assert f"{folder / 'evaluations.npz'} is damaged" in capsys.readouterr().err


def test_a_damaged_log_is_named(logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "rainbow" / "Light-v0_1"
    folder.mkdir(parents=True)
    for name, content, message in (
        ("flops.csv", "", "must have the columns timesteps, flops, seconds, frozen, got "),
        ("flops.csv", "timesteps,flops,seconds,frozen\n10,7\n", "is damaged"),
        ("flops.csv", "timesteps,flops,seconds,frozen\n10,7,1,x\n", "is damaged"),
        ("flops.csv", "timesteps,flops,seconds,frozen\n5,7,1,0\n", "must go on until step 10, as the evaluations do, got 5"),
        ("evaluations.npz", dict(timesteps=[10, 20, 10], results=np.ones((3, 1))), "must be of one learn()"),
    ):
        np.savez(folder / "evaluations.npz", timesteps=[10], results=[[1.0]])
        if isinstance(content, dict):
            np.savez(folder / name, **content)
        else:
            (folder / name).write_text(content)
        with pytest.raises(SystemExit):
            main([str(folder), "-x", "flops", "-o", str(tmp_path / "figure.png")])
        assert str(folder / name) in (error := capsys.readouterr().err) and message in error


@pytest.mark.parametrize("content", ["- a: [", "a: !!python/name:no_such_module.Network"])
def test_arguments_that_cannot_be_read_are_named(content: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "rainbow" / "Light-v0_1" / "Light-v0" / "args.yml"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    np.savez(file.parents[1] / "evaluations.npz", timesteps=[10], results=[[1.0]])
    with pytest.raises(SystemExit):
        main([str(file.parents[1]), "-o", str(tmp_path / "figure.png")])
    assert f"{file} cannot be read" in capsys.readouterr().err


def test_other_axes_are_refused(logs: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main([str(logs / "rainbow" / "Light-v0_1"), "-x", "episodes"])
    assert "choose from" in capsys.readouterr().err

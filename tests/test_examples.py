"""The examples run, shortened by their parameters. ``own_algorithm.py`` has tests of its own."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import matplotlib
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
ARGUMENTS = {
    "own_environment.py": ["--total-timesteps", "150"],
    "analyse_run.py": ["--total-timesteps", "100"],
    "two_cameras.py": ["--total-timesteps", "60"],
    "swap_sac.py": ["--total-timesteps", "60", "--batch-size", "4", "--threads", "1"],
}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    matplotlib.use("Agg")


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ARGUMENTS))
def test_the_script_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *ARGUMENTS[name]])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_sac_is_swapped_by_one_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("Box2D", reason="It is in an extra")
    monkeypatch.setattr(sys, "argv", ["swap_sac.py", "--algo", "sac", *ARGUMENTS["swap_sac.py"]])
    runpy.run_path(str(EXAMPLES / "swap_sac.py"), run_name="__main__")
    output = capsys.readouterr().out
    assert "from images" in output and "after the freeze" not in output


def test_the_pretrained_encoder_is_read_from_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "catch_encoder.pt"
    for arguments in ([], ["--weights", str(weights)], ["--random"]):
        monkeypatch.setattr(sys, "argv", ["pretrained_encoder.py", "--total-timesteps", "60", *arguments])
        runpy.run_path(str(EXAMPLES / "pretrained_encoder.py"), run_name="__main__")
        output = capsys.readouterr().out
        assert ("mean squared error" in output) == (arguments == [])
        assert "the buffer holds latents" in output
        assert weights.exists()


@pytest.mark.slow
@pytest.mark.parametrize("notebook", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.name)
def test_the_notebook_runs(notebook: Path) -> None:
    """Each cell in turn, in one namespace, after the cell of the parameters with other values."""
    names: dict[str, Any] = {"__name__": "notebook"}
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), notebook.name, "exec"), names)
            if "parameters" in cell["metadata"].get("tags", []):
                names["total_timesteps"] = 300
    assert names["loaded"].encoder_frozen
    # The same agent until the freeze
    frozen, never = ([episode for episode in timer.returns if episode[0] <= 90] for timer in names["timers"].values())
    assert frozen == never and len(frozen) == 2

"""The README and the documentation: their Python runs, in short; their commands, files and links are there."""

import argparse
import importlib.util
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from zoo_integration.registration import ALGORITHMS, default_config, find_config

REPOSITORY = Path(__file__).parent.parent
PAGES = [*REPOSITORY.glob("*.md"), REPOSITORY / "examples/README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if "_build" not in page.parts]


def name_of(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings of minutes take seconds: few steps, small batches, an early freeze."""
    learn = OffPolicyAlgorithm.learn

    def learn_a_little(model: Any, total_timesteps: int, *args: Any, **kwargs: Any) -> Any:
        model.learning_starts, model.batch_size = min(model.learning_starts, 20), min(model.batch_size, 4)
        for name, limit in (("batch_size_after_freeze", 4), ("freeze_after", 30)):
            if isinstance(getattr(model, name, None), int):
                setattr(model, name, min(getattr(model, name), limit))
        return learn(model, min(total_timesteps, 40), *args, **kwargs)

    monkeypatch.setattr(OffPolicyAlgorithm, "learn", learn_a_little)


def prepare_logs() -> None:
    """The log folders of guides/figures.md."""
    import numpy as np

    for algo in ("rainbow_seer", "rainbow"):
        folder = Path(f"logs/{algo}/AlienNoFrameskip-v4_1")
        folder.mkdir(parents=True)
        np.savez(folder / "evaluations.npz", timesteps=np.array([10, 20]), results=np.ones((2, 3)))
        (folder / "flops.csv").write_text("timesteps,flops,seconds,frozen\n10,100,1,0\n20,150,2,1\n")


def prepare_run() -> None:
    """The run of guides/analysis.md."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(REPOSITORY / "examples")
        monkeypatch.setattr(sys, "argv", [""])
        runpy.run_path(str(REPOSITORY / "examples/analyse_run.py"))["train_with_checkpoints"](100)


PREPARE: dict[str, Callable[[], None]] = {"docs/guides/figures.md": prepare_logs, "docs/guides/analysis.md": prepare_run}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This system does not have apparently enough memory")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_the_python_of_a_page_runs(
    page: Path,
    short: None,
    forget_registrations: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From the first block to the last, in one namespace. A line that prints says what in its comment."""
    monkeypatch.chdir(tmp_path)
    PREPARE.get(name_of(page), lambda: None)()
    names: dict[str, Any] = {"__name__": "docs"}
    outputs = []
    for block in blocks(page, "python"):
        exec(compile(block, name_of(page), "exec"), names)
        outputs.append(capsys.readouterr().out)
        for comment in re.findall(r"^print\(.*\) +# (.*)$", block, re.MULTILINE):
            value = re.match(r"torch\.Size\(\[.*?\]\)|\w+", comment)
            assert value is not None and value.group() in outputs[-1].splitlines()
    for text in blocks(page, "text"):
        if text.startswith("images: "):  # a memory plan
            assert text in "".join(outputs)


def test_yaml_can_be_read() -> None:
    for page in PAGES:
        for block in blocks(page, "yaml"):
            yaml.safe_load(block)


def commands() -> list[list[str]]:
    """:return: the words of each ``python -m``, without comments"""
    lines = "\n".join(block for page in PAGES for block in blocks(page, "bash")).replace("\\\n", " ").splitlines()
    lines = [re.sub(r"^(\w+=\S+ )+", "", line.strip()) for line in lines]  # without environment variables
    found = [line for line in lines if line.startswith("python -m ")]
    return [shlex.split(line, comments=True)[2:] for line in dict.fromkeys(found)]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_name_algorithms_and_hyperparameters_that_are_there(command: list[str]) -> None:
    module, *arguments = command
    assert module == "venv" or importlib.util.find_spec(module) is not None
    if not module.startswith("rl_zoo3."):
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--algo")
    parser.add_argument("--env")
    parser.add_argument("-conf")
    args, _ = parser.parse_known_args(arguments)
    assert args.algo in ALGORITHMS
    config = Path(find_config(args.conf) if args.conf else default_config(args.algo))
    known = {args.env, "atari" if "NoFrameskip" in args.env else args.env}
    if any(argument.startswith("env_wrapper:") for argument in arguments):  # gives the block "default" its images
        known.add("default")
    assert known & set(yaml.safe_load(config.read_text()))


def test_links_into_the_repository_lead_somewhere() -> None:
    for page in PAGES:
        links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
        links += re.findall(r"```\{(?:include|image)\} (\S+)", page.read_text())
        missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
        assert missing == [], page


def test_each_algorithm_has_its_page_and_its_row_in_the_readme() -> None:
    pages = "\n".join(page.read_text() for page in (REPOSITORY / "docs/algorithms").glob("*.md"))
    readme = (REPOSITORY / "README.md").read_text()
    for name, (algorithm, _) in ALGORITHMS.items():
        assert f"autoclass:: sb3_seer.{algorithm.__name__}\n" in pages, name
        assert f"`{algorithm.__name__}`" in readme, name


def test_the_readme_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 150

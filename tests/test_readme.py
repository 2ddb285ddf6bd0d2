"""What the README shows works: its Python runs with small numbers, its commands name what is there."""

import argparse
import importlib.util
import os
import re
import shlex
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import yaml

import sb3_seer
import sb3_seer.envs
from tests.helpers import DialEnv, LightEnv
from zoo_integration.registration import ALGORITHMS, default_config, find_config

README = (Path(__file__).parent.parent / "README.md").read_text()
# Numbers of the README, and what they are here: minutes become seconds
SMALL = {
    "62_500": "60",
    "10_000": "40",
    "learning_starts=1_000": "learning_starts=20",
    "batch_size=128": "batch_size=4",
    "50_000": "100",
    "100_000": "60",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def run(block: str, **names: Any) -> None:
    for number, small in SMALL.items():
        block = block.replace(number, small)
    exec(block, names)


def test_the_first_example_needs_no_other_change() -> None:
    first, *_ = blocks("python")
    with pytest.warns(UserWarning, match="before its first gradient step"):  # SB3's learning_starts is 100
        run(first, env=DialEnv(size=48))


def test_the_example_of_the_paper_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    _, example, *_ = blocks("python")
    try:
        sb3_seer.envs.DMControlPixels(gym.make("dm_control/cartpole-swingup-v0")).reset()
    except Exception as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"Nothing can be drawn on this machine: {error!r}")
    run(example)
    *_, frozen, shape, capacity = capsys.readouterr().out.splitlines()
    assert (frozen, shape) == ("True", "torch.Size([1, 2, 50])")
    # 187,500 of the README are 18.75 times 10,000
    assert int(capacity) == 18.75 * 40


def test_the_other_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, _, transfer, prioritized = blocks("python")
    policy_kwargs = dict(features_extractor_class=sb3_seer.PixelEncoder, net_arch=[8])
    sb3_seer.SEERSAC("CnnPolicy", DialEnv(size=40), policy_kwargs=policy_kwargs, buffer_size=100).save("walker_stand.zip")
    run(transfer, env=DialEnv(size=40), policy_kwargs=policy_kwargs, SEERSAC=sb3_seer.SEERSAC)
    run(prioritized, env=LightEnv(size=48), SEERDQN=sb3_seer.SEERDQN)


def commands() -> list[list[str]]:
    """:return: the words of each ``python -m``, without comments"""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[2:] for line in lines if line.startswith("python -m ")]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_name_algorithms_and_hyperparameters_that_are_there(command: list[str]) -> None:
    module, *arguments = command
    assert importlib.util.find_spec(module) is not None
    if not module.startswith("rl_zoo3."):
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--algo")
    parser.add_argument("--env")
    parser.add_argument("-conf")
    args, _ = parser.parse_known_args(arguments)
    assert args.algo in ALGORITHMS
    config = Path(find_config(args.conf) if args.conf else default_config(args.algo))
    assert {args.env, "atari" if "NoFrameskip" in args.env else args.env} & set(yaml.safe_load(config.read_text()))

import itertools
import os
import signal
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch as th
from gymnasium.utils import seeding
from stable_baselines3.common.utils import set_random_seed

# As on a machine without a GPU, and so in the processes that tests start: many expect tensors on the CPU
os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Results do not depend on how many cores there are, and tiny networks are faster so."""
    th.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What passes once passes again, also where a test gives no seed: to a model, an environment or an action space."""
    set_random_seed(0)
    np_random, seeds = seeding.np_random, itertools.count()
    monkeypatch.setattr(seeding, "np_random", lambda seed=None: np_random(next(seeds) if seed is None else seed))


@pytest.fixture
def forget_registrations(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers with RL Zoo, others do not see."""
    import rl_zoo3.hyperparams_opt

    from zoo_integration import registration

    for table in (
        registration.ALGORITHMS,
        rl_zoo3.ALGOS,
        rl_zoo3.hyperparams_opt.HYPERPARAMS_SAMPLER,
        rl_zoo3.hyperparams_opt.HYPERPARAMS_CONVERTER,
    ):
        for name in ("mine_seer", "sarsa_seer"):
            monkeypatch.setitem(table, name, None)
            del table[name]


@pytest.fixture
def train_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings run in this process, without the seconds that the imports take."""
    import rl_zoo3.train

    import zoo_integration
    from benchmarks.reproduce import runner
    from tests.reproduce_env import Killed

    zoo_integration.register()

    def run(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", command[2:])
        try:
            rl_zoo3.train.train()
        except Killed:
            return subprocess.CompletedProcess(command, -signal.SIGKILL)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(runner, "subprocess", SimpleNamespace(run=run, DEVNULL=subprocess.DEVNULL))

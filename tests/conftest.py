import os
import signal
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch as th

# As on a machine without a GPU, and so in the processes that tests start: many expect tensors on the CPU
os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Results do not depend on how many cores there are, and tiny networks are faster so."""
    th.set_num_threads(1)


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

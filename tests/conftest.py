import os

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

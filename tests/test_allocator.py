"""Memory that is freed on a CPU: kept for the next gradient step, returned at the freeze."""

import os
import platform
import subprocess
import sys

import pytest
import torch as th

from sb3_seer import SEERDQN
from sb3_seer.common.allocator import ENVIRONMENT_VARIABLES, keep_freed_memory, return_freed_memory
from tests.helpers import make_model

PROGRAM = """
import resource
import torch as th
from sb3_seer.common.allocator import keep_freed_memory, return_freed_memory

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [th.ones(2**20) for _ in range(20)]
    del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def megabytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6

page_faults()
before = page_faults()
done = keep_freed_memory()
page_faults()
after, kept = page_faults(), megabytes()
return_freed_memory()
print(done, before, after, kept - megabytes())
"""


def run(**variables: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT_VARIABLES}
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.run(command, env=environment | variables, capture_output=True, text=True, check=True).stdout.split()


glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library frees memory in another way")


@glibc
def test_freed_memory_is_kept_until_it_is_returned():
    done, before, after, returned = run()
    assert done == "True"
    assert int(after) < int(before) / 10
    assert float(returned) > 70  # megabytes


@glibc
@pytest.mark.parametrize("variable", ENVIRONMENT_VARIABLES)
def test_the_environment_has_the_last_word(variable):
    assert run(**{variable: "glibc.malloc.perturb=0" if variable == "GLIBC_TUNABLES" else "131072"})[0] == "False"


def test_another_c_library_is_left_alone(monkeypatch):
    class Musl:
        """Has the functions, and may mean something else by them."""

        @staticmethod
        def mallopt(*args: int) -> int:
            raise AssertionError(args)

        malloc_trim = mallopt

    monkeypatch.setattr("sb3_seer.common.allocator.ctypes.CDLL", lambda name: Musl())
    assert keep_freed_memory() is False
    return_freed_memory()


def test_it_is_kept_while_the_encoder_learns_on_a_cpu(monkeypatch):
    calls = []
    for name in ("keep_freed_memory", "return_freed_memory"):
        monkeypatch.setattr(f"sb3_seer.common.seer.{name}", lambda name=name: calls.append(name))
    model = make_model(SEERDQN, freeze_after=40)
    assert calls == []
    model.learn(60)
    assert calls == ["keep_freed_memory", "return_freed_memory"]
    model.device = th.device("cuda")
    model._setup_learn(10, None)
    assert len(calls) == 2

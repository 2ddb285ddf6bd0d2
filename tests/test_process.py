"""Memory that is freed on a CPU: kept where a program asks for it, and never by importing or learning."""

import os
import platform
import subprocess
import sys

import pytest

from sb3_seer.common.process import ENVIRONMENT_VARIABLES, return_freed_memory, tune_process

PROGRAM = """
import resource
import torch as th
from sb3_seer.common.process import tune_process, return_freed_memory

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
done = tune_process()
# Where the heap has holes, it may take a few rounds until it is large enough
after, kept = min(page_faults() for _ in range(5)), megabytes()
return_freed_memory()
print(done, before, after, kept - megabytes())
"""


def run(program: str = PROGRAM) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT_VARIABLES}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout.split()


glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library frees memory in another way")


@glibc
def test_freed_memory_is_kept_until_it_is_returned():
    done, before, after, returned = run()
    assert done == "True"
    assert int(after) < int(before) / 10
    assert float(returned) > 70  # megabytes


@pytest.mark.parametrize("variable", ENVIRONMENT_VARIABLES)
def test_the_environment_has_the_last_word(variable, monkeypatch):
    monkeypatch.setenv(variable, "131072")
    assert tune_process() is False


def test_another_c_library_is_left_alone(monkeypatch):
    class Musl:
        """Has the functions, and may mean something else by them."""

        @staticmethod
        def mallopt(*args: int) -> int:
            raise AssertionError(args)

        malloc_trim = mallopt

    monkeypatch.setattr("sb3_seer.common.process.ctypes.CDLL", lambda name: Musl())
    assert tune_process() is False
    return_freed_memory()


LEARN = """
import ctypes
import warnings

import psutil, sb3_contrib, stable_baselines3, sympy  # have filters of their own

filters = list(warnings.filters)
found = ctypes.CDLL.__getattr__
called = []
ctypes.CDLL.__getattr__ = lambda self, name: called.append(name) or found(self, name)

from sb3_seer import SEERDQN
from tests.helpers import LightEnv, TinyEncoder

policy_kwargs = dict(features_extractor_class=TinyEncoder)
model = SEERDQN("CnnPolicy", LightEnv(), buffer_size=200, learning_starts=10, freeze_after=40, policy_kwargs=policy_kwargs)
model.learn(60)
print(model.encoder_frozen, warnings.filters == filters, "mallopt" in called)
"""


def test_neither_importing_nor_learning_changes_the_process():
    assert run(LEARN) == ["True", "True", "False"]

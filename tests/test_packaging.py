"""The package as users install it: from a wheel and from a folder, each in its own virtual environment."""

import json
import os
import re
import site
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import sb3_seer

REPOSITORY = Path(__file__).parent.parent
ALGORITHMS = [
    "crossq_seer", "curl_seer", "dqn_seer", "qrdqn_seer", "rainbow", "rainbow_seer", "sac_seer", "td3_seer", "tqc_seer"
]  # fmt: skip
HOOK_OFF = {"SB3_SEER_NO_ZOO_HOOK": "1"}


class Venv:
    """
    A virtual environment.

    :param path: where to make it
    :param package: wheel or folder to install
    :param editable: whether to install it editable
    :param dependencies: whether it can import what is installed here
    """

    def __init__(self, path: Path, package: Path, editable: bool = False, dependencies: bool = True) -> None:
        self.path = path
        self.python = path / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        execute(sys.executable, "-m", "venv", "--without-pip", str(path))
        paths = execute(str(self.python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout
        self.site_packages = Path(paths.strip())
        # The packages installed here come after its own. Their .pth files are not read, so there is only its own hook
        borrowed = self.site_packages / "zz_dependencies.pth"
        borrowed.write_text("\n".join(dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))))
        pip = (sys.executable, "-m", "pip", "--python", str(self.python), "--disable-pip-version-check", "install")
        execute(*pip, "--no-deps", "--no-index", "--no-build-isolation", *(["-e"] if editable else []), str(package))
        if not dependencies:
            borrowed.unlink()

    def run(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run its interpreter, away from the repository."""
        return execute(str(self.python), *arguments, cwd=self.path, **environ)


def execute(*command: str, cwd: Path | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
    ours = ("PYTHON", "SB3_SEER", "COVERAGE", "GITHUB_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    result = subprocess.run(command, cwd=cwd, env={**inherited, **environ}, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def build_wheel(folder: Path, **environ: str) -> Path:
    options = ("-q", "--no-deps", "--no-build-isolation", "-w", str(folder))
    execute(sys.executable, "-m", "pip", "wheel", *options, str(REPOSITORY), **environ)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module", params=["wheel", "editable"])
def venv(request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Venv:
    editable = request.param == "editable"
    return Venv(tmp_path_factory.mktemp(request.param) / "venv", REPOSITORY if editable else wheel, editable)


def test_the_wheel_has_all_files_and_no_other(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    files = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "hyperparams").rglob("*.yml")}
    assert {f"hyperparams/{algo}.yml" for algo in ALGORITHMS} | {"hyperparams/papers/curl_small_buffer.yml"} <= files
    assert {f"zoo_integration/{file}" for file in files} <= set(names)
    assert {"sb3_seer/py.typed", "zoo_integration/py.typed", "sb3_seer_zoo.pth"} <= set(names)
    for folder in ("sb3_seer", "zoo_integration"):
        sources = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / folder).rglob("*.py")}
        assert sources == {name for name in names if name.startswith(f"{folder}/") and name.endswith(".py")}
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"sb3_seer", "zoo_integration", "sb3_seer_zoo.pth"}


@pytest.mark.parametrize("repository", [None, "owner/name"])
def test_a_release_has_absolute_links_in_its_readme(repository: str | None, tmp_path: Path) -> None:
    """PyPI shows the README without the files beside it."""
    archive = zipfile.ZipFile(build_wheel(tmp_path, **({"GITHUB_REPOSITORY": repository} if repository else {})))
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    header, _, readme = archive.read(name).decode().partition("\n\n")
    original = (REPOSITORY / "README.md").read_text()
    assert f"Version: {sb3_seer.__version__}" in header and "Project-URL: Paper, " in header
    if repository is None:
        assert readme == original
        return
    assert f"Project-URL: Source, https://github.com/{repository}\n" in header
    page = f"https://github.com/{repository}/blob/v{sb3_seer.__version__}/"
    image = f"https://raw.githubusercontent.com/{repository}/v{sb3_seer.__version__}/"
    links = re.findall(r"\]\(([^)]+)\)", readme)
    assert all(link.startswith("https://") for link in links)
    assert f"]({image}docs/images/gain.png)" in readme and f"]({page}docs/getting_started.md)" in readme
    files = [link.removeprefix(page).removeprefix(image) for link in links if link.startswith((page, image))]
    assert files and all((REPOSITORY / file).is_file() for file in files)
    assert readme.replace(page, "").replace(image, "") == original


def test_the_start_of_an_interpreter_imports_the_hook_and_nothing_else(venv: Venv) -> None:
    code = "import sys; print(*sys.modules)"
    with_hook = set(venv.run("-c", code).stdout.split())
    without_site = set(venv.run("-S", "-c", f"import site; {code}").stdout.split())
    assert with_hook - without_site == {"zoo_integration", "zoo_integration.hook"}
    # It is there, and once, though site reads the .pth files of a virtual environment twice
    code = "import sys; print([finder.__name__ for finder in sys.meta_path if 'Zoo' in str(finder)])"
    assert venv.run("-c", code).stdout.strip() == "['ZooFinder']"
    assert venv.run("-c", code, **HOOK_OFF).stdout.strip() == "[]"
    assert venv.run("-c", "pass").stderr == ""


def test_rl_zoo_lists_the_algorithms(venv: Venv) -> None:
    help_text = venv.run("-m", "rl_zoo3.train", "--help").stdout
    for algo in ALGORITHMS:
        assert algo in help_text


def test_a_script_that_imports_rl_zoo_finds_everything(venv: Venv) -> None:
    code = """
import importlib.util, json, sys
assert importlib.util.find_spec("rl_zoo3") is not None
import rl_zoo3
registered = [name for name, algorithm in rl_zoo3.ALGOS.items() if algorithm.__module__.startswith("sb3_seer")]
lazy = "dm_control" not in sys.modules

import zoo_integration
from rl_zoo3.exp_manager import ExperimentManager
before = dict(vars(ExperimentManager))
zoo_integration.register()
configs = [ExperimentManager(None, algo, "CartPole-v1", "logs").config for algo in registered]
print(json.dumps([sorted(registered), lazy, before == dict(vars(ExperimentManager)), configs]))
"""
    result = venv.run("-c", code)
    registered, lazy, unchanged, configs = json.loads(result.stdout)
    assert registered == ALGORITHMS
    assert lazy
    assert unchanged
    assert [Path(config).name for config in configs] == [f"{algo}.yml" for algo in registered]
    assert all(Path(config).is_file() for config in configs)
    assert "seer" not in result.stderr.lower()


def test_the_hook_can_be_switched_off_and_done_by_hand(venv: Venv) -> None:
    code = """
import sys
import gymnasium, rl_zoo3
assert "sac_seer" not in rl_zoo3.ALGOS
import zoo_integration
sys.argv.append("--env=dm_control/cartpole-swingup-v0")
zoo_integration.register()
assert "dm_control/cartpole-swingup-v0" in gymnasium.registry
assert "sac_seer" in rl_zoo3.ALGOS
from rl_zoo3.hyperparams_opt import HYPERPARAMS_SAMPLER
assert "sac_seer" in HYPERPARAMS_SAMPLER
"""
    venv.run("-c", code, **HOOK_OFF)


@pytest.mark.slow
def test_train_and_enjoy_an_atari_game(wheel: Path, tmp_path: Path) -> None:
    """With the default hyperparameters, as a user would."""
    pytest.importorskip("ale_py", reason="It is in an extra")
    venv = Venv(tmp_path / "venv", wheel)
    arguments = ("--algo", "qrdqn_seer", "--env", "AlienNoFrameskip-v4", "-f", "logs")
    params = ("-params", "freeze_after:100", "learning_starts:50")
    output = venv.run("-m", "rl_zoo3.train", *arguments, "-n", "150", "--eval-freq", "-1", *params).stdout
    assert str(venv.site_packages / "zoo_integration/hyperparams/qrdqn_seer.yml") in output
    assert "Encoder frozen after 100 steps" in output
    venv.run("-m", "rl_zoo3.enjoy", *arguments, "--no-render", "-n", "20")


def test_silent_without_rl_zoo(wheel: Path, tmp_path: Path) -> None:
    code = """
try:
    import rl_zoo3
except ModuleNotFoundError as error:
    print(error)
"""
    result = Venv(tmp_path / "venv", wheel, dependencies=False).run("-c", code)
    assert result.stdout.strip() == "No module named 'rl_zoo3'"
    assert result.stderr == ""


@pytest.mark.slow
def test_a_broken_installation_breaks_no_interpreter_and_no_rl_zoo(wheel: Path, tmp_path: Path) -> None:
    venv = Venv(tmp_path / "venv", wheel)
    code = "import rl_zoo3.exp_manager; print('sac' in rl_zoo3.ALGOS, 'sac_seer' in rl_zoo3.ALGOS)"

    # Our own code fails: said once
    (venv.site_packages / "sb3_seer/__init__.py").write_text("raise RuntimeError('broken on purpose')")
    assert venv.run("-c", "pass").stderr == ""
    result = venv.run("-c", code)
    assert result.stdout.strip() == "True False"
    assert result.stderr.count("sb3_seer could not register with RL Zoo") == 1
    assert "broken on purpose" in result.stderr

    # Our files are gone, all but the hook
    for path in (venv.site_packages / "zoo_integration").rglob("*.py"):
        path.unlink()
    assert venv.run("-c", "pass").stderr == ""
    assert venv.run("-c", "import rl_zoo3; print('sac_seer' in rl_zoo3.ALGOS)").stdout.strip() == "False"


def test_this_environment_has_the_hook_if_the_package_is_installed() -> None:
    """``make install`` installs the hook: what the tests run in is what users have."""
    folders = [Path(folder) for folder in (*site.getsitepackages(), sysconfig.get_path("purelib"))]
    if not any((folder / "_sb3_seer.pth").exists() for folder in folders):
        pytest.skip("The tests run from a folder that is not installed")
    assert any((folder / "sb3_seer_zoo.pth").exists() for folder in folders)

"""Runs rows: as processes of this machine, as tasks of Ray, or as a SLURM array."""

import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks.reproduce.manifest import Row, read_settings

REPOSITORY = Path(__file__).parents[2]
FLOPS_CALLBACK = "sb3_seer.common.flops.FlopsCallback"
# A training that a signal killed, or a worker of Ray that died, is resumed so often
RETRIES = 2


class Outcome(NamedTuple):
    """
    :param row: what was run
    :param problem: why it is not finished, None if it is
    """

    row: Row
    problem: str | None


def latest_checkpoint(folder: Path) -> Path | None:
    """
    :param folder: of a ``Checkpoint``
    :return: the model of the newest complete checkpoint, if there is one
    """
    steps = [int(path.name) for path in folder.glob("[0-9]*")]
    return folder / str(max(steps)) / "model.zip" if steps else None


def training_command(row: Row, folder: Path) -> list[str]:
    """
    :param row: what to train
    :param folder: where the rows are
    :return: the row's command, with checkpoints, from the latest of them if there is one, else from ``row.from_step``
    """
    checkpoints = folder / row.name / "checkpoint"
    # -params callback replaces the callbacks of the YAML file
    configured = read_settings(row.algo, row.config, row.env).get("callback", [])
    callbacks = list(configured) if isinstance(configured, list) else [configured]
    if FLOPS_CALLBACK not in callbacks:
        callbacks.append(FLOPS_CALLBACK)
    settings = dict(folder=str(checkpoints), save_freq=row.eval_freq, keep=row.keep)
    checkpoint = {"benchmarks.reproduce.checkpoint.Checkpoint": settings}
    start = latest_checkpoint(checkpoints)
    if start is None and row.after is not None and row.from_step is not None:
        start = folder / row.after.name / "checkpoint" / "kept" / str(row.from_step) / "model.zip"
    arguments = () if start is None else ("-i", str(start))
    return row.command(folder, arguments, params=[f"callback:{[checkpoint, *callbacks]!r}"])


def run_row(row: Row, folder: Path) -> Outcome:
    """
    Train, from the latest checkpoint if there is one. A row that is finished is left as it is. If another process trains it,
    this one waits until that ends.

    :param row: what to run
    :param folder: where the rows are
    :return: the outcome
    """
    home = folder / row.name
    home.mkdir(parents=True, exist_ok=True)
    code = 0
    with (home / "lock").open("w") as lock, (home / "log.txt").open("a") as log:
        # A training inherits the lock, and holds it until it ends, even if this process is killed before
        fcntl.flock(lock, fcntl.LOCK_EX)
        for _ in range(1 + RETRIES):
            if row.is_finished(folder):
                break
            if row.run_folder(folder).exists():  # RL Zoo would number the next folder
                numbers = [int(path.name.split("_")[1]) for path in home.glob("interrupted_*")]
                row.run_folder(folder).rename(home / f"interrupted_{max(numbers, default=0) + 1}")
            command = training_command(row, folder)
            print(shlex.join(command), file=log, flush=True)
            path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(REPOSITORY)]))  # for the Checkpoint
            environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": path}
            code = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environ, pass_fds=[lock.fileno()]
            ).returncode
            if code >= 0 or code == -signal.SIGINT:  # Ctrl-C is for the training, too
                break
        if row.is_finished(folder):
            if not row.keep:
                shutil.rmtree(home / "checkpoint", ignore_errors=True)
            return Outcome(row, None)
    return Outcome(row, f"{f'exit code {code}' if code else 'interrupted'}, see {home / 'log.txt'}")


def run_here(rows: Sequence[Row], folder: Path, jobs: int) -> Iterator[Outcome]:
    """
    :param rows: what to run
    :param folder: where the rows are
    :param jobs: processes at a time, of one thread each
    :return: the outcomes, as the rows end
    """
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(run_row, row, folder) for row in rows]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:  # Ctrl-C
            pool.shutdown(wait=False, cancel_futures=True)


def run_on_ray(rows: Sequence[Row], folder: Path, address: str | None = None, jobs: int | None = None) -> Iterator[Outcome]:
    """
    Each row is a task of one CPU.

    :param rows: what to run
    :param folder: where the rows are, on a file system that all machines share
    :param address: of a cluster of Ray, None to start Ray on this machine
    :param jobs: CPUs of a Ray that is started, None for all
    :return: the outcomes, as the rows end
    :raises ImportError: without Ray
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError('--ray needs Ray: pip install "sb3_seer[cluster]"') from error

    options: dict[str, Any] = dict(address=address) if address else dict(num_cpus=jobs, include_dashboard=False)
    ray.init(**options, log_to_driver=False)
    try:
        task = ray.remote(num_cpus=1, max_retries=RETRIES)(run_row)
        pending = {task.remote(row, folder): row for row in rows}
        while pending:
            (done,), _ = ray.wait(list(pending))
            row = pending.pop(done)
            try:
                yield ray.get(done)
            except ray.exceptions.RayError as error:
                yield Outcome(row, f"{error}, see {folder / row.name / 'log.txt'}")
    finally:
        ray.shutdown()


def run(rows: Sequence[Row], folder: Path, **options: Any) -> list[Outcome]:
    """
    Run all rows that are not finished, with a progress bar. Rows that start from another row's model come after it.

    :param rows: what to run
    :param folder: where the rows are
    :param options: ``jobs`` of :func:`run_here`; with ``on_ray=True``, the arguments of :func:`run_on_ray`
    :return: the rows that failed
    """
    runner = run_on_ray if options.pop("on_ray", False) else run_here
    failed: list[Outcome] = []
    todo = [row for row in rows if not row.is_finished(folder)]
    with tqdm(total=len(rows), initial=len(rows) - len(todo), unit="row", smoothing=0) as bar:
        while ready := [row for row in todo if row.after is None or row.after.is_finished(folder)]:
            todo = [row for row in todo if row not in ready]
            for outcome in runner(ready, folder, **options):
                bar.update()
                if outcome.problem is not None:
                    failed.append(outcome)
                    bar.write(f"{outcome.row.name} failed: {outcome.problem}")
    return failed + [Outcome(row, f"{row.after.name} is not finished") for row in todo if row.after is not None]


def sbatch(rows: Sequence[Row], folder: Path, arguments: Sequence[str]) -> str:
    """
    :param rows: the manifest
    :param folder: where the rows are, on a file system that all machines share
    :param arguments: of the command that made the manifest
    :return: a script for ``sbatch``, with a task for each row that is not finished
    :raises ValueError: if there is none to run
    """
    ready = [
        index
        for index, row in enumerate(rows)
        if not row.is_finished(folder) and (row.after is None or row.after.is_finished(folder))
    ]
    if not ready:
        raise ValueError(f"All rows in {folder} are finished: --report writes the report")
    waiting = sum(row.after is not None and not row.after.is_finished(folder) for row in rows)
    lines = [
        "#!/bin/bash",
        "#SBATCH --job-name=reproduce",
        f"#SBATCH --array={','.join(map(str, ready))}",
        "#SBATCH --cpus-per-task=1 --mem=8G --time=24:00:00",
        "# A task that is killed goes on from its checkpoint",
        "#SBATCH --requeue --open-mode=append",
        f'#SBATCH --output="{folder}/slurm-%A_%a.txt"',
        f"cd {shlex.quote(str(Path.cwd()))}",
        f"{shlex.join([sys.executable, '-m', 'benchmarks.reproduce', *arguments])} --row $SLURM_ARRAY_TASK_ID",
    ]
    if waiting:
        lines.append(f"# {waiting} more rows start from models of these: print this script again when they are finished")
    return "\n".join(lines)

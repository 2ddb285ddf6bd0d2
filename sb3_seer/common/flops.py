"""What a training costs in floating point operations: counted as in the papers, and as PyTorch counts them."""

import csv
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from torch.utils.flop_counter import FlopCounterMode

from sb3_seer.common.callbacks import walk
from sb3_seer.common.flops_formula import FlopsFormula

# Written beside the evaluations of an EvalCallback
FLOPS_FILE = "flops.csv"


@dataclass
class FlopsCount:
    """
    What was counted so far. It is an attribute of the algorithm, and is saved with it.

    :param flops: operations, by the formula
    :param seconds: of the training, without the evaluations of an ``EvalCallback``
    :param n_updates: gradient steps that are counted
    :param frozen: whether the freeze is counted
    :param measured: operations in one update, by PyTorch's counter, by whether the encoder was frozen
    :param networks: E and M: the networks need not run for them again
    """

    flops: int = 0
    seconds: float = 0.0
    n_updates: int = 0
    frozen: bool = False
    measured: dict[bool, int] = field(default_factory=dict)
    networks: tuple[int, int] | None = None


class FlopsCallback(BaseCallback):
    """
    Counts the floating point operations of a training as they happen, and logs

    * ``seer/flops``: all so far, by the papers' formula, see :class:`FlopsFormula`,
    * ``seer/flops_update_measured``: what PyTorch's ``FlopCounterMode`` counted in one update of this stage (with images, or
      with latents). There a multiply-add is two operations, a backward pass is what is executed (the first layer needs no
      gradient of its input), and biases are none.

    Where an ``EvalCallback`` logs its evaluations, a file ``flops.csv`` is written beside them: the steps, the operations and
    the seconds (without those of the evaluations) until each evaluation, and until the freeze.

    A SEER algorithm attaches one by itself. Give it to ``Rainbow``, or to SB3's algorithms, to compare with them (in RL Zoo's
    YAML files: ``callback: sb3_seer.common.flops.FlopsCallback``).

    :param verbose: as for any callback
    :raises ValueError: if the passes of an update are not known of the algorithm, see :func:`find_passes`
    """

    model: Any
    # For the next update, until that is measured
    _measured_train: Callable[..., None] | None = None

    def _init_callback(self) -> None:
        if not hasattr(self.model, "flops_count"):
            self.model.flops_count = FlopsCount()
        self.formula = FlopsFormula.of(self.model, self._count.networks)
        self._count.networks = self.formula.encoder, self.formula.heads

    @property
    def _count(self) -> FlopsCount:
        return self.model.flops_count

    @property
    def _frozen(self) -> bool:
        return getattr(self.model, "encoder_frozen", False)

    # ---- events ----

    def _on_training_start(self) -> None:
        self._n_timesteps = self.num_timesteps
        self._eval_callbacks = [child for child in walk(self.locals.get("callback")) if isinstance(child, EvalCallback)]
        self._n_evaluations, self._was_frozen = self._evaluations(), self._frozen
        self._time = time.perf_counter()
        self._start_files()

    def _on_rollout_start(self) -> None:
        self._stop_measuring()
        self._count_operations()
        self._observe()

    def _on_step(self) -> bool:
        self._observe()
        return True

    def _on_rollout_end(self) -> None:
        self._observe()
        trains = self.num_timesteps > self.model.learning_starts and "train" not in vars(self.model)
        if trains and self._frozen not in self._count.measured:
            self.model.train = self._measured_train = self._make_measured_train()

    def _on_training_end(self) -> None:
        self._stop_measuring()
        self._count_operations()
        self._observe()

    def _observe(self) -> None:
        now, n_evaluations = time.perf_counter(), self._evaluations()
        evaluated, froze = n_evaluations > self._n_evaluations, self._frozen and not self._was_frozen
        # The time of a freeze counts, even if there was an evaluation next to it
        if froze or not evaluated:
            self._count.seconds += now - self._time
        self._time, self._n_evaluations, self._was_frozen = now, n_evaluations, self._frozen
        self.logger.record("seer/flops", self._count.flops)
        if self._frozen in self._count.measured:
            self.logger.record("seer/flops_update_measured", self._count.measured[self._frozen])
        if froze or evaluated:
            self._write_row()

    # ---- counting ----

    def _count_operations(self) -> None:
        # Only callbacks freeze, and they run between updates: these are all of one stage
        count, frozen = self._count, self._frozen
        count.flops += (self.model._n_updates - count.n_updates) * self.formula.update(self.model.batch_size, frozen)
        if frozen:
            # At the freeze all that is held was encoded, then what is new
            n_stored = self.num_timesteps - self._n_timesteps
            if not count.frozen:
                n_stored = self.model.replay_buffer.size() * self.model.n_envs
            count.flops += self.formula.storing(n_stored)
        count.n_updates, count.frozen = self.model._n_updates, frozen
        self._n_timesteps = self.num_timesteps

    def _make_measured_train(self) -> Callable[..., None]:
        """:return: the algorithm's ``train()`` for once, with PyTorch's counter"""
        model, count, frozen = self.model, self._count, self._frozen

        def train(*args: Any, **kwargs: Any) -> None:
            del model.train
            n_updates = model._n_updates
            with FlopCounterMode(display=False) as counter:
                model.train(*args, **kwargs)
            if model._n_updates > n_updates:
                count.measured[frozen] = counter.get_total_flops() // (model._n_updates - n_updates)

        return train

    def _stop_measuring(self) -> None:
        # With gradient_steps=0 nothing was trained
        if vars(self.model).get("train") is self._measured_train is not None:
            del self.model.train

    # ---- files ----

    def _evaluations(self) -> int:
        return sum(len(callback.evaluations_timesteps) for callback in self._eval_callbacks)

    def _files(self) -> list[Path]:
        return [Path(callback.log_path).parent / FLOPS_FILE for callback in self._eval_callbacks if callback.log_path]

    def _start_files(self) -> None:
        """Begin the files, or go on with them where a training is resumed."""
        for file in self._files():
            rows = [row for row in read_rows(file) if row.timesteps < self.num_timesteps]
            with file.open("w", newline="") as stream:
                csv.writer(stream).writerows([FlopsRow._fields, *rows])
        self._write_row()

    def _write_row(self) -> None:
        row = FlopsRow(self.num_timesteps, self._count.flops, round(self._count.seconds, 3), int(self._frozen))
        for file in self._files():
            with file.open("a", newline="") as stream:
                csv.writer(stream).writerow(row)


class FlopsRow(NamedTuple):
    """
    A row of a ``flops.csv``.

    :param timesteps: steps of the training
    :param flops: operations until then, see :class:`FlopsFormula`
    :param seconds: of the training until then, without the evaluations
    :param frozen: 1 if the encoder was frozen, 0 if not
    """

    timesteps: int
    flops: int
    seconds: float
    frozen: int


def read_rows(file: Path) -> list[FlopsRow]:
    """
    :param file: a ``flops.csv``
    :return: its rows, none if there is no such file
    :raises ValueError: if it is something else
    """
    if not file.is_file():
        return []
    with file.open(newline="") as stream:
        header, *rows = csv.reader(stream)
    if tuple(header) != FlopsRow._fields:
        raise ValueError(f"{file} has the columns {', '.join(header)}, allowed are {', '.join(FlopsRow._fields)}")
    return [FlopsRow(int(row[0]), int(row[1]), float(row[2]), int(row[3])) for row in rows]


def counts_flops(callback: BaseCallback) -> bool:
    """:return: whether a callback is a FlopsCallback, or calls one"""
    return any(isinstance(child, FlopsCallback) for child in walk(callback))

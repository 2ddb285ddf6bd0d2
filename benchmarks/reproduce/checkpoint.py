"""A checkpoint of a training that RL Zoo resumes with ``-i`` as if it had not stopped."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback, EvalCallback

from sb3_seer.common.callbacks import iter_callbacks

EVALUATIONS = (
    "n_calls",
    "evaluations_timesteps",
    "evaluations_results",
    "evaluations_length",
    "best_mean_reward",
    "last_mean_reward",
)


class Checkpoint(BaseCallback):
    """
    Saves the model, the replay buffer, and the evaluations so far with their best model between two steps, in
    ``<folder>/<steps>``, and removes the checkpoint before it. A training that is resumed from it with
    ``python -m rl_zoo3.train -i <folder>/<steps>/model.zip``, and with this callback, counts its steps, and adds to its
    evaluations, from there: RL Zoo's ``-i`` alone starts both from 0. Its ``--save-freq`` saves no replay buffers.

    :param folder: where to save
    :param save_freq: steps between two checkpoints
    :param keep: steps at which one more is saved, in ``<folder>/kept/<step>``, and not removed
    """

    model: Any

    def __init__(self, folder: str, save_freq: int, keep: Sequence[int] = ()) -> None:
        super().__init__()
        self.folder, self.save_freq, self.keep = Path(folder), save_freq, keep

    def _on_training_start(self) -> None:
        # An attribute of the model, which is saved with it
        progress: dict[str, Any] = getattr(self.model, "progress", {})
        self.model.num_timesteps = self.num_timesteps = self._saved_at = progress.get("num_timesteps", 0)
        evaluators = [callback for callback in iter_callbacks(self.locals["callback"]) if isinstance(callback, EvalCallback)]
        self._evaluator = evaluators[0] if evaluators else None
        for name in EVALUATIONS:
            if self._evaluator is not None and name in progress:
                setattr(self._evaluator, name, progress[name])
        self._copy_best_model(self.folder / str(self.num_timesteps), to_evaluator=True)

    def _on_rollout_start(self) -> None:
        # Here, and not in _on_step(), the transition is stored and the evaluation is done
        kept = [step for step in self.keep if self._saved_at < step <= self.num_timesteps]
        if self.num_timesteps - self._saved_at < self.save_freq and not kept:
            return
        self._saved_at = self.num_timesteps
        evaluations = {} if self._evaluator is None else {name: getattr(self._evaluator, name) for name in EVALUATIONS}
        self.model.progress = {"num_timesteps": self.num_timesteps, **evaluations}
        for step in kept:
            self._save(self.folder / "kept" / str(step))
        self._save(self.folder / str(self.num_timesteps))
        for folder in self.folder.glob("[0-9]*"):
            if folder.name != str(self.num_timesteps):
                shutil.rmtree(folder)

    def _save(self, folder: Path) -> None:
        unfinished = self.folder / "unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        self.model.save(unfinished / "model.zip")
        self.model.save_replay_buffer(unfinished / "replay_buffer.pkl")
        self._copy_best_model(unfinished)
        folder.parent.mkdir(exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)  # of a training that was killed after it
        unfinished.rename(folder)

    def _copy_best_model(self, folder: Path, to_evaluator: bool = False) -> None:
        if self._evaluator is None or self._evaluator.best_model_save_path is None:
            return
        theirs, ours = Path(self._evaluator.best_model_save_path) / "best_model.zip", folder / "best_model.zip"
        source, target = (ours, theirs) if to_evaluator else (theirs, ours)
        if source.is_file():
            shutil.copy(source, target)

    def _on_step(self) -> bool:
        return True

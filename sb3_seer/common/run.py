"""What RL Zoo's log folder of a training has."""

import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.save_util import load_from_zip_file

from sb3_seer.common.callbacks import freeze_step
from sb3_seer.common.flops import FLOPS_FILE, estimate_flops, read_rows


@dataclass(frozen=True)
class Run:
    """
    What the log folder of a training has, named ``<algorithm>/<environment>_<number>`` as RL Zoo does.

    :param folder: where it is
    :param timesteps: of the evaluations, in ascending order, shape ``(n,)``
    :param returns: the mean of each one's episodes, shape ``(n,)``
    """

    folder: Path
    timesteps: np.ndarray
    returns: np.ndarray

    @classmethod
    def load(cls, folder: str | Path) -> "Run":
        """
        :param folder: the log folder
        :return: its evaluations
        :raises ValueError: if there are none
        """
        folder = Path(folder)
        file = folder / "evaluations.npz"
        if not file.is_file():
            raise ValueError(
                f"{folder} has no evaluations.npz: allowed are the folders of runs that were evaluated, "
                "logs/<algorithm>/<environment>_<number> of python -m rl_zoo3.train --eval-freq <steps>"
            )
        with np.load(file) as evaluations:
            timesteps, returns = evaluations["timesteps"], evaluations["results"].mean(axis=1)
        return cls(folder, timesteps, returns)

    @property
    def algorithm(self) -> str:
        """RL Zoo's name of it: the folder above"""
        return self.folder.resolve().parent.name

    @property
    def name(self) -> str:
        """that of the file that was given as ``-conf``, or else of the algorithm"""
        for file in self.folder.glob("**/args.yml"):
            # Not with a YAML reader: RL Zoo writes objects of Python
            given = re.search(r"^\s*- - conf_file\n\s*- (\S+)$", file.read_text(), re.MULTILINE)
            if given is not None and given[1] != "null":
                return re.sub(r"\.(yml|yaml|py)$", "", Path(given[1]).name)
        return self.algorithm

    @property
    def environment(self) -> str:
        """the name of the folder, without the number of the run"""
        return re.sub(r"_\d+(_[0-9a-f-]{36})?$", "", self.folder.resolve().name)

    def x(self, axis: str, timesteps: np.ndarray) -> np.ndarray:
        """
        :param axis: ``"steps"``, ``"flops"`` or ``"time"``
        :param timesteps: of some evaluations, or of the freeze, shape ``(n,)``
        :return: steps, operations or seconds until then, shape ``(n,)``
        :raises ValueError: if the folder does not have what they come from
        """
        if axis == "steps":
            return timesteps
        rows = read_rows(self.folder / FLOPS_FILE)
        if not rows:
            return estimate_flops(self._load_model(), timesteps) if axis == "flops" else self._monitored_seconds(timesteps)
        values = [row.flops if axis == "flops" else row.seconds for row in rows]
        return np.interp(timesteps, [row.timesteps for row in rows], values)

    def freeze(self) -> int | None:
        """:return: the step at which the encoder was frozen; None if it never was, or always"""
        rows = read_rows(self.folder / FLOPS_FILE)
        if rows:
            frozen = [row.timesteps for row in rows if row.frozen]
            return frozen[0] if frozen and not rows[0].frozen else None
        if not self._model_file.is_file() or not (data := self._saved_data()).get("freeze_after"):
            return None
        step = freeze_step(SimpleNamespace(**data), data["freeze_after"])
        return step if step <= data["num_timesteps"] else None

    # ---- without a flops.csv ----

    @property
    def _model_file(self) -> Path:
        """the model at the end of the training (that of best_model.zip does not know how long it was)"""
        return self.folder / f"{self.environment}.zip"

    def _saved_data(self) -> dict[str, Any]:
        if not self._model_file.is_file():
            raise ValueError(
                f"{self.folder} has neither a {FLOPS_FILE} nor a saved model ({self._model_file.name}): "
                "allowed without them is -x steps"
            )
        data, _, _ = load_from_zip_file(self._model_file, device="cpu")
        assert data is not None
        return data

    def _load_model(self) -> Any:
        file, data = self._model_file, self._saved_data()
        try:
            from rl_zoo3 import ALGOS
        except ImportError as error:
            raise ImportError(
                f"{self.folder} has no {FLOPS_FILE}, and its {file.name} needs RL Zoo to be loaded: "
                'pip install "sb3_seer[zoo]"'
            ) from error
        if self.algorithm not in ALGOS:
            raise ValueError(f"{self.folder} is of {self.algorithm}, allowed are {', '.join(ALGOS)}")
        # No memory for a buffer
        model: Any = ALGOS[self.algorithm].load(file, device="cpu", buffer_size=1)
        model.buffer_size = data["buffer_size"]
        return model

    def _monitored_seconds(self, timesteps: np.ndarray) -> np.ndarray:
        episodes = load_results(str(self.folder))
        # With a frame skip, the monitor counts frames. The share of them is a share of the steps
        frames = np.cumsum(episodes["l"].to_numpy())
        steps = frames * self._saved_data()["num_timesteps"] / frames[-1]
        return np.interp(timesteps, [0, *steps], [0.0, *episodes["t"]])

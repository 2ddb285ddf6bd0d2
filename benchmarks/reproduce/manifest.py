"""Tables as manifests: rows of plain RL Zoo commands with seeds."""

import json
import math
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

HYPERPARAMS = Path(__file__).parents[2] / "hyperparams"


def read_settings(algo: str, config: str | None, env: str) -> dict[str, Any]:
    """
    :param algo: RL Zoo's name of an algorithm
    :param config: name or path of the YAML file for ``-conf``, None for the algorithm's own
    :param env: id of an environment
    :return: the block of the file that RL Zoo takes for the environment
    :raises ValueError: if there is no such file, or no such block
    """
    name = config or f"{algo}.yml"
    ours = [] if Path(name).is_absolute() else HYPERPARAMS.rglob(name)
    files = [Path(name), *ours] if config else [HYPERPARAMS / name]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise ValueError(f"{name} must be a file in {Path.cwd()} or in {HYPERPARAMS}")
    blocks = yaml.safe_load(file.read_text())
    is_atari = "NoFrameskip" in env or env.startswith("ALE/")
    names = [env, *(["atari"] if is_atari else []), "default"]
    block = next((blocks[name] for name in names if name in blocks), None)
    if block is None:
        raise ValueError(f"{file} must have settings of {env}, got {', '.join(blocks)}")
    return block


@dataclass(frozen=True)
class Row:
    """
    One training: a command of RL Zoo.

    :param agent: name of the agent in tables and figures
    :param algo: RL Zoo's name of the algorithm
    :param env: id of the environment
    :param seed: of the training
    :param n_timesteps: steps of the agent
    :param eval_freq: steps between two evaluations
    :param config: for ``-conf``
    :param params: for ``-params``
    :param packages: for ``--gym-packages``
    :param eval_episodes: episodes of an evaluation
    :param action_repeat: frames of a step, where the papers count frames: 1 for Atari, whose steps they count
    :param after: a row that must be finished first. Without ``from_step``, its model is the ``pretrained_encoder``
    :param from_step: a step of ``after``, among its ``keep``, from whose checkpoint this training goes on
    :param keep: steps whose checkpoints stay when it is finished
    """

    agent: str
    algo: str
    env: str
    seed: int
    n_timesteps: int
    eval_freq: int
    config: str | None = None
    params: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    eval_episodes: int = 10
    action_repeat: int = 1
    after: "Row | None" = None
    from_step: int | None = None
    keep: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """name of its folder: two tables that have the same row share it"""
        return f"{self.agent}-{self.env.replace('/', '-')}-{self.n_timesteps}-seed{self.seed}"

    def run_folder(self, folder: Path) -> Path:
        """
        :param folder: where the rows are
        :return: RL Zoo's log folder
        """
        return folder / self.name / self.algo / f"{self.env.replace('/', '-')}_1"

    def model(self, folder: Path) -> Path:
        """
        :param folder: where the rows are
        :return: file of the trained model
        """
        return self.run_folder(folder) / f"{self.env.replace('/', '-')}.zip"

    def is_finished(self, folder: Path) -> bool:
        """
        :param folder: where the rows are
        :return: whether a model of the last step is saved and the last evaluation was made. RL Zoo saves an interrupted
            model, too
        """
        try:
            with zipfile.ZipFile(self.model(folder)) as model:
                n_timesteps = json.loads(model.read("data"))["num_timesteps"]
            with np.load(self.run_folder(folder) / "evaluations.npz") as evaluations:
                last_evaluation = evaluations["timesteps"][-1]
        except (FileNotFoundError, zipfile.BadZipFile, KeyError, EOFError, ValueError):  # interrupted while it was written
            return False
        # With several environments RL Zoo evaluates at multiples of their number
        return bool(n_timesteps >= self.n_timesteps and last_evaluation > self.n_timesteps - self.eval_freq)

    def command(self, folder: Path, arguments: Sequence[str] = (), params: Sequence[str] = ()) -> list[str]:
        """
        :param folder: where the rows are
        :param arguments: more arguments
        :param params: more for ``-params``
        :return: the command and its arguments
        """
        all_params = [*self.params, *params]
        if self.after is not None and self.from_step is None:
            all_params.append(f"pretrained_encoder:{str(self.after.model(folder))!r}")
        return [
            *(sys.executable, "-m", "rl_zoo3.train", "--algo", self.algo, "--env", self.env),
            *(("-conf", self.config) if self.config else ()),
            *("-n", str(self.n_timesteps), "--seed", str(self.seed), "--num-threads", "1"),
            *("--eval-freq", str(self.eval_freq), "--eval-episodes", str(self.eval_episodes)),
            *("-f", str(folder / self.name)),
            *(("--gym-packages", *self.packages) if self.packages else ()),
            *arguments,
            *(("-params", *all_params) if all_params else ()),
        ]


class Agent(NamedTuple):
    """
    :param name: name in tables and figures
    :param algo: RL Zoo's name of the algorithm
    :param config: for ``-conf``
    :param params: for ``-params``; ``{n_timesteps}`` is replaced
    """

    name: str
    algo: str
    config: str | None = None
    params: tuple[str, ...] = ()


class Point(NamedTuple):
    """
    Where curves are read.

    :param label: name of the column, and of the published results to put beside it
    :param axis: ``"steps"`` of the agent, ``"frames"`` of the environment, or ``"flops"``
    :param value: on that axis; None for the end of the agent that needs least
    """

    label: str
    axis: str
    value: float | None


@dataclass(frozen=True)
class Table:
    """
    A table or figure: agents in environments.

    :param title: what it is, and where in the papers
    :param agents: what is compared
    :param envs: ids of environments
    :param points: where the curves are read
    :param steps: of the whole training, as the papers count: frames for control, steps of the agent for Atari
    :param seeds: of the papers
    :param half_resolution: the agents that ``--half-resolution`` has instead, if there are any
    :param eval_freq: steps of the agent between two evaluations
    :param pretraining: agent, environment and frames of a training from whose encoder the last agent starts
    """

    title: str
    agents: tuple[Agent, ...]
    envs: tuple[str, ...]
    points: tuple[Point, ...]
    steps: int = 500_000
    seeds: int = 5
    half_resolution: tuple[Agent, ...] = ()
    eval_freq: int = 10_000
    pretraining: tuple[Agent, str, int] | None = None

    def rows(
        self,
        envs: Sequence[str] | None = None,
        seeds: int | None = None,
        steps: int | None = None,
        half_resolution: bool = False,
    ) -> list[Row]:
        """
        :param envs: words that must be in the ids of environments, None for all
        :param seeds: number of seeds, None for the papers'
        :param steps: of a shorter training, with T_f scaled to it
        :param half_resolution: whether to halve the height and the width of images
        :return: the manifest: all agents of an environment one after the other, all environments of a seed
        :raises ValueError: if there is nothing to train, or for fewer or more steps than the settings are for
        """
        if half_resolution and not self.half_resolution:
            raise ValueError("This table has no settings for --half-resolution")
        steps, seeds = self.steps if steps is None else steps, self.seeds if seeds is None else seeds
        if not 0 < steps <= 500_000:
            raise ValueError(f"`--steps` must be from 1 to 500,000, which the settings are for, got {steps:,}")
        if seeds < 1:
            raise ValueError(f"`--seeds` must be >= 1, got {seeds}")
        chosen = [env for env in self.envs if envs is None or any(word.lower() in env.lower() for word in envs)]
        if not chosen or (envs and not all(any(word.lower() in env.lower() for env in self.envs) for word in envs)):
            raise ValueError(f"`--games` must be among {', '.join(self.envs)}, got {' '.join(envs or [])}")
        rows: list[Row] = []
        for seed in range(seeds):
            first = None
            if self.pretraining is not None:
                agent, env, frames = self.pretraining
                first = self._row(agent, env, seed, min(frames, steps))
                rows.append(first)
            agents = self.half_resolution if half_resolution else self.agents
            for env in chosen:
                for agent in agents:
                    after = first if agent is agents[-1] else None
                    rows.append(self._row(agent, env, seed, steps, after))
        return rows

    def _row(self, agent: Agent, env: str, seed: int, steps: int, after: Row | None = None) -> Row:
        settings = read_settings(agent.algo, agent.config, env)
        wrappers = [wrapper for wrapper in settings["env_wrapper"] if isinstance(wrapper, dict)]
        repeat = next((w["sb3_seer.envs.ActionRepeat"]["repeat"] for w in wrappers if "sb3_seer.envs.ActionRepeat" in w), 1)
        n_timesteps = max(steps // repeat, 1)
        first = settings["learning_starts"]
        if n_timesteps <= first:
            raise ValueError(f"`--steps` must be larger: {agent.name} trains for {n_timesteps}, learning_starts={first:,}")
        params = [param.format(n_timesteps=n_timesteps) for param in agent.params]
        freeze_after, whole = settings.get("freeze_after"), settings["n_timesteps"]
        is_given = any(param.startswith("freeze_after:") for param in params)
        if isinstance(freeze_after, int) and n_timesteps < whole and not is_given:
            scaled = round(freeze_after * n_timesteps / whole)
            if scaled <= first:
                raise ValueError(f"`--steps` must be larger: {agent.name}'s T_f={scaled} is before learning_starts={first:,}")
            params.append(f"freeze_after:{scaled}")
        if after is not None and after.env.split("-")[0] == env.split("-")[0]:
            # Within a domain the paper transfers all networks (LeVER, appendix C)
            params.append("pretrained_part:'policy'")
        eval_freq = max(min(self.eval_freq // repeat, n_timesteps), 1)
        return Row(
            *(agent.name, agent.algo, env, seed, n_timesteps, eval_freq, agent.config, tuple(params)),
            action_repeat=repeat,
            after=after,
        )


GAMES = tuple(
    f"{game}NoFrameskip-v4"
    for game in ("Alien", "Amidar", "BankHeist", "CrazyClimber", "Krull", "PrivateEye", "Qbert", "RoadRunner", "Seaquest")
)
TASKS = tuple(
    f"dm_control/{task}-v0" for task in ("cartpole-swingup", "finger-spin", "reacher-easy", "cheetah-run", "walker-walk")
)

RAINBOW = Agent("rainbow", "rainbow"), Agent("rainbow_seer", "rainbow_seer")
RAINBOW_HALF = (
    Agent("rainbow_half_resolution", "rainbow", "rainbow_half_resolution.yml"),
    Agent("rainbow_seer_half_resolution", "rainbow_seer", "rainbow_seer_half_resolution.yml"),
)
RAINBOW_SMALL = (
    Agent("rainbow_small_buffer", "rainbow", "rainbow_small_buffer.yml"),
    Agent("rainbow_seer_small_buffer", "rainbow_seer", "rainbow_seer_small_buffer.yml"),
)
CURL = Agent("curl", "curl_seer", "curl.yml"), Agent("curl_seer_paper", "curl_seer", "curl_seer_paper.yml")
CURL_HALF = (
    Agent("curl_half_resolution", "curl_seer", "curl_half_resolution.yml"),
    Agent("curl_seer_half_resolution", "curl_seer", "curl_seer_half_resolution.yml"),
)
CURL_SMALL = (
    Agent("curl_small_buffer", "curl_seer", "curl_small_buffer.yml"),
    Agent("curl_seer_small_buffer", "curl_seer", "curl_seer_small_buffer.yml"),
)
# Never frozen, the buffer must hold all images
NO_FREEZE = ("freeze_after:None", "buffer_size:{n_timesteps}")
SAC = Agent("sac", "sac_seer", None, NO_FREEZE), Agent("sac_seer", "sac_seer")
SAC_HALF = (
    Agent("sac_small_images", "sac_seer", "sac_seer_small_images.yml", NO_FREEZE),
    Agent("sac_seer_small_images", "sac_seer", "sac_seer_small_images.yml"),
)

AT_END = Point("end", "steps", math.inf)
AT_EQUAL_FLOPS = Point("equal FLOPs", "flops", None)
AT_45T = Point("45T FLOPs", "flops", 4.5e13)

TABLES = {
    # At half of the resolution no training comes to 45T: figure 9 has it
    "table1-left": Table("Rainbow at 45T FLOPs (SEER, table 1 left)", RAINBOW, GAMES, (AT_45T, AT_END)),
    "table1-right": Table(
        "Rainbow with 0.07 GB (SEER, table 1 right)", RAINBOW_SMALL, GAMES, (Point("500K steps, 0.07 GB", "steps", 500_000),)
    ),
    "figure2": Table("CURL against FLOPs (SEER, figure 2)", CURL, TASKS, (AT_EQUAL_FLOPS, AT_END), half_resolution=CURL_HALF),
    "figure3": Table("Rainbow against FLOPs (SEER, figure 3)", RAINBOW, GAMES, (AT_45T, AT_END)),
    "figure4": Table("Rainbow with 0.07 GB (SEER, figure 4)", (RAINBOW[0], *RAINBOW_SMALL), GAMES, (AT_END,)),
    "figure5": Table("CURL with 0.03 or 0.06 GB (SEER, figure 5)", (CURL[0], *CURL_SMALL), TASKS, (AT_END,)),
    # The texts do not say which tasks and games its four panels have
    "figure9-curl": Table(
        "CURL at half the resolution (SEER, figure 9)", (*CURL, *CURL_HALF), TASKS, (AT_EQUAL_FLOPS, AT_END)
    ),
    "figure9-rainbow": Table(
        "Rainbow at half the resolution (SEER, figure 9)", (*RAINBOW, *RAINBOW_HALF), GAMES, (AT_EQUAL_FLOPS, AT_END)
    ),
    "batches": Table(
        "CURL with larger batches (LeVER, section 5.4)",
        (
            Agent("curl_batch_128", "curl_seer", "curl_batch_128.yml"),
            Agent("curl_batch_256", "curl_seer", "curl_batch_256.yml"),
            CURL[1],  # its batch is 512
        ),
        ("dm_control/cheetah-run-v0",),
        (AT_EQUAL_FLOPS, AT_END),
    ),
    # The paper's agent is CURL; SAC has settings for all three tasks
    "transfer": Table(
        "SAC from scratch, and from an agent of walker-stand with its encoder frozen (SEER, section 5.4)",
        (SAC[0], Agent("sac_seer_transfer", "sac_seer", None, ("freeze_after:0",))),
        ("dm_control/walker-walk-v0", "dm_control/hopper-hop-v0"),
        (AT_EQUAL_FLOPS, AT_END),
        seeds=3,
        pretraining=(SAC[0], "dm_control/walker-stand-v0", 60_000),
    ),
    "atari100k": Table(
        "Atari-100k, the papers' nine games",
        RAINBOW,
        GAMES,
        (Point("100K steps", "steps", 100_000), AT_EQUAL_FLOPS),
        steps=100_000,
        half_resolution=RAINBOW_HALF,
    ),
    "dmc": Table(
        "DM Control at 100K and 500K frames",
        SAC,
        (*TASKS, "dm_control/ball_in_cup-catch-v0"),
        (Point("100K frames", "frames", 100_000), Point("500K frames", "frames", 500_000), AT_EQUAL_FLOPS),
        half_resolution=SAC_HALF,
    ),
}

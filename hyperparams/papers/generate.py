"""
Write the files of the papers' experiments: a base file with what the experiment changes.

    python hyperparams/papers/generate.py

RL Zoo reads one plain YAML file, so each experiment has its own. The bases are edited by hand, these files are not. Nor is
curl_seer.yml, which has the agents of sac_seer.yml.
SEER: Chen et al. 2021, https://arxiv.org/abs/2103.02886, tables, figures and T_f of its appendix.
LeVER: an earlier version of that paper, section 5.4.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

PAPERS = Path(__file__).parent
Block = dict[str, Any]

# Table 4 and figure 5: C and T_f with a small buffer
SMALL_BUFFER = {
    "dm_control/cartpole-swingup-v0": dict(buffer_size=1_000, freeze_after=10_000),
    "dm_control/finger-spin-v0": dict(buffer_size=1_000, freeze_after=50_000),
    "dm_control/reacher-easy-v0": dict(buffer_size=2_000, freeze_after=30_000),
    "dm_control/cheetah-run-v0": dict(buffer_size=1_000, freeze_after=80_000),
    "dm_control/walker-walk-v0": dict(buffer_size=2_000, freeze_after=80_000),
}
# Table 5 and figure 4. T_f of the other games is not given
SMALL_BUFFER_GAMES = {
    "atari": dict(buffer_size=10_000, freeze_after=50_000),
    "AlienNoFrameskip-v4": dict(buffer_size=10_000, freeze_after=100_000),
    "CrazyClimberNoFrameskip-v4": dict(buffer_size=10_000, freeze_after=100_000),
    "QbertNoFrameskip-v4": dict(buffer_size=10_000, freeze_after=100_000),
    "PrivateEyeNoFrameskip-v4": dict(buffer_size=10_000, freeze_after=150_000),
    "SeaquestNoFrameskip-v4": dict(buffer_size=10_000, freeze_after=150_000),
}


def never_frozen(env_id: str, block: Block) -> Block:
    """The buffer has an image for each training step."""
    return block | dict(freeze_after=None, buffer_size=block["n_timesteps"])


def small_buffer(env_id: str, block: Block) -> Block:
    return block | (SMALL_BUFFER | SMALL_BUFFER_GAMES)[env_id]


def small_images(env_id: str, block: Block) -> Block:
    """Section 6: half the pixels, "scaling crops appropriately"."""
    if "NoFrameskip" in env_id or env_id == "atari":
        return block | dict(env_wrapper=[{"stable_baselines3.common.atari_wrappers.AtariWrapper": dict(screen_size=42)}])
    repeat, _ = block["env_wrapper"]
    pixels = {"sb3_seer.envs.DMControlPixels": dict(height=50, width=50, camera_id=0)}
    return block | dict(env_wrapper=[repeat, pixels], augmentation_kwargs=dict(size=42))


def half_resolution(env_id: str, block: Block) -> Block:
    """The buffer holds all of the training: 7,500 / 1,600 = 4.6875 latents in the bytes of an image."""
    buffer_size = max(block["freeze_after"], 100 * math.ceil(block["n_timesteps"] / 468.75))
    return small_images(env_id, block) | dict(buffer_size=buffer_size)


def small_shifted_images(env_id: str, block: Block) -> Block:
    """50x50 pixels, and half the shift. The buffer holds all of the training, as above."""
    buffer_size = max(block["freeze_after"], 100 * math.ceil(block["n_timesteps"] / 468.75))
    repeat, pixels = block["env_wrapper"]
    pixels = {name: kwargs | dict(height=50, width=50) for name, kwargs in pixels.items()}
    return block | dict(env_wrapper=[repeat, pixels], augmentation_kwargs=dict(pad=2), buffer_size=buffer_size)


def small_sac(env_id: str, block: Block) -> Block:
    """As above. At this size cartpole has returns of one step, with which it was measured."""
    n_steps = 1 if "cartpole" in env_id else block["n_steps"]
    return small_shifted_images(env_id, block) | dict(n_steps=n_steps)


def batch_size(size: int) -> Callable[[str, Block], Block]:
    return lambda env_id, block: never_frozen(env_id, block) | dict(batch_size=size)


class Experiment(NamedTuple):
    """
    :param title: the first line of the file
    :param base: the file with the settings that stay
    :param change: (environment's id, its block in ``base``) -> its block
    :param env_ids: the blocks to write; by default all of ``base`` but its "default"
    """

    title: str
    base: str
    change: Callable[[str, Block], Block]
    env_ids: tuple[str, ...] = ()


CURL, SAC, RAINBOW = "papers/curl_seer_paper.yml", "papers/sac_seer_paper.yml", "rainbow_seer.yml"
DM_CONTROL = tuple(
    f"dm_control/{task}-v0"
    for task in ("cartpole-swingup", "finger-spin", "reacher-easy", "cheetah-run", "walker-walk", "ball_in_cup-catch")
)
CHEETAH = ("dm_control/cheetah-run-v0",)
GAMES = ("atari", "CrazyClimberNoFrameskip-v4", "PrivateEyeNoFrameskip-v4", "QbertNoFrameskip-v4")
EXPERIMENTS = {
    "../curl_seer": Experiment(
        "The agents of sac_seer.yml with CURL's contrastive loss until the freeze (Srinivas et al. 2020,\n"
        "# https://arxiv.org/abs/2004.04136). SEER's and CURL's own settings: papers/curl_seer_paper.yml, papers/curl.yml",
        "sac_seer.yml",
        lambda env_id, block: block,
        ("default", *DM_CONTROL),
    ),
    "curl": Experiment("CURL: the baseline of figure 2 and the upper bound of figure 5", CURL, never_frozen),
    "curl_batch_128": Experiment("CURL with a batch of 128: LeVER's section 5.4", CURL, batch_size(128), CHEETAH),
    "curl_batch_256": Experiment("CURL with a batch of 256: LeVER's section 5.4", CURL, batch_size(256), CHEETAH),
    "curl_half_resolution": Experiment(
        "CURL with half the resolution: figure 9",
        CURL,
        lambda env_id, block: never_frozen(env_id, small_images(env_id, block)),
    ),
    "curl_small_buffer": Experiment(
        "CURL with a small buffer: the baseline of figure 5",
        CURL,
        lambda env_id, block: small_buffer(env_id, block) | dict(freeze_after=None),
    ),
    "curl_seer_half_resolution": Experiment("CURL + SEER with half the resolution: figure 9", CURL, half_resolution),
    "curl_seer_small_buffer": Experiment("CURL + SEER with a small buffer: figure 5", CURL, small_buffer),
    "sac_seer_half_resolution": Experiment("SAC + SEER with half the resolution: figure 9", SAC, half_resolution),
    "sac_seer_small_images": Experiment("The agents of sac_seer.yml on 50x50 pixels", "sac_seer.yml", small_sac, DM_CONTROL),
    "td3_seer_small_images": Experiment(
        "DrQ-v2, the agents of td3_seer.yml, on 50x50 pixels", "td3_seer.yml", small_shifted_images, DM_CONTROL
    ),
    "sac_seer_small_buffer": Experiment("SAC + SEER with a small buffer: figure 5", SAC, small_buffer),
    "rainbow_half_resolution": Experiment("Rainbow with half the resolution: figure 9", "rainbow.yml", small_images),
    "rainbow_small_buffer": Experiment(
        "Rainbow with a small buffer: the baseline of figure 4",
        "rainbow.yml",
        lambda env_id, block: block | dict(buffer_size=10_000),
    ),
    "rainbow_seer_half_resolution": Experiment(
        "Rainbow + SEER with half the resolution: figure 9", RAINBOW, small_images, GAMES
    ),
    "rainbow_seer_small_buffer": Experiment(
        "Rainbow + SEER with a small buffer: figure 4", RAINBOW, small_buffer, tuple(SMALL_BUFFER_GAMES)
    ),
}


def text(name: str) -> str:
    """
    :param name: key of ``EXPERIMENTS``
    :return: its YAML file: "default" and the first block in full, of the others what differs from the first
    """
    title, base, change, env_ids = EXPERIMENTS[name]
    blocks = yaml.safe_load((PAPERS.parent / base).read_text())
    env_ids = env_ids or tuple(env_id for env_id in blocks if env_id != "default")
    changed = {env_id: change(env_id, blocks.get(env_id) or blocks["atari"]) for env_id in env_ids}
    lines = [f"# {title}", f"# Written by generate.py from {base}, which explains the settings. Not to be edited by hand", ""]
    default = changed.pop("default", None)
    if default is not None:
        lines += ["default:", *_indented(default), ""]
    (_, first), *others = changed.items()
    lines += [f"{next(iter(changed))}:{' &first' if others else ''}", *_indented(first), ""]
    for env_id, block in others:
        different = {key: value for key, value in block.items() if value != first.get(key)}
        lines += [f"{env_id}:", "  <<: *first", *_indented(different), ""]
    return "\n".join(lines[:-1]) + "\n"


def _indented(block: Block) -> list[str]:
    return [f"  {line}" for line in yaml.safe_dump(block, sort_keys=False, width=200).splitlines()] if block else []


if __name__ == "__main__":
    for name in EXPERIMENTS:
        (PAPERS / f"{name}.yml").write_text(text(name))

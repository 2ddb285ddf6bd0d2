"""
What ``python -m rl_zoo3.push_to_hub`` adds to the card of a SEER agent: T_f, K, the encoder, bytes, operations, the curve.
"""

import tempfile
import zipfile
from pathlib import Path
from typing import Any

from sb3_seer.common.seer import SEERMixin
from sb3_seer.plots import load_curves, plot

CURVE = "curve.png"


def describe(model: SEERMixin) -> str:
    """
    :param model: a trained agent with an encoder
    :return: a section of a model card, Markdown
    """
    plan, count = model.replay_buffer.plan(), getattr(model, "flops_count", None)
    networks, dim = model.policy.latent_shape
    frozen_at = [row.timesteps for row in count.rows if row.frozen] if count is not None else []
    if count is not None and count.rows and count.rows[0].frozen and count.rows[0].flops > 0:
        frozen_at = []  # before this learn(), which counts steps from 0
    rows = {
        "T_f (`freeze_after`)": repr(model.freeze_after) + (f": step {frozen_at[0]:,}" if frozen_at else ""),
        "encoder": f"`{model.policy.features_extractor_class.__name__}`, {'' if model.encoder_frozen else 'not '}frozen",
        "latents": f"{dim} numbers, {model.latent_dtype}, for {networks} network{'s' * (networks > 1)}",
        "K (`n_augmentations`)": f"{model.n_augmentations}, augmentation: {model.augmentation}",
        "replay buffer": f"{plan.image_transitions:,} transitions as images, {plan.latent_transitions:,} as latents, "
        f"in the same {plan.image_bytes / 1e6:,.1f} MB",
        "training": f"{model.num_timesteps:,} steps, {model._n_updates:,} gradient steps",
    }
    if count is not None:
        rows["operations"] = f"{count.flops:.3g} (a multiply-add is one, a backward pass two forward passes)"
    if not model.encoder_frozen:
        how = "The encoder was not frozen: the agent learned from stored images"
    elif model.freeze_after == 0:
        how = "The encoder was frozen from the first step: the agent learned from stored latents"
    else:
        how = "The encoder was trained until T_f and then frozen; from there on the agent learned from stored latents"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""
## SEER

{how}
([Chen et al. 2021](https://arxiv.org/abs/2103.02886)).

| | |
|---|---|
{table}
"""


def draw_curve(repository: Path, name: str) -> bool:
    """
    Draw the evaluations of the training, if there were any.

    :param repository: folder that will be uploaded, with RL Zoo's ``train_eval_metrics.zip``
    :param name: title of the curve
    :return: whether there is a ``curve.png`` now
    """
    metrics = repository / "train_eval_metrics.zip"
    if not metrics.is_file():
        return False
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(metrics) as archive:
        names = set(archive.namelist())
        if "evaluations.npz" not in names:
            return False
        run = Path(folder) / name / repository.name
        for file in names & {"evaluations.npz", "flops.csv"}:
            archive.extract(file, run)
        axes = ["steps", "flops"] if "flops.csv" in names else ["steps"]
        plot(load_curves([run]), axes).savefig(repository / CURVE, dpi=150)
    return True


def extend_card(repository: Path, model: Any) -> None:
    """
    Add a section on SEER to the model card that RL Zoo has written. The card of any other agent stays as it is.

    :param repository: folder that will be uploaded, with the card as its ``README.md``
    :param model: the agent
    """
    if not isinstance(model, SEERMixin) or not hasattr(model.policy, "latent_shape"):
        return
    card = repository / "README.md"
    curve = f"\n![Return of the evaluations]({CURVE})\n" if draw_curve(repository, type(model).__name__) else ""
    card.write_text(card.read_text(encoding="utf-8") + describe(model) + curve, encoding="utf-8")

"""The figures, and the numbers in them."""

from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from sb3_seer.analysis.measures import debiased_cka, spatial_attention, svcca
from sb3_seer.analysis.run import AnalysedRun, Episodes, feature_maps, latents, layer_samples, newest_frames
from sb3_seer.common.observations import map_parts
from sb3_seer.common.regression import held_out_r2
from sb3_seer.plots import make_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = list[tuple[str | float, ...]]  # the first one has the names of the columns


def plot_similarity(run: AnalysedRun, episodes: Episodes) -> tuple["Figure", Rows]:
    """
    SEER, figure 8 (b): how similar each layer is to itself at the next checkpoint.

    :param run: a run with two checkpoints or more
    :param episodes: what the networks see
    :return: the figure, and its numbers: step, next step, layer, debiased linear CKA, SVCCA
    :raises ValueError: if there is a single checkpoint
    """
    if len(run.steps) < 2:
        raise ValueError(f"{run.folder} must have two checkpoints or more, got one, of step {run.steps[0]}")
    rows: Rows = [("step", "next_step", "layer", "cka", "svcca")]
    scores: list[list[tuple[float, float]]] = []
    before: dict[str, np.ndarray] = {}
    for i, step in enumerate(tqdm(run.steps, desc="checkpoints", delay=2)):
        samples = layer_samples(run.load(step), episodes)
        if i > 0:
            scores.append(
                [(debiased_cka(before[name], samples[name]), svcca(before[name], samples[name])) for name in samples]
            )
            rows += [(run.steps[i - 1], step, name, *both) for name, both in zip(samples, scores[-1], strict=True)]
        before = samples
    figure = make_figure(4 + 0.8 * len(scores), 1.5 + 0.25 * len(before))
    panels = figure.subplots(1, 2, sharey=True)
    for panel, values, title in zip(panels, np.array(scores).T, ("debiased linear CKA", "SVCCA"), strict=True):
        image = panel.imshow(values, vmin=0, vmax=1, aspect="auto")
        panel.set_title(title, fontsize="medium")
        panel.set_yticks(range(len(before)), [name.replace("features_extractor.", "") for name in before], fontsize="small")
        panel.set_xticks(range(len(scores)), [f"{step:,}" for step in run.steps[1:]], rotation=90, fontsize="small")
    figure.supxlabel("step (compared with the checkpoint before)", fontsize="small")
    figure.colorbar(image, ax=panels, label="similarity")
    return figure, rows


def plot_attention(run: AnalysedRun, episodes: Episodes, n_rows: int = 4, layer: str | None = None) -> "Figure":
    """
    SEER, figure 8 (a): where the activations of a convolution are large, over a few observations.

    :param run: a run
    :param episodes: of which a few observations are shown
    :param n_rows: how many
    :param layer: name of a layer, None for the last convolution
    :return: the figure: at most six checkpoints from the first to the last. Colours go from the smallest to the largest
        value of each map
    :raises ValueError: if there is no such layer
    """
    steps = [run.steps[i] for i in np.unique(np.linspace(0, len(run.steps) - 1, 6).round().astype(int))]
    picks = np.linspace(0, len(episodes.actions) - 1, n_rows).astype(int)
    observations = map_parts(lambda part: part[picks], episodes.observations)
    models = [run.load(step) for step in steps]
    frames = newest_frames(models[0], observations)
    maps = [spatial_attention(feature_maps(model, observations, layer)) for model in tqdm(models, desc="checkpoints", delay=2)]
    figure = make_figure(1.5 * (len(steps) + 1), 1.6 * n_rows + 0.3)
    panels = figure.subplots(n_rows, len(steps) + 1, squeeze=False)
    for i, row in enumerate(panels):
        for panel in row:
            panel.imshow(frames[i], cmap="gray")
            panel.set_axis_off()
        for panel, of_step in zip(row[1:], maps, strict=True):
            extent = (-0.5, frames.shape[2] - 0.5, frames.shape[1] - 0.5, -0.5)
            panel.imshow(of_step[i], cmap="inferno", alpha=0.7, extent=extent, interpolation="bilinear")
    for panel, title in zip(panels[0], ("observation", *(f"step {step:,}" for step in steps)), strict=True):
        panel.set_title(title, fontsize="small")
    return figure


def plot_probe(run: AnalysedRun, episodes: Episodes, names: list[str] | None = None) -> tuple["Figure", Rows]:
    """
    How well quantities can be read from the latents by a linear map, on steps that it has not seen.

    :param run: a run
    :param episodes: with their quantities
    :param names: of the quantities, None for all
    :return: the figure, in which R2 below 0 is drawn as 0, and its numbers: step, quantity, R2
    :raises ValueError: if there is no such quantity, or none at all
    """
    names = names or list(episodes.quantities)
    unknown = [name for name in names if name not in episodes.quantities]
    if unknown or not names:
        raise ValueError(
            f"`quantities` must be among the numbers of `info` and of the state, as far as they change: "
            f"{', '.join(episodes.quantities) or 'there are none'}, got {', '.join(unknown) or 'none'}"
        )
    y = np.stack([episodes.quantities[name] for name in names], axis=1)
    rows: Rows = [("step", "quantity", "r2")]
    scores = []
    for step in tqdm(run.steps, desc="checkpoints", delay=2):
        scores.append(held_out_r2(latents(run.load(step), episodes.observations), y))
        rows += [(step, name, score) for name, score in zip(names, scores[-1].tolist(), strict=True)]
    figure = make_figure(6.5, 3.2)
    panel = figure.subplots()
    for name, values in zip(names, np.array(scores).T, strict=True):
        panel.plot(run.steps, np.maximum(values, 0), marker=".", label=name)
    panel.set_xlabel("step")
    panel.set_ylabel("held-out R2")
    panel.set_ylim(-0.02, 1.02)
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    return figure, rows

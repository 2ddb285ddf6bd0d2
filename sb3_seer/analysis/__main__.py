"""
What the encoder of a run of RL Zoo has learned, at each of its checkpoints (``--save-freq``), on fresh episodes.

    python -m sb3_seer.analysis similarity logs/sac_seer/dm_control-cartpole-swingup-v0_1 -o similarity.png
    python -m sb3_seer.analysis attention logs/sac_seer/dm_control-cartpole-swingup-v0_1 -o attention.png
    python -m sb3_seer.analysis probe logs/sac_seer/dm_control-cartpole-swingup-v0_1 -o probe.png

similarity: of each layer to itself at the next checkpoint (debiased linear CKA, SVCCA). attention: where the last convolution
has large activations. probe: how well a linear map reads the state, and numbers of ``info``, from the latents (held-out R2).
"""

import argparse
import contextlib
import sys
from collections.abc import Sequence

from sb3_seer.analysis.figures import Rows, plot_attention, plot_probe, plot_similarity
from sb3_seer.analysis.run import AnalysedRun


def main(arguments: Sequence[str] | None = None) -> None:
    """
    :param arguments: arguments of the command line, None for ``sys.argv``
    """
    parser = argparse.ArgumentParser(
        "python -m sb3_seer.analysis", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["similarity", "attention", "probe"])
    parser.add_argument("folder", help="log folder: logs/<algorithm>/<environment>_<number>")
    parser.add_argument("-o", "--output", help="where to draw: a .png, .pdf or .svg; <what>.png by default")
    parser.add_argument("-n", "--n-steps", type=int, default=1000, help="steps of fresh episodes; attention: 200")
    parser.add_argument("--seed", type=int, default=0, help="of the environment")
    parser.add_argument("--layer", help="attention: name of a layer, by default the last convolution")
    parser.add_argument("--quantities", nargs="+", help="probe: their names, by default all")
    args = parser.parse_args(arguments)
    if args.n_steps < 20:
        parser.error(f"`--n-steps` must be >= 20, got {args.n_steps}")
    for option, what in (("layer", "attention"), ("quantities", "probe")):
        if getattr(args, option) is not None and args.what != what:
            parser.error(f"`--{option}` is only for {what}, got it with {args.what}")
    rows: Rows = []
    try:
        with contextlib.redirect_stdout(sys.stderr):  # RL Zoo prints as it makes the environment
            run = AnalysedRun(args.folder)
            episodes = run.play(min(args.n_steps, 200) if args.what == "attention" else args.n_steps, args.seed)
            if args.what == "similarity":
                figure, rows = plot_similarity(run, episodes)
            elif args.what == "probe":
                figure, rows = plot_probe(run, episodes, args.quantities)
            else:
                figure = plot_attention(run, episodes, layer=args.layer)
            output = args.output or f"{args.what}.png"
            figure.savefig(output, dpi=200)
            print(f"Drawn in {output}")
    except (ImportError, ValueError, OSError) as error:
        parser.error(str(error))
    for row in rows:
        print(*(f"{value:.3f}" if isinstance(value, float) else value for value in row), sep=",")


if __name__ == "__main__":
    main()

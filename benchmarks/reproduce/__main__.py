"""
The papers' tables and figures, and two standard benchmarks: train what is missing, then write tables and figures.

    python -m benchmarks.reproduce atari100k --games Alien Qbert --seeds 3 --jobs 2
    python -m benchmarks.reproduce table1-left --dry-run
    python -m benchmarks.reproduce dmc --ray --address auto
    python -m benchmarks.reproduce dmc --sbatch | sbatch

The same command again goes on where it was stopped: finished rows are skipped, others go on from their last checkpoint.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.reproduce.manifest import TABLES
from benchmarks.reproduce.runner import run, run_row, sbatch


def make_parser() -> argparse.ArgumentParser:
    """:return: the parser of the command line"""
    tables = "\n".join(f"  {name:16} {table.title}" for name, table in TABLES.items())
    parser = argparse.ArgumentParser(
        "python -m benchmarks.reproduce",
        description=f"{__doc__}\ntables:\n{tables}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("table", choices=list(TABLES), metavar="TABLE")
    parser.add_argument("--games", nargs="+", help="only environments with one of these words in their ids")
    parser.add_argument("--seeds", type=int, help="number of seeds, the papers' if not given")
    parser.add_argument("--steps", type=int, help="of a shorter training (control: frames), with T_f scaled to it")
    parser.add_argument("--half-resolution", action="store_true", help="halve the height and the width of images")
    parser.add_argument("-f", "--folder", type=Path, default=Path("logs/reproduce"), help="where the rows are (%(default)s)")
    parser.add_argument("-o", "--output", type=Path, help="where the report is written (FOLDER/TABLE)")
    where = parser.add_argument_group("where it runs")
    where.add_argument("--jobs", type=int, help="processes at a time, of one thread each (1)")
    where.add_argument("--ray", action="store_true", help="as tasks of Ray, with --jobs CPUs of this machine")
    where.add_argument("--address", help="of a cluster of Ray, or auto")
    instead = parser.add_argument_group("instead of all that").add_mutually_exclusive_group()
    instead.add_argument("--dry-run", action="store_true", help="print the commands")
    instead.add_argument("--sbatch", action="store_true", help="print a script for SLURM")
    instead.add_argument("--row", type=int, help="train one row of the manifest, as a task of that script does")
    instead.add_argument("--report", action="store_true", help="write the report of what is finished")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """
    :param arguments: arguments of the command line, None for ``sys.argv``
    :return: 1 if a row failed, else 0
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = make_parser()
    args = parser.parse_args(arguments)
    table = TABLES[args.table]
    folder = args.folder.resolve()
    try:
        if args.address and not args.ray:
            raise ValueError("`--address` needs --ray")
        if args.jobs is not None and (args.jobs < 1 or args.address):
            raise ValueError(f"`--jobs` must be >= 1, and not be given with --address, got {args.jobs}")
        rows = table.rows(args.games, args.seeds, args.steps, args.half_resolution)
        if args.dry_run:
            print("\n".join(shlex.join(["python", *row.command(args.folder)[1:]]) for row in rows))
            return 0
        if args.sbatch:
            folder.mkdir(parents=True, exist_ok=True)  # SLURM writes there before a task runs
            print(sbatch(rows, folder, [argument for argument in arguments if argument != "--sbatch"]))
            return 0
        if args.row is not None:
            if not 0 <= args.row < len(rows):
                parser.error(f"`--row` must be from 0 to {len(rows) - 1}, got {args.row}")
            problem = run_row(rows[args.row], folder).problem
            if problem is not None:
                print(problem, file=sys.stderr)
            return int(problem is not None)
        failed = []
        if not args.report:
            options = dict(on_ray=True, address=args.address) if args.ray else {}
            failed = run(rows, folder, jobs=args.jobs or 1, **options)
        from benchmarks.reproduce.report import write_report  # its imports take seconds, which the others do without

        output = args.output or folder / args.table
        write_report(table.title, rows, table.points, folder, output)
    except (ImportError, ValueError, OSError) as error:
        parser.error(str(error))
    print(f"The report is in {output / 'report.md'}")
    for row, problem in failed:
        print(f"{row.name} failed: {problem}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())

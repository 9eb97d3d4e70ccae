"""The commands `python -m buffers demo` and `python -m buffers inspect DIRECTORY`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from buffers.utils import how_to_install

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        status = _demo(options) if options.command == "demo" else _inspect(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader of the pipe has gone (`| head`). Without this, the flush when Python exits would fail, too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m buffers", description="Experience replay that keeps episodes whole."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="record CartPole and Pendulum, sample batches, train a predictor")
    demo.add_argument("--seconds", type=float, default=15.0, help="how long to train (default 15)")
    demo.add_argument("--seed", type=int, default=0)
    inspect = commands.add_parser(
        "inspect",
        help="print what a directory of episodes, or of saves, holds",
        description="Print what a directory of episodes (see IndividualFileDataset), or of saves, holds. Nothing in it "
        "is changed, and another process may write to it meanwhile.",
    )
    inspect.add_argument("directory", metavar="DIRECTORY")
    inspect.add_argument(
        "--episode",
        type=int,
        metavar="N",
        help="print the fields of the episode with this id (the first number in the name of its file)",
    )
    inspect.add_argument(
        "--output",
        metavar="FILE",
        help="draw the episode, or the dataset if there is no --episode, into a .png, .pdf or .svg file elsewhere",
    )
    inspect.add_argument(
        "--verify",
        action="store_const",
        const="full",
        default="size",
        help="read each file and check all of its content; otherwise, only its size is checked",
    )
    return parser


def _demo(options: argparse.Namespace) -> int:
    try:
        from buffers.viewing.demo import demo
    except ImportError as error:
        print(f"The demo needs gymnasium and tqdm ({error}): {how_to_install('demo')}.", file=sys.stderr)
        return 1
    demo(options.seconds, options.seed)
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from buffers.viewing.inspection import InspectionError, inspect_directory

    try:
        inspect_directory(options.directory, options.episode, options.output, options.verify)
    except InspectionError as error:
        print(error, file=sys.stderr)
        return 1
    return 0

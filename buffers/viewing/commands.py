"""The commands `python -m buffers demo | inspect | import | export | upload | download`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from buffers.interop import FORMATS, Summary, export_episodes, import_episodes
from buffers.utils import how_to_install

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        status = _COMMANDS[options.command](options)
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
    inspect.add_argument(
        "--compression",
        action="store_true",
        help="try lz4 and zstd on a sample of what is stored, and print what they save and cost (extra `compress`)",
    )
    _add_transfers(commands)
    _add_copies(commands)
    return parser


def _add_transfers(commands: Any) -> None:
    importer = commands.add_parser(
        "import",
        help="bring a dataset of another format into a directory of episodes",
        description="Bring a dataset of another format into a new directory of episodes, which IndividualFileDataset "
        "opens. If it is killed, the same command goes on where it was.",
    )
    importer.add_argument("format", metavar="FORMAT", help=f"one of {', '.join(FORMATS)}")
    importer.add_argument("source", metavar="SOURCE", help="a file, a directory, or a name that the format knows")
    importer.add_argument("directory", metavar="DIRECTORY", help="what to make")
    exporter = commands.add_parser(
        "export",
        help="write a directory of episodes in another format",
        description="Write a directory of episodes in another format. The target appears when all of it is written.",
    )
    exporter.add_argument("format", metavar="FORMAT", help="one of hdf5, lerobot, minari, npz")
    exporter.add_argument("directory", metavar="DIRECTORY", help="of episodes")
    exporter.add_argument("target", metavar="TARGET", help="what to make")
    for command in (importer, exporter):
        command.add_argument("--fields", nargs="+", metavar="FIELD", help="only these; `obs` stands for all below it")
        command.add_argument("--limit", type=int, metavar="N", help="only the first N episodes")
        _add_option(
            command,
            "of the format's `read` or `write`, see docs/formats.md; `dtypes.reward=float32` stores another dtype",
        )


def _add_copies(commands: Any) -> None:
    uploader = commands.add_parser(
        "upload",
        help="copy a directory of episodes, or of saves, to a URL",
        description="Copy a directory of episodes, or of saves, to a folder of an object store. If it is killed, the "
        "URL holds what it held before, and the same command goes on.",
    )
    uploader.add_argument("source", metavar="DIRECTORY", help="of episodes, or of saves")
    uploader.add_argument("target", metavar="URL", help="s3://bucket/folder, for example")
    downloader = commands.add_parser(
        "download",
        help="copy episodes, or saves, from a URL into a directory",
        description="Copy episodes, or saves, from a folder of an object store into a directory. If it is killed, the "
        "same command goes on.",
    )
    downloader.add_argument("source", metavar="URL", help="s3://bucket/folder, for example")
    downloader.add_argument("target", metavar="DIRECTORY", help="what to make")
    for command in (uploader, downloader):
        _add_option(command, "of fsspec's storage options; `client_kwargs.region_name=eu-west-1` is one of a dict")
        command.add_argument("--timeout", type=float, default=10.0, help="seconds for a request (default 10)")


def _add_option(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help=what)


def _upload(options: argparse.Namespace) -> int:
    from buffers.dataset.transfer import upload

    return _copy(upload, options)


def _download(options: argparse.Namespace) -> int:
    from buffers.dataset.transfer import download

    return _copy(download, options)


def _copy(function: Callable[..., Any], options: argparse.Namespace) -> int:
    try:
        chosen = _options_of(options.option)
        copied = function(
            options.source, options.target, storage_options=chosen, timeout=options.timeout, progress=True
        )
        print(copied)
    except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _import(options: argparse.Namespace) -> int:
    try:
        return _transfer(import_episodes, options.format, options.source, options.directory, options)
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on where it stopped.", file=sys.stderr)
        return 130


def _export(options: argparse.Namespace) -> int:
    try:
        return _transfer(export_episodes, options.format, options.directory, options.target, options)
    except KeyboardInterrupt:
        print("\nStopped. Nothing was written; the same command begins anew.", file=sys.stderr)
        return 130


def _transfer(
    function: Callable[..., Summary], format: str, source: str, target: str, options: argparse.Namespace
) -> int:
    """Import or export; what is wrong with the source or the arguments is one line, without a traceback."""
    try:
        chosen = _options_of(options.option)
        print(function(format, source, target, fields=options.fields, limit=options.limit, progress=True, **chosen))
    except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
        has_commas = any("," in text and "[" not in text for text in options.option)
        hint = " Lists are written as JSON: --option 'NAME=[4, 5, 6]'." if has_commas else ""
        print(f"{error}{hint}", file=sys.stderr)
        return 1
    return 0


def _options_of(texts: Sequence[str]) -> dict[str, Any]:
    """`NAME=VALUE` as keyword arguments; a name with a dot is a key of a dict, true and false and numbers are such."""
    found: dict[str, Any] = {}
    for text in texts:
        name, is_given, value = text.partition("=")
        if not is_given:
            raise ValueError(f"--option takes NAME=VALUE, found {text!r:.60}.")
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        root, has_key, key = name.partition(".")
        if root in ("fields", "limit", "progress"):
            raise ValueError(f"`{root}` is no --option. Use --fields FIELD ..., or --limit N.")
        if has_key:
            found.setdefault(root, {})[key] = parsed
        else:
            found[root] = parsed
    return found


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
        inspect_directory(options.directory, options.episode, options.output, options.verify, options.compression)
    except InspectionError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


_COMMANDS = {
    "demo": _demo,
    "inspect": _inspect,
    "import": _import,
    "export": _export,
    "upload": _upload,
    "download": _download,
}

"""Finding the files of a dataset, and telling damage from other errors."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from buffers.disk import parse_json
from buffers.interop.base import FormatError, library

__all__ = ["DATASET_ID", "METADATA", "as_format_error", "data_directory", "read_json", "store_path"]

METADATA = "metadata.json"
#: As Minari's, which needs the version where it reads ids. There is no dot in it, so it leads nowhere else.
DATASET_ID = re.compile(r"(?:[-\w]+/)*[-\w]+-v\d+")

# Bounds of images are lists of a number for each byte.
_MOST_BYTES = 1 << 26
_WHOLE_COPY = "Get a whole copy of the dataset"
_OF_PARSERS = (ValueError, LookupError, TypeError, AttributeError, EOFError, NotImplementedError, RuntimeError, OSError)


@contextmanager
def as_format_error(path: str) -> Iterator[None]:
    """Turn what h5py, pyarrow and Pillow raise for damaged files into a FormatError. Errors of the disk stay."""
    try:
        yield
    except FormatError:
        raise
    except _OF_PARSERS as error:
        if isinstance(error, OSError) and error.errno not in (None, 0, errno.EINVAL):
            raise
        found = f"cannot be read ({type(error).__name__}: {str(error)[:200]})"
        raise FormatError(path, found, _WHOLE_COPY) from error


def read_json(path: str) -> dict[str, Any]:
    """A JSON object; FormatError if there is none."""
    try:
        with open(path, "rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except (FileNotFoundError, IsADirectoryError):
        raise FormatError(path, "is not there", _WHOLE_COPY) from None
    if len(content) > _MOST_BYTES:
        raise FormatError(path, f"has more than {_MOST_BYTES} bytes", "Look whether it is what it should be")
    with as_format_error(path):
        found = parse_json(content)
    if not isinstance(found, dict):
        raise FormatError(path, f"holds a {type(found).__name__}, expected an object", _WHOLE_COPY)
    return found


def store_path(dataset_id: str) -> str:
    """Where a dataset of the local store of Minari lies."""
    return str(library("minari.storage.datasets_root_dir", "minari").get_dataset_path(dataset_id))


def data_directory(path: str) -> str:
    """The directory with `metadata.json`, for a path or a dataset id."""
    place = path
    if not os.path.exists(path):
        if not DATASET_ID.fullmatch(path):
            raise FormatError(path, "is not there", "Give the directory that holds `data/`, or the id of a dataset")
        place = store_path(path)
        if not os.path.isdir(place):
            advice = f"Get it by `minari download {path}`, or set MINARI_DATASETS_PATH"
            raise FormatError(path, f"is no path, and {place} is not there", advice)
    for directory in (os.path.join(place, "data"), place):
        if os.path.isfile(os.path.join(directory, METADATA)):
            return directory
    found = f"has no data/{METADATA}, so it is no dataset of Minari 0.5 or later"
    raise FormatError(place, found, "Give the directory that holds `data/`")

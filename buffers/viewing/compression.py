"""`python -m buffers inspect --compression`: what lz4 and zstd make of a sample of what is stored."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from buffers.compression import CODECS, Codec, codecs_as, rows_in, whole_blocks
from buffers.conversion import as_array
from buffers.dataset.files.individual_file import IndividualFileDataset
from buffers.disk import as_damage, parse_fields
from buffers.fields import Fields
from buffers.saving import Save, SavedPiece, open_save
from buffers.table import Windows
from buffers.utils import aligned, format_bytes
from buffers.viewing.tracks import evenly_spaced

__all__ = ["try_on_files", "try_on_save"]

_TRIED = ("lz4", "zstd")
_LEAST_ROW_BYTES = 64
# Of the sample.
_MOST_EPISODES, _MOST_BYTES, _LEAST_ROWS = 20, 64_000_000, 16
# Times smaller.
_PAYS = 1.5
_NUM_ROUNDS = 3

# Rows of one episode, `name -> (n, *shape)`.
Episode = Mapping[str, np.ndarray]


def try_on_files(dataset: IndividualFileDataset) -> list[str]:
    """Lines that say how well the episodes of a directory, which has some, can be compressed.

    Raises:
        ImportError: The library of a codec is missing.
    """
    fields = dataset.fields
    assert fields is not None  # There is an episode, so there are fields.
    names, table = _worth_it(fields), dataset.table
    num, most = _size_of_sample(dataset.num_episodes, sum(fields[name].nbytes for name in names))
    samples: list[Windows] = []
    for position in evenly_spaced(np.arange(len(table)), num if names else 0).tolist():
        part = _middle(int(table.lengths[position]), most)
        samples.append(table.windows(np.array([position]), np.array([part.start]), part.stop - part.start))
    found: list[Episode] = []
    for windows in samples:
        rows, was_read = dataset.read(windows, names=names)
        if was_read is None:  # Else its file is damaged, or gone.
            found.append({name: as_array(name, tensor[0]) for name, tensor in rows.items()})
    return _describe(fields, found)


def try_on_save(path: str) -> list[str]:
    """The same for each store of the newest save in a directory whose headers are whole.

    Raises:
        ImportError: The library of a codec is missing, or of one that compressed what was saved.
        DamagedSaveError: None is whole, or rows are damaged.
    """
    with warnings.catch_warnings():
        # `inspect` without `--compression` says what is wrong with newer ones.
        warnings.simplefilter("ignore", UserWarning)
        save = open_save(path, Save.check)
    lines = [f"Save {save.number}"]
    for number in range(len(save.stores)):
        head, fields, episodes = _read_store(save, number)
        lines += ["", head, *(_describe(fields, episodes) if fields is not None else ())]
    return lines


def _read_store(save: Save, number: int) -> tuple[str, Fields | None, list[Episode]]:
    """A headline, the fields, and a sample of the episodes, if the save has some."""
    with as_damage():
        told = save.stores[number]
        head = f"{number}: {told['kind']}"
        if told["is_reader"]:
            return f"{head}, read only: inspect {told['directory']}", None, []
        if not told["num_episodes"]:
            return f"{head}, without episodes", None, []
        fields = parse_fields(told["fields"])
        return head, fields, [*_saved_episodes(save, number, fields)]


def _saved_episodes(save: Save, number: int, fields: Fields) -> Iterator[Episode]:
    told, names = save.stores[number], _worth_it(fields)
    num, most = _size_of_sample(told["num_episodes"], sum(fields[name].nbytes for name in names))
    for episode in _linked(save, number, fields, num) if told["is_linked"] else _packed(save, number, fields, num):
        part = _middle(len(next(iter(episode.values()))), most)
        yield {name: episode[name][part] for name in names}


def _linked(save: Save, number: int, fields: Fields, num: int) -> Iterator[Episode]:
    rows, folders = IndividualFileDataset.linked(save, number)
    for at in evenly_spaced(np.arange(len(rows)), num).tolist():
        suffix = save.stores[number]["suffix"]
        yield IndividualFileDataset.read_link(folders[at], rows[at].tolist(), suffix, fields)[0]


def _packed(save: Save, number: int, fields: Fields, num: int) -> Iterator[Episode]:
    codecs = codecs_as(save.stores[number].get("compress", {}), fields)
    pieces = save.pieces(number)
    places = np.array([(n, at) for n, piece in enumerate(pieces) for at in piece.is_live.nonzero()[0].tolist()])
    for n, at in evenly_spaced(places, num).tolist():
        yield _saved_episode(pieces[n], at, fields, codecs)


def _saved_episode(piece: SavedPiece, at: int, fields: Fields, codecs: Mapping[str, Codec]) -> Episode:
    length, end = int(piece.episodes[at, 1]), int(piece.episodes[: at + 1, 1].sum())
    # A ring with `half_precision` saves float32 as float16.
    found = {n: rows[end - length : end].astype(fields[n].numpy_dtype) for n, rows in piece.read().items()}
    regions = piece.read_regions(codecs)
    return found if regions is None else found | rows_in(regions.parts()[at], codecs, length)


# The sample.


def _worth_it(fields: Fields) -> list[str]:
    return [name for name, kind in fields.items() if kind.nbytes >= _LEAST_ROW_BYTES]


def _size_of_sample(num_episodes: int, row_bytes: int) -> tuple[int, int]:
    """How many episodes, and the most rows of each, for rows of so many bytes."""
    row_bytes = max(1, row_bytes)
    num = min(num_episodes, _MOST_EPISODES, max(1, _MOST_BYTES // (row_bytes * _LEAST_ROWS)))
    # Whole blocks: shorter ones would be found where the sample is cut.
    return num, max(_LEAST_ROWS, _MOST_BYTES // (num * row_bytes) // _LEAST_ROWS * _LEAST_ROWS)


def _middle(length: int, most: int) -> slice:
    first = max(0, (length - most) // 2)
    return slice(first, min(length, first + most))


# What codecs make of it.


class _Trial(NamedTuple):
    """What a codec makes of all rows of a field; times in seconds."""

    raw_bytes: int
    num_bytes: int
    encoding: float
    decoding: float
    copying: float

    @property
    def ratio(self) -> float:
        return self.raw_bytes / self.num_bytes


def _describe(fields: Fields, sample: Sequence[Episode]) -> list[str]:
    names = _worth_it(fields)
    if not names:
        return [f"No field has {_LEAST_ROW_BYTES} bytes a step: leave out `compress`."]
    num_rows = sum(len(episode[names[0]]) for episode in sample)
    if not num_rows:
        return ["No episode could be read."]
    rows = [("field", "codec", "bytes a step", "compressed", "times smaller", "us to compress", "decompress / copy")]
    best: dict[str, tuple[str, _Trial]] = {}
    for name in names:
        for codec in _TRIED:
            found = _try(CODECS[codec](name, fields[name]), [episode[name] for episode in sample])
            us, copies = 1e6 * found.encoding / num_rows, found.decoding / found.copying
            sizes = f"{fields[name].nbytes:,}", f"{found.num_bytes / num_rows:,.1f}", f"{found.ratio:.1f}"
            rows.append((name, codec, *sizes, f"{us:.1f}", f"{copies:.1f}"))
            if found.ratio >= _PAYS:
                best.setdefault(name, (codec, found))
    size = format_bytes(num_rows * sum(fields[name].nbytes for name in names))
    head = f"Tried on {num_rows:,} steps of {len(sample):,} episodes, {size}; times are of one thread"
    return [head, "", *aligned(rows), "", *_advice(fields, num_rows, best)]


def _advice(fields: Fields, num_rows: int, best: Mapping[str, tuple[str, _Trial]]) -> list[str]:
    if not best:
        return [f"No field becomes {_PAYS} times smaller: leave out `compress`."]
    compress = {name: codec for name, (codec, _) in best.items()}
    saved = sum(found.raw_bytes - found.num_bytes for _, found in best.values()) / num_rows
    left = fields.nbytes - saved
    return [
        f"compress={json.dumps(compress, ensure_ascii=False)}",
        f"makes {fields.nbytes:,} bytes a step {left:,.1f}, {fields.nbytes / left:.1f} times smaller, with all fields.",
    ]


def _try(codec: Codec, sample: Iterable[np.ndarray]) -> _Trial:
    found = np.zeros(5)
    for rows in sample:
        start = time.perf_counter()
        blocks = whole_blocks(codec, codec.field, {codec.field: rows})
        encoding, into = time.perf_counter() - start, np.empty_like(rows)
        decoding = _least_time(_decode, codec, blocks, into)
        copying = _least_time(np.copyto, into, rows)
        found += rows.nbytes, sum(map(len, blocks)), encoding, decoding, copying
    return _Trial(int(found[0]), int(found[1]), *found[2:].tolist())


def _decode(codec: Codec, blocks: Iterable[bytes], into: np.ndarray) -> None:
    num = codec.rows_per_block
    for number, block in enumerate(blocks):
        codec.decode(memoryview(block), into[number * num : (number + 1) * num].reshape(-1).view(np.uint8))


def _least_time(function: Callable[..., Any], *arguments: Any) -> float:
    times = []
    for _ in range(_NUM_ROUNDS):
        start = time.perf_counter()
        function(*arguments)
        times.append(time.perf_counter() - start)
    return min(times)

"""RldsReader: episodes of RLDS, aligned on arrival."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from buffers.dataset.episode_info import EpisodeInfo, info_text
from buffers.fields import nested
from buffers.interop.alignment import FINAL_MISSING, arrays_in, mapped, rows_on_arrival
from buffers.interop.base import Episode, FormatError, FormatReader, library
from buffers.interop.rlds.example import Feature, parse_example
from buffers.interop.rlds.schema import Leaf
from buffers.interop.rlds.source import Record, Source
from buffers.interop.rlds.values import values_of
from buffers.utils import one_of

__all__ = ["LAST_ACTIONS", "RldsReader"]

LAST_ACTIONS = ("dummy", "valid")
_FLAGS = ("is_first", "is_last", "is_terminal")
_TRANSITIONS = ("action", "reward", "discount")
_OWN = ("obs", "terminated", "truncated", FINAL_MISSING)
_INSTRUCTIONS = ("language_instruction", "natural_language_instruction")
_METADATA = "episode_metadata/"
_MOST_INFO = 4096


class RldsReader(FormatReader):
    """See `buffers.interop.rlds.read`."""

    format = "rlds"

    def __init__(
        self,
        path: str,
        split: str | None = None,
        last_action: str = "dummy",
        fields: Sequence[str] | None = None,
        dtypes: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(path, fields, dtypes)
        self._drops_last = one_of("last_action", last_action, LAST_ACTIONS) == "dummy"
        self._source = Source(path, split)
        self._leaves = {name: leaf for name, leaf in self._source.schema.steps.items() if leaf.kind != "text"}
        self._texts = {name: leaf for name, leaf in self._source.schema.steps.items() if leaf.kind == "text"}
        self._check_flags()
        if any(leaf.kind == "image" and self.wants(_field_of(leaf)) for leaf in self._leaves.values()):
            library("PIL.Image", "rlds")
        self.num_episodes, self.metadata = self._source.num_records, dict(self._source.metadata)
        self._shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._note_schema()

    def files(self) -> list[str]:
        """As `FormatReader.files`."""
        return self._source.files

    def read_from(self, number: int) -> Iterator[Episode]:
        """As `FormatReader.read_from`."""
        for record in self._source.records(number):
            with self._parsing(record, "the Example"):
                features = parse_example(record.content)
            yield self._episode(record, features)

    def _check_flags(self) -> None:
        for name in _FLAGS:
            leaf = self._leaves.get(name)
            if leaf is not None and (leaf.shape not in ((), (1,)) or leaf.kind != "numbers"):
                raise self.damaged(f"`{name}` has the shape {leaf.shape}, expected one flag for each step")
        if "is_last" not in self._leaves:
            raise self.damaged(
                f"steps have no `is_last`, but {sorted(self._source.schema.steps)!r:.200}",
                "RLDS needs it to tell a final observation from a step with an action",
            )

    def _note_schema(self) -> None:
        schema = self._source.schema
        for text in schema.unread:
            self.notes.add(text)
        for name in ("observation", "action", "reward"):
            if not any(leaf.path[0] == name for leaf in self._leaves.values()):
                self.notes.add(f"There is no `{name}` with numbers.")
        if "is_terminal" not in self._leaves:
            self.notes.add("There is no `is_terminal`, so that there is neither `terminated` nor `truncated`.")
        for leaf in self._leaves.values():
            if leaf.kind == "numbers" and leaf.dtype == np.float64:
                self.notes.add(f"`{leaf.key}` is float64, of which the files hold float32 only.")
        for name, leaf in [*self._leaves.items()]:
            if leaf.path[0] in _OWN or (leaf.path[0] in _FLAGS and name not in _FLAGS):
                self.notes.add(f"`{leaf.key}` has the name of a field with another meaning, and is not read.")
                del self._leaves[name]
        for leaf in schema.episode.values():
            if leaf.shape != ():
                self.notes.add(f"`{leaf.key}` is no number or text, and is left out of the info of episodes.")

    def _episode(self, record: Record, features: Mapping[str, Feature]) -> Episode:
        with self._parsing(record, "`steps/is_last`"):
            num_steps = len(_present(features, "steps/is_last").integers())
        if not num_steps:
            raise self._damaged(record, "has no steps")
        flags = {name: self._values(record, features, name, num_steps) for name in _FLAGS if name in self._leaves}
        self._check_order(record, flags)
        found = self._tree(record, features, num_steps)
        is_last = bool(flags["is_last"][-1])
        is_missing = not (is_last and self._drops_last)
        num_transitions = num_steps if is_missing else num_steps - 1
        steps = {name: found.pop(name) for name in _TRANSITIONS if name in found}
        if not is_missing:
            self._note_dropped(steps)
            steps = {name: mapped(value, lambda _, array: array[:num_transitions]) for name, value in steps.items()}
        steps |= self._ends(flags, num_transitions)
        observations = found.pop("observation", None)
        if is_missing:
            found = {name: mapped(value, _with_last_repeated) for name, value in found.items()}
        placeholder = np.zeros(num_steps) if observations is None else observations
        rows = rows_on_arrival(placeholder, steps, more=found, final_missing=is_missing)
        if observations is None:
            del rows["obs"]
        return Episode(rows, self._info(record, features, num_steps))

    def _ends(self, flags: Mapping[str, np.ndarray], num_transitions: int) -> dict[str, np.ndarray]:
        """RLDS: an episode whose last step is not terminal was truncated. One without a last step was cut off."""
        if "is_terminal" not in flags:
            return {}
        is_terminal, is_last = bool(flags["is_terminal"][-1]), bool(flags["is_last"][-1])
        if is_terminal and not num_transitions:
            self.notes.add("Episodes of one step, which have no transition, lose their `is_terminal`.")
        at_end = np.arange(num_transitions) == num_transitions - 1
        return {"terminated": at_end & is_terminal, "truncated": at_end & (is_last and not is_terminal)}

    def _check_order(self, record: Record, flags: Mapping[str, np.ndarray]) -> None:
        for name, values in flags.items():
            within = values[1:] if name == "is_first" else values[:-1]
            if within.any():
                step = int(np.flatnonzero(within)[0]) + (name == "is_first")
                text = f"`{name}` is set at step {step} of {len(values)}, within the episode"
                raise self._damaged(record, text, "Write one episode in each record")
        if "is_first" in flags and not flags["is_first"][0]:
            self.notes.add("Some episodes do not begin with `is_first`. They are taken for whole ones.")

    def _tree(self, record: Record, features: Mapping[str, Feature], num_steps: int) -> dict[str, Any]:
        """The wanted features of steps, nested."""
        wanted = [
            (name, leaf) for name, leaf in self._leaves.items() if name not in _FLAGS and self.wants(_field_of(leaf))
        ]
        return nested((leaf.path, self._values(record, features, name, num_steps)) for name, leaf in wanted)

    def _values(self, record: Record, features: Mapping[str, Feature], name: str, num_steps: int) -> np.ndarray:
        leaf = self._leaves[name]
        with self._parsing(record, f"`{leaf.key}`"):
            values = values_of(leaf, _present(features, leaf.key), num_steps)
        where, shape = self._shapes.setdefault(name, (self._where(record), values.shape[1:]))
        if values.shape[1:] != shape:
            raise self.damaged(
                f"`{leaf.key}` is {values.shape[1:]} in {self._where(record)} and {shape} in {where}",
                "Give all images of a feature one size, or leave it out by `fields`",
            )
        return values.reshape(num_steps) if name in _FLAGS else values

    def _note_dropped(self, steps: Mapping[str, Any]) -> None:
        for name, value in steps.items():
            if name != "discount" and any(np.any(array[-1]) for _, array in arrays_in(value)):
                self.notes.add(
                    f"`{name}` of last steps is not always zero, and is dropped: in RLDS it is invalid where `is_last` "
                    'is set. If it is valid in this dataset, read it with `last_action="valid"`.'
                )

    def _info(self, record: Record, features: Mapping[str, Feature], num_steps: int) -> EpisodeInfo:
        found: EpisodeInfo = {"split": record.split}
        for name, leaf in self._texts.items():
            texts = self._texts_of(record, features, leaf, num_steps)
            if len({*texts}) > 1:
                self.notes.add(f"`{leaf.key}` changes within some episodes, whose info does not have it.")
            elif texts:
                keys = ["task"] if leaf.path[-1] in _INSTRUCTIONS else []
                self._keep(found, [*keys, name, leaf.key], texts[0])
        for name, leaf in self._source.schema.episode.items():
            if leaf.shape != () or (leaf.is_optional and leaf.key not in features):
                continue
            if leaf.kind == "text":
                values: Sequence[Any] = self._texts_of(record, features, leaf, 1)
            else:
                with self._parsing(record, f"`{leaf.key}`"):
                    values = values_of(leaf, _present(features, leaf.key), 1).tolist()
            short = name.removeprefix(_METADATA)
            for value in values:
                self._keep(found, [short, _METADATA + short], value)
        return found

    def _texts_of(self, record: Record, features: Mapping[str, Feature], leaf: Leaf, count: int) -> list[str]:
        """So many texts; none if they are bytes of something else."""
        with self._parsing(record, f"`{leaf.key}`"):
            texts = _present(features, leaf.key).strings()
            if len(texts) != count:
                raise ValueError(f"{len(texts)} texts, expected {count}")
        try:
            return [bytes(text).decode() for text in texts]
        except UnicodeDecodeError:
            self.notes.add(f"`{leaf.key}` has bytes that are no text, and is left out of the info of episodes.")
            return []

    def _keep(self, found: EpisodeInfo, keys: Sequence[str], value: int | float | bool | str) -> None:
        """Under the first key that is free."""
        key = next((key for key in keys if key not in found), keys[-1])
        if isinstance(value, int) and value >= 2**63:
            value = str(value)  # Infos hold int64.
        if len(info_text({**found, key: value})) > _MOST_INFO:
            self.notes.add(f"`{key}` does not fit into the info of some episodes, which does not have it.")
        else:
            found[key] = value

    def _where(self, record: Record) -> str:
        return f"record {record.number} of {record.path}"

    def _damaged(self, record: Record, found: str, advice: str = "Get a whole copy of the file") -> FormatError:
        return FormatError(record.path, f"record {record.number}: {found}", advice)

    @contextmanager
    def _parsing(self, record: Record, what: str) -> Iterator[None]:
        """What parsers of numbers and images raise as damage of the file."""
        try:
            yield
        except (ImportError, MemoryError):
            raise
        except (ValueError, LookupError, OSError, SyntaxError, EOFError, zlib.error) as error:
            raise self._damaged(record, f"{what} cannot be read ({str(error)[:200]})") from error


def _present(features: Mapping[str, Feature], key: str) -> Feature:
    if key not in features:
        raise ValueError("it is not there")
    return features[key]


def _field_of(leaf: Leaf) -> str:
    return "/".join(["obs" if leaf.path[0] == "observation" else leaf.path[0], *leaf.path[1:]])


def _with_last_repeated(_: str, values: np.ndarray) -> np.ndarray:
    return np.concatenate([values, values[-1:]])

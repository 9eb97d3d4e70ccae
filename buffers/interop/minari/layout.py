"""What is written of a dataset of ours, and how Minari takes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from buffers.fields import TensorType
from buffers.interop.alignment import Transitions
from buffers.interop.base import FormatError, library
from buffers.interop.exporting import Exported, Exporter
from buffers.interop.minari.episode_metadata import metadata_of
from buffers.interop.minari.fitting import fitted, outside, values_for
from buffers.interop.minari.spaces import Space, expanded, parse_space

__all__ = ["Layout"]

# Minari 0.5.4 takes each record batch for an episode, and Arrow begins another one there.
_MOST_ARROW_ROWS = 1 << 15
_KNOWN = ("obs", "action", "reward", "terminated", "truncated", "is_first", "final_obs_missing", "infos")
_SPACES = {"obs": "observation_space", "action": "action_space"}


class Layout:
    """The spaces of a new dataset of Minari, and its episodes.

    Args:
        exporter: Of the dataset.
        data_format: A name of Minari's.
        stated: `field -> space` for "obs" and "action": a space of Gymnasium, JSON, or None.

    Raises:
        ValueError: Minari cannot hold the dataset.
    """

    def __init__(self, exporter: Exporter, data_format: str, stated: Mapping[str, Any]) -> None:
        self._exporter, self._data_format, self._stated = exporter, data_format, stated
        self._fields = exporter.fields.unflatten(exporter.fields)
        # Unlike what else belongs to transitions.
        exporter.keeps_first = [name for name in exporter.fields if name.startswith("infos/")]
        self._check_names()
        self._check_fields()
        self._check_lengths()
        infos = self._fields.get("infos")
        self._infos = self._held(infos, "infos") if isinstance(infos, Mapping) else {}
        self._spaces = {name: self._space_of(name) for name in _SPACES}

    def new_storage(self, data: str, metadata: Mapping[str, Any]) -> Any:
        """An empty minari.MinariStorage with this metadata."""
        deserialize = library("minari.serialization", "minari").deserialize_space
        storage = library("minari.dataset.minari_storage", "minari").MinariStorage.new(
            data,
            **{_SPACES[name]: deserialize(expanded(space)) for name, space in self._spaces.items()},
            data_format=self._data_format,
            jpeg_encoding=False,
        )
        storage.update_metadata({**metadata, "minari_version": library("minari", "minari").__version__})
        # Minari adds up the sizes of all files after each episode, which takes the square of their number.
        storage.get_size = lambda: 0.0
        return storage

    def buffers(self, metadata: list[dict[str, Any]]) -> Iterator[Any]:
        """A minari.EpisodeBuffer for each episode; what is kept besides is added to `metadata`."""
        notes = self._exporter.notes
        for exported in self._exporter:
            if exported.transitions.final_missing:
                notes.add("Minari cannot say that a final observation is missing: the one before is there again.")
            metadata.append(metadata_of(exported.info, exported.number, self._data_format != "hdf5", notes))
            yield self._buffer(exported)

    def _buffer(self, exported: Exported) -> Any:
        found = exported.transitions
        no_flags = np.zeros(found.num_steps, np.bool_)
        flags = {name: found.steps.get(name, no_flags).astype(np.bool_) for name in ("terminated", "truncated")}
        self._check_values(found)
        # Never an id of our own: Minari takes one that it has for more rows of that episode.
        return library("minari.data_collector.episode_buffer", "minari").EpisodeBuffer(
            id=None,
            observations=values_for(self._spaces["obs"], found.observations),
            actions=values_for(self._spaces["action"], found.steps["action"]),
            rewards=found.steps["reward"],
            terminations=flags["terminated"],
            truncations=flags["truncated"],
            infos=self._with_first(self._infos, found.first.get("infos"), found.steps.get("infos")),
        )

    def _with_first(self, names: Any, first: Any, steps: Any) -> Any:
        """T + 1 values of infos."""
        if isinstance(names, Mapping):
            return {key: self._with_first(names[key], first[key], steps[key]) for key in names}
        values = np.concatenate([first[None], steps])
        # Minari cannot read arrays of single numbers back from Arrow.
        return [*values] if values.ndim == 1 and self._data_format != "hdf5" else values

    def _check_values(self, found: Transitions) -> None:
        for name, tree in (("obs", found.observations), ("action", found.steps["action"])):
            if (field := outside(self._spaces[name], tree, name)) is not None:
                text = f"`{field}` has values that its Discrete space does not have"
                if self._stated[name] is not None:
                    raise ValueError(f"{text}. State another `{_SPACES[name]}`.")
                self._exporter.notes.add(f"{text}.")

    def _check_names(self) -> None:
        for path in self._exporter.fields.paths if self._data_format == "hdf5" else ():
            for key in path if path[0] in ("obs", "action", "infos") else ():
                if "\0" in key or "/" in key or key == ".":
                    raise ValueError(f"HDF5 cannot hold the name {key!r}, of `{'/'.join(path)}`. Rename the field.")

    def _check_fields(self) -> None:
        fields, notes = self._fields, self._exporter.notes
        if missing := [name for name in ("obs", "action", "reward") if name not in fields]:
            raise ValueError(f"Minari needs the fields {missing}, aligned on arrival. Found {list(fields)}.")
        for name in ("reward", "terminated", "truncated"):
            field = fields.get(name, TensorType(()))
            if isinstance(field, Mapping) or field.shape or field.numpy_dtype.kind not in "biuf":
                raise ValueError(f"Minari needs a number for each step in `{name}`, found {field}.")
        for name in ("terminated", "truncated"):
            if name not in fields:
                notes.add(f"There is no `{name}`, which Minari needs: it is False throughout.")
        for name in fields:
            if name not in _KNOWN or (name == "infos" and not isinstance(fields[name], Mapping)):
                notes.add(f"`{name}` is left out: Minari has no place for it. It has one for fields below `infos`.")
        if self._data_format != "hdf5" and (
            empty := [n for n, kind in self._exporter.fields.items() if 0 in kind.shape]
        ):
            raise ValueError(
                f"Arrow cannot hold rows without a value: {empty}. Leave them out by `fields`, or use hdf5."
            )

    def _check_lengths(self) -> None:
        lengths = self._exporter.dataset.table.lengths[: len(self._exporter.ids)]
        longest = int(lengths.max(initial=0))
        if self._data_format != "hdf5" and longest > _MOST_ARROW_ROWS:
            raise ValueError(
                f"An episode has {longest - 1:,} steps. Minari cuts those of more than {_MOST_ARROW_ROWS - 1:,} when "
                f"it reads {self._data_format}, and gives the pieces the ids of others. Use `data_format='hdf5'`."
            )

    def _held(self, infos: Any, path: str) -> dict[str, Any]:
        """The tree of infos, without those of dtypes that Minari has not."""
        held: dict[str, Any] = {}
        for key, field in infos.items():
            if isinstance(field, Mapping):
                if below := self._held(field, f"{path}/{key}"):
                    held[key] = below
            elif field.numpy_dtype.kind in "biuf":
                held[key] = field
            else:
                self._exporter.notes.add(f"`{path}/{key}` is {field}, which infos of Minari cannot be. It is left out.")
        return held

    def _space_of(self, name: str) -> Space:
        notes, stated = self._exporter.notes, self._stated[name]
        known: Space | None = None
        problems: list[str] = []
        if stated is not None:
            known = _stated_space(_SPACES[name], stated)
        elif _SPACES[name] in self._exporter.metadata:
            known = parse_space(self._exporter.path, _SPACES[name], self._exporter.metadata[_SPACES[name]])
        space = fitted(known, self._fields[name], name, problems)
        if stated is not None and problems:
            raise ValueError(f"`{_SPACES[name]}` does not fit: {problems[0]}.")
        for problem in problems:
            notes.add(f"{problem}: the space was changed.")
        if known is None:
            notes.add(f"The space of `{name}` was made of dtypes and shapes. State `{_SPACES[name]}` for another one.")
        return space


def _stated_space(name: str, stated: Any) -> Space:
    """A space of Gymnasium, or its JSON, as JSON."""
    try:
        # A Dict of Gymnasium is a Mapping, too.
        if not isinstance(stated, (str, dict)):
            stated = library("minari.serialization", "minari").serialize_space(stated)
        return parse_space(name, name, stated)
    except (NotImplementedError, FormatError) as error:
        why = error.found if isinstance(error, FormatError) else error
        raise ValueError(f"`{name}` must be a space that Minari can write, found {stated!r:.100} ({why}).") from None

"""Who is measured. Each lives in a module of this folder, which is imported in the contestant's own process only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["CONTESTANTS", "LIMITS", "VARIANTS", "Spec", "label_of"]


@dataclass(frozen=True)
class Spec:
    """A contestant.

    Attributes:
        label: In tables.
        target: "module:Class" below `benchmarks.peers`.
        parts: What it takes part in.
        environment: Of `benchmarks/requirements`; None for the one that the driver runs in.
        options: For the class.
        threads_at_start: Whether the number of threads is settled as its process starts, by the processors it may use.
        copies: How many times it stores a row, to see beforehand whether memory will do.
        is_before: Whether it is `buffers` as it was at an earlier commit.
    """

    label: str
    target: str
    parts: tuple[str, ...]
    environment: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    threads_at_start: bool = False
    copies: int = 1
    is_before: bool = False


_PRIORITIES = ("priorities", "priorities_growth")
_LIMITS = ("sampling", "transitions", "disk", "adding", "growth", "training", "padding", "offsets", *_PRIORITIES)
_ALL = ("sampling", "transitions", "adding", "growth", "training", "memory")
# A cache that each addition throws away is no other contestant where an addition comes before each batch.
_PLAIN = ("sampling", "growth", "training", "transitions", "adding", "memory")
_OURS = (*_ALL, "samplers", "wrapping")
_OUR_FILES = ("disk", "holding_up")

CONTESTANTS = {
    "copy": Spec("memory copy", "limits:MemoryCopy", _LIMITS),
    "gather": Spec("bare gather", "limits:BareGather", tuple(set(_LIMITS) - {"adding"})),
    "plain": Spec("plain copy", "plain_files:PlainFiles", ("saving",)),
    "ours": Spec("ours", "ours:Ring", (*_OURS, "padding", "offsets", "saving", *_PRIORITIES)),
    "ours_workers": Spec("ours, 2 workers", "ours:Ring", ("offsets",), None, {"num_workers": 2}),
    "before": Spec("before", "ours:Ring", _OURS, is_before=True),
    "ours_tensors": Spec("ours, given tensors", "ours:Ring", ("adding",), None, {"tensors": True}),
    "ours_disk": Spec("ours, files", "ours:Files", _OUR_FILES),
    "before_disk": Spec("before, files", "ours:Files", _OUR_FILES, is_before=True),
    "torchrl": Spec("TorchRL", "torchrl_buffer:TorchRL", (*_PLAIN, "saving"), "torchrl"),
    "torchrl_cached": Spec("TorchRL, cached", "torchrl_buffer:TorchRL", ("sampling",), "torchrl", {"cached": True}),
    "torchrl_memmap": Spec(
        "TorchRL, memory-mapped",
        "torchrl_buffer:TorchRL",
        ("disk", "saving"),
        "torchrl",
        {"memmap": True, "cached": True},
    ),
    "torchrl_priorities": Spec("TorchRL", "torchrl_buffer:PrioritizedTorchRL", ("priorities",), "torchrl"),
    "torchrl_priorities_cached": Spec(
        "TorchRL, cached", "torchrl_buffer:PrioritizedTorchRL", ("priorities",), "torchrl", {"cached": True}
    ),
    "cpprb_priorities": Spec("cpprb", "cpprb_buffer:PrioritizedCpprb", ("priorities",), "cpprb"),
    "sum_tree": Spec("sum tree by hand", "sum_tree:SumTree", ("priorities",)),
    "torch_save": Spec("torch.save", "plain_files:TorchSave", ("saving",)),
    "flashbax": Spec("flashbax", "flashbax_buffer:Flashbax", (*_ALL, "saving"), "flashbax", threads_at_start=True),
    "cpprb": Spec("cpprb", "cpprb_buffer:Cpprb", _ALL, "cpprb"),
    "sb3": Spec("SB3", "sb3_buffer:SB3", _ALL, "sb3", copies=2),
    "lerobot": Spec("LeRobot, 2 workers", "lerobot_dataset:LeRobot", ("offsets",), "lerobot", {"num_workers": 2}),
    "npy": Spec(".npy, memory-mapped", "files:NpyFiles", ("disk",)),
    "npz": Spec("npz by hand", "files:NpzFiles", ("disk",)),
    "npz_workers": Spec("npz by hand, 2 workers", "files:NpzFiles", ("disk",), None, {"num_workers": 2}),
}

#: Those that are no contestants, but what the memory and the disk allow.
LIMITS = ("copy", "gather", "plain")

#: Further columns of a contestant's, by suffix: what its process measures in turn over the same store.
VARIANTS = {
    "episodes": "UniformEpisodeSampler",
    "own": "a sampler of one's own",
    "long": "long episodes",
    "zero": "a tenth zeros",
    "edge": "a tenth the nearest row",
    "stacks": "stacks of 4",
}


def label_of(column: str) -> str:
    """The heading of a column: a contestant, or a contestant and a variant, as in "ours_long"."""
    if column in CONTESTANTS:
        return CONTESTANTS[column].label
    name, _, variant = column.rpartition("_")
    return f"{CONTESTANTS[name].label}, {VARIANTS[variant]}"

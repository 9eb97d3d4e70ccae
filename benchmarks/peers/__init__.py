"""Who is measured. Each lives in a module of this folder, which is imported in the contestant's own process only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["CONTESTANTS", "LIMITS", "Spec"]


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
    """

    label: str
    target: str
    parts: tuple[str, ...]
    environment: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    threads_at_start: bool = False
    copies: int = 1


_LIMITS = ("sampling", "transitions", "disk", "adding", "growth", "training")
_ALL = ("sampling", "transitions", "adding", "growth", "training", "memory")
# A cache that each addition throws away is no other contestant where an addition comes before each batch.
_PLAIN = ("sampling", "growth", "training", "transitions", "adding", "memory")

CONTESTANTS = {
    "copy": Spec("memory copy", "limits:MemoryCopy", _LIMITS),
    "gather": Spec("bare gather", "limits:BareGather", tuple(set(_LIMITS) - {"adding"})),
    "ours": Spec("ours", "ours:Ring", _ALL),
    "ours_tensors": Spec("ours, given tensors", "ours:Ring", ("adding",), None, {"tensors": True}),
    "ours_disk": Spec("ours, files", "ours:Files", ("disk",)),
    "torchrl": Spec("TorchRL", "torchrl_buffer:TorchRL", _PLAIN, "torchrl"),
    "torchrl_cached": Spec("TorchRL, cached", "torchrl_buffer:TorchRL", ("sampling",), "torchrl", {"cached": True}),
    "torchrl_memmap": Spec(
        "TorchRL, memory-mapped", "torchrl_buffer:TorchRL", ("disk",), "torchrl", {"memmap": True, "cached": True}
    ),
    "flashbax": Spec("flashbax", "flashbax_buffer:Flashbax", _ALL, "flashbax", threads_at_start=True),
    "cpprb": Spec("cpprb", "cpprb_buffer:Cpprb", _ALL, "cpprb"),
    "sb3": Spec("SB3", "sb3_buffer:SB3", _ALL, "sb3", copies=2),
    "npy": Spec(".npy, memory-mapped", "files:NpyFiles", ("disk",)),
    "npz": Spec("npz by hand", "files:NpzFiles", ("disk",)),
    "npz_workers": Spec("npz by hand, 2 workers", "files:NpzFiles", ("disk",), None, {"num_workers": 2}),
}

#: Those that are no contestants, but what the memory allows.
LIMITS = ("copy", "gather")

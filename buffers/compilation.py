"""torch.compile leaves this package alone: a call into it is a graph break, and its code is never compiled.

`torch.compiler.disable` would do that, but takes a second to import, and a microsecond of every call.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

__all__ = ["leave_uncompiled"]


def leave_uncompiled(package: str, *, but: str) -> None:
    """Mark the functions of all modules of a package that are loaded by now, except those of one module."""
    try:
        import torch._C._dynamo.eval_frame as frames

        skip: Any = getattr(frames, "skip_code", None)  # Until torch 2.6.
        how: tuple[Any, ...] = ()
        if skip is None:
            action = frames._FrameAction.SKIP
            skip, how = frames.set_code_exec_strategy, (frames._FrameExecStrategy(action, action),)
    except (ImportError, AttributeError):  # Names of torch's own, which may change.
        return
    modules = [module for name, module in sys.modules.items() if f"{name}.".startswith(f"{package}.") and name != but]
    for module in modules:
        for function in _functions(vars(module), module.__name__):
            function._torchdynamo_disable = True  # type: ignore[attr-defined]
            for code in _nested(function.__code__):
                skip(code, *how)


def _functions(names: dict[str, Any], module: str) -> Iterator[FunctionType]:
    """The functions that a module defines, also in its classes."""
    for value in list(names.values()):
        function = getattr(value, "fget", None) or getattr(value, "__func__", value)
        if getattr(function, "__module__", None) != module:
            continue
        if isinstance(function, type):
            yield from _functions(dict(vars(function)), module)
        elif isinstance(function, FunctionType):
            yield function


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)

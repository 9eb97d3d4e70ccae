"""The code keeps to its packages and stays small. Which package may import which, `lint-imports` checks."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
TREES = {path: ast.parse(path.read_text()) for path in sorted((ROOT / "buffers").rglob("*.py"))}
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
# Private attributes that other libraries define and offer no public name for.
EXCEPTIONS = {
    "_torchdynamo_disable": "torch.compile: what torch.compiler.disable sets",
    "_at_fork_reinit": "threading.RLock: a forked child must not wait for a thread that it does not have",
    "_asdict": "typing.NamedTuple: its values by their names",
    "_replace": "typing.NamedTuple: a copy with some values replaced",
    "_file_path": "Minari's HDF5Storage: the file that it writes, so that errors of the disk are seen",
    "_workers": "torch's DataLoader: which of its processes live",
}


def package_of(path: Path) -> str:
    """The folder of a module; a module of `buffers/` itself is a package of its own."""
    name = path.relative_to(ROOT / "buffers")
    return str(name.parent if len(name.parts) > 1 else name)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined_names(tree: ast.Module) -> Iterator[str]:
    """Names of functions, classes and variables, and attributes that methods give to `self` or `cls`."""
    for node in ast.walk(tree):
        if isinstance(node, FUNCTION | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and is_private(node.value):
            yield node.value  # In __slots__.


def is_self(node: ast.expr) -> bool:
    is_super = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"
    return is_super or (isinstance(node, ast.Name) and node.id in ("self", "cls"))


def private_uses(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of each `x._name`, where x is neither `self` nor another library's module, or `import _name`."""
    names = [name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
    libraries = {(name.asname or name.name).partition(".")[0] for name in names if not name.name.startswith("buffers")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and not is_self(node.value):
            if not (isinstance(node.value, ast.Name) and node.value.id in libraries):
                yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("buffers"):
            yield from ((node.lineno, name.name) for name in node.names if is_private(name.name))


def find_foreign_uses(trees: dict[Path, ast.Module]) -> list[str]:
    defined = defaultdict(set)
    for path, tree in trees.items():
        defined[package_of(path)].update(defined_names(tree))
    return [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path, tree in trees.items()
        for line, name in private_uses(tree)
        if name not in defined[package_of(path)] and name not in EXCEPTIONS
    ]


def test_no_private_attribute_is_used_across_packages() -> None:
    assert find_foreign_uses(TREES) == []


def test_uses_across_packages_would_be_found() -> None:
    code = "_own = 1; import os; os._exit(0); self._b; x._c; x._own; x.__dict__; y()._c = 1; from buffers.z import _a"
    trees = {ROOT / "buffers/one.py": ast.parse(code), ROOT / "buffers/two.py": ast.parse("self._c = 1")}
    assert sorted(use.split()[1] for use in find_foreign_uses(trees)) == ["_a", "_c", "_c"]


def test_no_file_has_over_400_lines() -> None:
    lengths = {str(path.relative_to(ROOT)): num_lines(path) for path in TREES}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_no_function_has_over_40_lines() -> None:
    """Lines of the body, behind the docstring."""
    lengths = {
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": body_length(node)
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, FUNCTION)
    }
    assert {name: length for name, length in lengths.items() if length > 40} == {}


def test_the_package_without_viewing_does_not_grow() -> None:
    # The plan is 8,000 when all is in it. Windows (padding, offsets, packing, passes, statistics) brought 1,450 more,
    # late fields, samplers that learn, the limiter and the info of episodes 3,950, saves 2,900, states that load with
    # other numbers of ranks 70, rings that processes attach to 388, object stores (ranges, the cache, the index,
    # uploads) 2,004, saves of sources that are only read 56, samplers that travel 14, and compressed fields (codecs,
    # memory, files, saves) 1,828: that takes leaving things out.
    apart = ("viewing", "interop", "remote")
    assert sum(num_lines(path) for path in TREES if package_of(path).partition("/")[0] not in apart) <= 20686


def num_lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def body_length(function: FUNCTION) -> int:
    statements = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (statements[-1].end_lineno or 0) - statements[0].lineno + 1 if statements else 0

"""Virtual environments of the peers, one each: `python -m benchmarks environments`.

Each is made from `benchmarks/requirements/<name>.txt` under `benchmarks/.venvs/<name>`. One that cannot be made is
reported and left out of all measurements. Earlier builds of `buffers` are put beside them, as they need none.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "requirements"
FOLDER = HERE / ".venvs"
NAMES = tuple(sorted(path.stem for path in REQUIREMENTS.glob("*.txt")))
# Written last: a folder without it is of an installation that was broken off.
_MARK = "complete"
# Peers that need another Python than the one that this runs in, and other versions than `constraints.txt` has.
_PYTHONS = {"lerobot": "python3.12"}


def python_of(environment: str | None) -> Path | None:
    """The interpreter of an environment; this one's for None; None where the environment is not there."""
    if environment is None:
        return Path(sys.executable)
    folder = FOLDER / environment
    return folder / "bin" / "python" if (folder / _MARK).exists() else None


def build_at(commit: str) -> Path:
    """A folder with the package `buffers` as it was at a commit, extracted from git when it is first asked for.

    Raises:
        OSError: There is no git.
        subprocess.CalledProcessError: The repository does not have the commit.
    """
    commit = _run("git", "-C", str(HERE.parent), "rev-parse", "--verify", f"{commit}^{{commit}}").strip()
    folder = FOLDER / f"before-{commit[:12]}"
    if not folder.exists():
        FOLDER.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER) as making:
            archive, extracted = Path(making) / "buffers.zip", Path(making) / "extracted"
            _run("git", "-C", str(HERE.parent), "archive", "-o", str(archive), commit, "buffers")
            shutil.unpack_archive(archive, extracted)
            extracted.rename(folder)
    return folder


def make(names: tuple[str, ...] = NAMES) -> dict[str, str]:
    """Make those that are not there, and those whose requirements have changed.

    Returns:
        By name, what is wrong with those that could not be made.
    """
    failed = {}
    for name in names:
        requirements = (REQUIREMENTS / f"{name}.txt").read_text()
        mark = FOLDER / name / _MARK
        if mark.exists() and mark.read_text() == requirements:
            print(f"{name}: is there")
            continue
        print(f"{name}: installing", flush=True)
        try:
            _install(name, requirements)
        except (subprocess.CalledProcessError, OSError) as error:
            failed[name] = str(getattr(error, "stderr", None) or error).strip().splitlines()[-1]
            print(f"{name}: left out, as it cannot be installed: {failed[name]}", flush=True)
        else:
            mark.write_text(requirements)
    return failed


def _install(name: str, requirements: str) -> None:
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    _run(_PYTHONS.get(name, sys.executable), "-m", "venv", str(folder))
    constraints = () if name in _PYTHONS else ("-c", str(HERE.parent / "constraints.txt"))
    pip = (str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *constraints)
    # torch alone and first: what comes after must do with this one, and cannot bring another.
    torch = [line for line in requirements.splitlines() if line.startswith("torch==")]
    if torch:
        _run(*pip, *torch)
    _run(*pip, "-r", str(REQUIREMENTS / f"{name}.txt"))
    if name == "torchrl":
        try:
            _run(str(folder / "bin" / "python"), str(HERE / "torchrl_extension.py"))
        except subprocess.CalledProcessError as error:
            why = (error.stderr.strip().splitlines() or [str(error)])[-1]
            print(f"{name}: without its prioritized samplers, as its extension cannot be built: {why}", flush=True)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout

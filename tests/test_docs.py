"""The code in README and docs runs, the site builds, and README has the two commands that CI runs."""

from __future__ import annotations

import importlib
import inspect
import multiprocessing
import os
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from buffers.interop import FORMATS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# ```python is run. ```python no-run needs a library that is not installed, and is only parsed.
BLOCK = re.compile(r"^```python( no-run)?\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = [
    pytest.param(match[2], match[1] is None, id=f"{page.name}-{number}")
    for page in PAGES
    for number, match in enumerate(BLOCK.finditer(page.read_text()))
]


# Forks of one process that has imported torch: a process that imports it takes seconds.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "buffers", "buffers.interop"])


@pytest.mark.parametrize(("code", "is_run"), BLOCKS)
def test_code_runs_as_printed(code: str, is_run: bool, tmp_path: Path) -> None:
    compile(code, "block", "exec")
    if is_run:
        # As a script, which processes that it starts can import.
        (tmp_path / "block.py").write_text(code)
        process = FORKS.Process(target=run_block, args=(tmp_path,))
        process.start()
        process.join(120)
        process.kill()
        process.join()
        assert process.exitcode == 0, (tmp_path / "stderr").read_text()


def run_block(folder: Path) -> None:
    """Run `block.py` of a folder as `python -W error block.py` in it does."""
    os.chdir(folder)
    os.dup2(os.open("stderr", os.O_WRONLY | os.O_CREAT), 2)
    multiprocessing.set_start_method(None, force=True)  # the default one, not how this process was started
    sys.argv, sys.path[0] = ["block.py"], str(folder)
    warnings.resetwarnings()
    warnings.simplefilter("error")
    # By its whole path: processes that the block spawns run it again from another folder.
    runpy.run_path(str(folder / "block.py"), run_name="__main__")


def test_a_block_that_fails_or_warns_would_be_found(tmp_path: Path) -> None:
    for number, code in enumerate(["import nothing", "import warnings; warnings.warn('x')", "raise SystemExit(3)"]):
        (tmp_path / str(number)).mkdir()
        with pytest.raises(AssertionError, match=["nothing", "UserWarning: x", "3 == 0"][number]):
            test_code_runs_as_printed(code, True, tmp_path / str(number))


def test_links_between_pages_are_not_broken() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_storage_in_the_docs_is_the_tested_one() -> None:
    shown = [code.values[0] for code in BLOCKS if code.id == "extending.md-0"]
    assert shown == [(ROOT / "tests" / "list_dataset.py").read_text()]


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    # A lost indentation turns an example into a quotation.
    for page in sorted((tmp_path / "api").glob("*.html")):
        assert "<blockquote>" not in page.read_text(), page.name


PUBLIC = """
buffers buffers.dataset buffers.dataset.fields buffers.dataset.individual_file buffers.dataset.info
buffers.dataset.verification buffers.evictor buffers.interop buffers.loading buffers.remote buffers.sampler
buffers.transforms buffers.utils buffers.visualization buffers.wrappers
"""


@pytest.mark.parametrize("name", PUBLIC.split())
def test_everything_public_is_in_the_reference(name: str) -> None:
    module = importlib.import_module(name)
    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    entries = {imported(entry) for entry in re.findall(r"^::: (\S+)", pages, re.MULTILINE)}
    if module not in entries:
        exported = {getattr(module, item) for item in module.__all__ if item != "__version__"}
        assert exported <= entries, f"{name}: {[item.__name__ for item in exported - entries]}"


def imported(path: str) -> object:
    """The module, class or function that has this path."""
    try:
        return importlib.import_module(path)
    except ImportError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("name", FORMATS)
def test_the_page_of_formats_draws_what_their_docstrings_draw(name: str) -> None:
    page = (ROOT / "docs" / "formats.md").read_text()
    assert f"\n## {name}\n" in page and f"[{name}](#{name})" in page
    doc = inspect.getdoc(importlib.import_module(f"buffers.interop.{name}").read) or ""
    drawn = [line for line in doc.partition("\nArgs:")[0].split("\n") if line.startswith("    ")]
    assert drawn and not [line for line in drawn if line not in page.split("\n")]


def test_the_readme_has_the_two_commands_of_ci() -> None:
    readme = (ROOT / "README.md").read_text()
    for end in ("-m buffers demo", "-m pytest -n 2"):
        assert len(re.findall(rf"^python3 -m venv .*{end}$", readme, re.MULTILINE)) == 1

"""The code in README and docs runs as printed, and the README's two commands are those that CI runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# ```python is run; ```python no-run names a library that is not at hand, and is only parsed.
BLOCK = re.compile(r"^```python( no-run)?\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = [
    pytest.param(match[2], match[1] is None, id=f"{page.name}-{number}")
    for page in PAGES
    for number, match in enumerate(BLOCK.finditer(page.read_text()))
]


@pytest.mark.parametrize(("code", "is_run"), BLOCKS)
def test_code_runs_as_printed(code: str, is_run: bool, tmp_path: Path) -> None:
    compile(code, "block", "exec")
    if is_run:
        command = [sys.executable, "-W", "error", "-c", code]
        found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert found.returncode == 0, found.stderr


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_has_the_two_commands_of_ci() -> None:
    readme = (ROOT / "README.md").read_text()
    for end in ("-m buffers demo", "-m pytest"):
        assert len(re.findall(rf"^python3 -m venv .*{end}$", readme, re.MULTILINE)) == 1

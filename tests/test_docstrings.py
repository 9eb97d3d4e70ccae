"""The examples in docstrings print what they show."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import buffers

MODULES = sorted(module.name for module in pkgutil.walk_packages(buffers.__path__, "buffers."))
EXAMPLES = [
    pytest.param(test, id=test.name)
    for name in MODULES
    if name != "buffers.__main__"
    for test in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name))
    if test.examples
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_print_what_they_show(
    example: doctest.DocTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.DocTestRunner(optionflags=doctest.FAIL_FAST).run(example, clear_globs=False)
    assert tried and not failed, capsys.readouterr().out

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# The same examples each time, and no opinion on how fast a busy machine is: a run that fails, fails for everyone.
settings.register_profile("tests", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")

# Together under a minute: what fits in the pause after an edit. `pytest -m quick` runs their tests.
QUICK = {
    "test_accumulator.py",
    "test_architecture.py",
    "test_fields.py",
    "test_list_dataset.py",
    "test_randomness.py",
    "test_recorder.py",
    "test_serialization.py",
    "test_table.py",
    "test_transforms.py",
    "test_utils.py",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name in QUICK:
            item.add_marker(pytest.mark.quick)


@pytest.fixture
def opened() -> Iterator[Callable[[bytes], io.FileIO]]:
    """A function from content to an open file that has it, in memory."""
    with os.fdopen(os.memfd_create("episode"), "w+b", buffering=0) as file:

        def write(content: bytes) -> io.FileIO:
            file.seek(0)
            file.truncate()
            file.write(content)
            file.seek(0)
            return file

        yield write


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """As many threads of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)

from __future__ import annotations

from pathlib import Path

import pytest

from buffers.dataset import IndividualFileDataset
from tests import tagged
from tests.objects.store_helpers import S3, reader, same_batches, tagged_episodes


@pytest.fixture(params=["s3", "file"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str, dict]:
    """A directory of episodes, a URL of the same, and options for it."""
    directory = tmp_path / "episodes"
    tagged_episodes(directory, [5, 9, 4, 7, 3], infos=True)
    if request.param == "file":
        return directory, f"file://{directory}", {}
    s3: S3 = request.getfixturevalue("s3")
    url = s3.new_url()
    s3.put(directory, url)
    return directory, url, {"storage_options": s3.options}


@pytest.mark.parametrize("is_cached", [True, False])
def test_a_url_holds_what_its_directory_holds(place: tuple[Path, str, dict], tmp_path: Path, is_cached: bool) -> None:
    directory, url, options = place
    local = IndividualFileDataset(directory=directory, mode="r")
    for _ in range(2):
        remote = reader(url, tmp_path / "cache" if is_cached else None, **options)
        assert remote.capacity == local.capacity == 10_000
        assert (remote.table.rows == local.table.rows).all() and remote.fields == local.fields
        for number in range(5):
            tagged.assert_same_episode(remote.get_episode(number), local.get_episode(number))
            assert remote.episode_info(number) == local.episode_info(number) == {"task": f"task {number}"}
        same_batches(remote, local)

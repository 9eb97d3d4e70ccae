"""The examples in docstrings give what they say."""

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
def test_examples_give_what_they_say(
    example: doctest.DocTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.DocTestRunner(optionflags=doctest.FAIL_FAST).run(example, clear_globs=False)
    assert tried and not failed, capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    [
        "buffers.recorder.Recorder",
        "buffers.replay_buffer.ReplayBuffer",
        "buffers.dataset.episode_source.EpisodeSource.get_loader",
        "buffers.dataset.episode_source.EpisodeSource.sequences",
        "buffers.dataset.fields.Fields",
        "buffers.dataset.individual_file.IndividualFileDataset",
        "buffers.dataset.info.EpisodeDatasetInfo",
        "buffers.dataset.mixture.MixtureDataset",
        "buffers.dataset.ring_buffer.RingBufferDataset",
        "buffers.sampler.uniform.UniformEpisodeSampler",
        "buffers.sampler.uniform.UniformSampler",
        "buffers.transforms.n_step_returns",
        "buffers.transforms.to_transitions",
        "buffers.utils.to_torch",
        "buffers.wrappers.RecordEpisodes",
        "buffers.wrappers.VectorRecordEpisodes",
    ],
)
def test_what_users_meet_first_has_an_example(name: str) -> None:
    assert name in [example.id for example in EXAMPLES]

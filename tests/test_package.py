"""What is installed: the wheel's contents, the surface, and what importing costs."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import buffers

ROOT = Path(__file__).parent.parent
NAMES = sorted(module.name for module in pkgutil.walk_packages(buffers.__path__, "buffers."))
MODULES = [name for name in NAMES if name != "buffers.__main__"]  # It is a command.


def run(code: str, cwd: Path = ROOT) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=cwd).stdout


def test_the_wheel_holds_every_module_and_py_typed(tmp_path: Path) -> None:
    # From a copy, so that nothing that an earlier build left in the tree gets in.
    archive = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    files = archive.stdout.split() if archive.returncode == 0 else []
    if not files:
        pytest.skip("not a git checkout")
    source = tmp_path / "source"
    for name in files:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "buffers").rglob("*.py")} | {"buffers/py.typed"}
    assert {name for name in held if name.startswith("buffers/")} == expected
    assert not any(name.startswith(("tests", "benchmarks", "docs")) for name in held)
    # The wheel is what works, not only the checkout.
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    code = f"import sys; sys.path.insert(0, {str(installed)!r}); import buffers; print(buffers.__file__)"
    assert run(code, tmp_path).strip() == str(installed / "buffers" / "__init__.py")


@pytest.mark.parametrize("name", ["buffers", *MODULES])
def test_all_names_exist_and_are_sorted(name: str) -> None:
    module = importlib.import_module(name)
    exported = getattr(module, "__all__", None)
    if exported is not None:
        assert list(exported) == sorted(exported)
        assert all(hasattr(module, item) for item in exported)


PROMISED = {
    "buffers": "ReplayBuffer Recorder Evictor FIFOEvictor SamplesPerInsert",
    "buffers.dataset": "EpisodeDataset IndividualFileDataset MixtureDataset RingBufferDataset",
    "buffers.dataset.fields": "Fields TensorType Scalar Vector ColorImage PaddedPointcloud",
    "buffers.dataset.individual_file": "EpisodeSerializationStrategy NumpyCompressedSerialization TorchSerialization",
    "buffers.dataset.info": "EpisodeDatasetInfo",
    "buffers.dataset.verification": "VerificationMode",
    "buffers.remote": "RemoteLoader RemoteWriter ShardLostError Shards start_shards",
    "buffers.sampler": "UniformSampler UniformEpisodeSampler",
    "buffers.utils": "to_torch",
    "buffers.visualization": "MatplotlibVisualizer plot_dataset",
}


@pytest.mark.parametrize("module", PROMISED)
def test_documented_import_paths_keep_working(module: str) -> None:
    found = importlib.import_module(module)
    assert [name for name in PROMISED[module].split() if not hasattr(found, name)] == []


def test_every_module_can_be_imported_first() -> None:
    # Whichever module is the first, Python imports `buffers` itself before it, and with it most others.
    code = f"""
import os, sys, buffers
for name in {MODULES}:
    if name not in sys.modules and os.fork() == 0:
        __import__(name)
        os._exit(0)
    assert name in sys.modules or os.wait()[1] == 0, name
"""
    run(code)


def test_importing_and_drawing_change_no_global_state() -> None:
    code = """
import io, sys, random, signal, multiprocessing, threading
import numpy, torch
def state():
    # Asking matplotlib for its backend would choose one.
    settings = sys.modules["matplotlib"].rcParams if "matplotlib" in sys.modules else {}
    return ({key: dict.__getitem__(settings, key) for key in settings.keys()},
            random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist(),
            multiprocessing.get_start_method(allow_none=True), torch.get_num_threads(), threading.active_count(),
            [signal.getsignal(number) for number in signal.valid_signals()])
before = state()
import buffers, buffers.dataset, buffers.loading, buffers.sampler
assert state() == before
assert not [name for name in sys.modules if name.split(".")[0] in ("matplotlib", "gymnasium")]
assert "torch._dynamo" not in sys.modules, "that takes a second"
import matplotlib
before = state()
from buffers.visualization import MatplotlibVisualizer
dataset = buffers.dataset.RingBufferDataset(100)
dataset.add_episode({"x": torch.zeros(9), "image": torch.zeros(9, 4, 5, 3), "reward": torch.zeros(9)})
visualizer = MatplotlibVisualizer(dataset)
visualizer.visualize(next(iter(dataset.get_loader(2, 5)))).savefig(io.BytesIO())
visualizer.plot_dataset().savefig(io.BytesIO())
assert state() == before
print("matplotlib.pyplot" in sys.modules, before[0]["backend"].__class__.__name__)
"""
    assert run(code).split() == ["False", "object"], "no backend is chosen"


@pytest.mark.parametrize(
    ("missing", "extra", "code"),
    [
        ("gymnasium", "extras", "buffers.Recorder; import buffers.wrappers"),
        ("gymnasium", "demo", "from buffers.viewing.commands import main; sys.exit(main(['demo']))"),
        ("matplotlib", "extras", "import buffers.viewing.scenes; import buffers.visualization"),
        ("ray", "ray", "from buffers.remote import start_shards; start_shards(1, None)"),
    ],
)
def test_what_is_not_installed_is_named_with_its_extra(missing: str, extra: str, code: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; import buffers; {code}"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stdout) == (1, "")
    assert f"needs {missing}" in found.stderr and f"pip install 'episode-buffers[{extra}]'" in found.stderr

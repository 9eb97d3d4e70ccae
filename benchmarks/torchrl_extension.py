"""Builds TorchRL's C++ extension for the torch that is installed, run by the interpreter of its environment.

The one in its wheel fits a single version of torch, without which there are no prioritized samplers. The wheel brings
the sources, too. It needs a C++ compiler, and takes a minute.
"""

import importlib.util
import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

from torch.utils.cpp_extension import load

# Where ninja is.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
spec = importlib.util.find_spec("torchrl")
assert spec is not None and spec.origin is not None
package = Path(spec.origin).parent
with tempfile.TemporaryDirectory() as folder:
    load(
        "_torchrl",
        [str(package / "csrc" / name) for name in ("pybind.cpp", "utils.cpp")],
        extra_cflags=["-O3", "-DNDEBUG"],
        build_directory=folder,
        is_python_module=False,
    )
    shutil.copy(Path(folder) / "_torchrl.so", package / f"_torchrl{sysconfig.get_config_var('EXT_SUFFIX')}")

"""Other formats, in and out. Each format is a module here, `buffers.interop.minari` for example.

`read(path)` yields episodes one at a time, `write(dataset, path)` writes them where the format can be written, and
`open(path)` reads them where they lie. `import_episodes` and `export_episodes` do so for directories of episodes.
"""

from buffers.interop.base import Episode, FormatError, FormatReader
from buffers.interop.exporting import export_episodes
from buffers.interop.formats import FORMATS
from buffers.interop.importing import import_episodes
from buffers.interop.in_place import InPlaceDataset
from buffers.interop.origin import Summary

__all__ = [
    "Episode",
    "FORMATS",
    "FormatError",
    "FormatReader",
    "InPlaceDataset",
    "Summary",
    "export_episodes",
    "import_episodes",
]

"""Which episodes live, and the windows over them: no payload."""

from buffers.table.cumulation import Cumulation, Int64Array
from buffers.table.cut import CONTINUES, GOES_ON, context_of, continuing
from buffers.table.episode_table import EpisodeTable, TableRow
from buffers.table.selection import Selection, Split
from buffers.table.split_table import EMPTY_PART, SplitTable
from buffers.table.windows import Windows, joined

__all__ = [
    "CONTINUES",
    "Cumulation",
    "EMPTY_PART",
    "EpisodeTable",
    "GOES_ON",
    "Int64Array",
    "Selection",
    "Split",
    "SplitTable",
    "TableRow",
    "Windows",
    "context_of",
    "continuing",
    "joined",
]

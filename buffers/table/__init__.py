"""Which episodes live, and the windows over them: no payload."""

from buffers.table.cumulation import Cumulation, Int64Array
from buffers.table.cut import CONTINUES, GOES_ON, context_of, continuing
from buffers.table.episode_table import DrawContext, EpisodeTable, TableRow
from buffers.table.part_table import EMPTY_PART, PartTable
from buffers.table.selection import NO, UNKNOWN, YES, Selection, Split
from buffers.table.windows import Windows, joined

__all__ = [
    "CONTINUES",
    "Cumulation",
    "DrawContext",
    "EMPTY_PART",
    "EpisodeTable",
    "GOES_ON",
    "Int64Array",
    "NO",
    "PartTable",
    "Selection",
    "Split",
    "TableRow",
    "UNKNOWN",
    "Windows",
    "YES",
    "context_of",
    "continuing",
    "joined",
]

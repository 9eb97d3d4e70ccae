"""Which episodes live, and the windows over them: no payload."""

from buffers.table.cumulation import Cumulation, Int64Array
from buffers.table.cut import Cut
from buffers.table.episode_table import EpisodeTable
from buffers.table.windows import Windows

__all__ = ["Cumulation", "Cut", "EpisodeTable", "Int64Array", "Windows"]

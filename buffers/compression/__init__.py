"""Compression: rows of chosen fields in blocks of consecutive rows, each compressed alone."""

from buffers.compression.blocks import CompressedEpisode, decoded_rows, num_blocks, whole_blocks
from buffers.compression.choice import Compress, checked_choice, choice_as, chosen_codecs, described_choice
from buffers.compression.codecs import CODECS, Codec, DamagedBlockError, codec_as, codecs_as, described
from buffers.compression.decoding import Fetched, Run, decode_runs, runs_of
from buffers.compression.early import EarlyBlocks
from buffers.compression.room import MOST_BYTES, BlockRoom, EpisodeTooLargeError, blocks_in, rows_in

__all__ = [
    "BlockRoom",
    "CODECS",
    "Codec",
    "Compress",
    "CompressedEpisode",
    "DamagedBlockError",
    "EarlyBlocks",
    "EpisodeTooLargeError",
    "Fetched",
    "MOST_BYTES",
    "Run",
    "blocks_in",
    "checked_choice",
    "choice_as",
    "chosen_codecs",
    "codec_as",
    "codecs_as",
    "decode_runs",
    "decoded_rows",
    "described",
    "described_choice",
    "num_blocks",
    "rows_in",
    "runs_of",
    "whole_blocks",
]

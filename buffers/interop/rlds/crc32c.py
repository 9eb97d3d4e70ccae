"""CRC-32C, of which TFRecord files have one for each record. numpy alone computes it at the speed of a disk."""

from __future__ import annotations

from functools import cache

import numpy as np

__all__ = ["masked_crc32c"]

_POLYNOMIAL = 0x82F63B78  # Castagnoli's, with the bits reversed.
_MASK_DELTA = 0xA282EAD8
_LONGEST_LANE = 512


def masked_crc32c(data: bytes | memoryview) -> int:
    """The checksum as TFRecord files have it: rotated by 15 bits, plus a constant."""
    crc = _crc32c(np.frombuffer(data, np.uint8))
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF


def _crc32c(data: np.ndarray) -> int:
    """The data is split into lanes of equal length, whose checksums are computed side by side and then joined.

    The register after data is linear in the register before it and in the data. So leading zeros do not change a
    register of 0, starting with all bits set equals inverting the first four bytes, and the register of two lanes is
    that of the first, moved over as many zeros as the second has bytes, xor that of the second.
    """
    length = 1
    while length < _LONGEST_LANE and length * length < len(data):
        length *= 2
    num_lanes = max(-(-max(len(data), 4) // length), 1)
    padded = np.zeros(num_lanes * length, np.uint8)
    start = len(padded) - len(data)
    padded[start:] = data
    if len(data) < 4:
        return _of_few(data)
    padded[start : start + 4] ^= 0xFF
    registers = np.zeros(num_lanes, np.uint32)
    for column in np.ascontiguousarray(padded.reshape(num_lanes, length).T):
        registers = _TABLE[(registers ^ column) & 0xFF] ^ (registers >> 8)
    while len(registers) > 1:
        if len(registers) % 2:
            registers = np.concatenate([np.zeros(1, np.uint32), registers])
        registers = _moved(registers[0::2], _over_zeros(length)) ^ registers[1::2]
        length *= 2
    return int(registers[0]) ^ 0xFFFFFFFF


def _of_few(data: np.ndarray) -> int:
    register = 0xFFFFFFFF
    for byte in data.tolist():
        register = int(_TABLE[(register ^ byte) & 0xFF]) ^ register >> 8
    return register ^ 0xFFFFFFFF


def _table() -> np.ndarray:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ np.uint32(_POLYNOMIAL), table >> 1)
    return table


@cache
def _over_zeros(length: int) -> np.ndarray:
    """What each byte of a register, the lowest first, adds after so many zeros, a power of two; (4, 256)."""
    if length > 1:
        half = _over_zeros(length // 2)
        return _moved(half, half)
    registers = np.arange(256, dtype=np.uint32) << np.arange(0, 32, 8, dtype=np.uint32)[:, None]
    return _TABLE[registers & 0xFF] ^ registers >> 8


def _moved(registers: np.ndarray, zeros: np.ndarray) -> np.ndarray:
    low, high = zeros[0][registers & 0xFF] ^ zeros[1][registers >> 8 & 0xFF], registers >> 16
    return low ^ zeros[2][high & 0xFF] ^ zeros[3][high >> 8]


_TABLE = _table()

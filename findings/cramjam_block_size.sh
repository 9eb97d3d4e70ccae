#!/usr/bin/env bash
# cramjam 2.14.0: lz4.decompress_block_into for a block that was written with store_size=False.
#
# One would guess: a block without its size is decompressed into a buffer of the right length, or refused. Nearly all
# are decompressed: 30,000 blocks of random runs of bytes came back right.
#
# What happens: without `output_len`, the first four bytes of the block are taken for its size where they could be one
# and what follows them could be a block. Then that is decompressed: it returns a wrong number of bytes, writes as many
# wrong ones, leaves the rest of the buffer as it was, and raises nothing. The docstring of decompress_block says that
# the size is expected there unless `output_len` is given; that of decompress_block_into does not name `output_len`.
# Also, `mode`, `acceleration` and `compression` of compress_block are accepted, which the docstring says are mostly
# those of python-lz4, and change nothing. A mode that does not exist is no error, either.
#
# Why it hurts: a store that knows the sizes of its rows, and so saves 4 bytes a block, rarely decompresses a block to
# what the buffer held before: rows of another episode. A test with a few blocks passes. And whoever compares the high
# compression of LZ4 with the default finds that there is no difference.
# What helps: `output_len=len(out)`, and to compare what it returns with that. For high compression, python-lz4.
#
# Seen, for the bytes 1 0 0 160, a hundred times, in a buffer of 255s:
#   without output_len    10 bytes [4, 0, 255, 117, 80, 160, 1, 0, 0, 160], then 390 untouched
#   with output_len      400 bytes, all right
# and the bytes that compress_block, and python-lz4 4.4.4, make of 100,000 random digits from 0 to 3:
#   cramjam     default 56887 high_compression 56887 fast 56887 no_such_mode 56887
#   python-lz4  default 56887 high_compression 39470 fast 65832

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet cramjam==2.14.0 lz4==4.4.4 numpy==2.4.6
cat > "$dir/see.py" <<'PY'
import cramjam
import lz4.block
import numpy as np

data = bytes([1, 0, 0, 160]) * 100
block = bytes(cramjam.lz4.compress_block(data, store_size=False))
assert lz4.block.decompress(block, uncompressed_size=len(data)) == data  # It is a block of LZ4.

out = np.full(len(data), 255, np.uint8)
num = cramjam.lz4.decompress_block_into(block, out)
print(f"without output_len   {num:3} bytes {out[:num].tolist()}, then {(out[num:] == 255).sum()} untouched")
assert num == 10 and (out[num:] == 255).all()

num = cramjam.lz4.decompress_block_into(block, out, output_len=len(out))
assert num == 400 and out.tobytes() == data
print(f"with output_len      {num:3} bytes, all right")

digits = np.random.default_rng(0).integers(0, 4, 100_000, np.uint8).tobytes()
MODES = {
    "default": {},
    "high_compression": {"mode": "high_compression", "compression": 12},
    "fast": {"mode": "fast", "acceleration": 64},
    "no_such_mode": {"mode": "no_such_mode"},
}
sizes = [len(cramjam.lz4.compress_block(digits, store_size=True, **options)) for options in MODES.values()]
theirs = [len(lz4.block.compress(digits, **options)) for options in list(MODES.values())[:3]]
print("cramjam    ", *(f"{name} {size}" for name, size in zip(MODES, sizes)))
print("python-lz4 ", *(f"{name} {size}" for name, size in zip(MODES, theirs)))
assert len({*sizes}) == 1 and len({*theirs}) == 3
PY
"$dir/venv/bin/python" "$dir/see.py" 2>"$dir/log" || { cat "$dir/log"; exit 1; }

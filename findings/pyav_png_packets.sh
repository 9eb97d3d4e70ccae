#!/usr/bin/env bash
# PyAV 18.1.0: PNG images that are decoded one after the other by one codec context.
#
# One would guess: a PNG is whole, so `context.decode(Packet(png))` gives its pixels, whatever was decoded before. It is
# several times as fast as opening each image with `av.open`, and twice as fast as Pillow.
#
# What happens: only the first image is right. From then on, the pixels of the image before are added to each, modulo 256,
# and that sum is added to the next. Nothing is raised or said.
#
# Why it hurts: frames that are stored as PNG, to have them without loss, come back as noise that looks like motion blur
# where scenes change slowly. A test that decodes one image passes.
# What helps: `packet.is_keyframe = True`, which packets that a demuxer reads have; or a new context for each image.
#
# Seen, for images that are all 10, all 20, all 30:
#   one context          10 30 60
#   packet.is_keyframe   10 20 30
#   a context each       10 20 30

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet av==18.1.0 numpy==2.4.6 pillow==12.3.0
cat > "$dir/see.py" <<'PY'
from io import BytesIO

import av
import numpy as np
from PIL import Image

VALUES = (10, 20, 30)


def png(value):
    """The file of an image that has one value everywhere."""
    content = BytesIO()
    Image.fromarray(np.full((2, 2, 3), value, np.uint8)).save(content, "PNG")
    return content.getvalue()


def see(is_keyframe, is_shared):
    """What the images are decoded to."""
    found, shared = [], av.CodecContext.create("png", "r")
    for value in VALUES:
        packet = av.Packet(png(value))
        if is_keyframe:
            packet.is_keyframe = True
        context = shared if is_shared else av.CodecContext.create("png", "r")
        (frame,) = context.decode(packet)
        (one_value,) = np.unique(frame.to_ndarray()).tolist()
        found.append(one_value)
    return found


found = {"one context": see(False, True), "packet.is_keyframe": see(True, True), "a context each": see(False, False)}
for name, values in found.items():
    print(f"{name:20}", *values)
assert [*found.values()] == [[10, 30, 60], [10, 20, 30], [10, 20, 30]]
PY
"$dir/venv/bin/python" "$dir/see.py" 2>"$dir/log" || { cat "$dir/log"; exit 1; }

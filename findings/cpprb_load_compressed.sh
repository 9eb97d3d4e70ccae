#!/usr/bin/env bash
# cpprb 11.0.0: load_transitions into a buffer with next_of or stack_compress.
#
# One would guess: a buffer of the same kind loads the transitions that were saved, at least with safe=True, the
# default.
#
# What happens: such a buffer stores each frame once and learns from on_episode_end where episodes end. With safe=True,
# the file has whole transitions but not the ends, and load_transitions adds them as one long episode. The next
# observation of an episode's last step becomes the first observation of another episode, and stacks of frames near the
# end take frames of that other episode.
#
# Why it hurts: a truncated episode bootstraps from a state that never followed. With stack_compress, observations
# themselves are wrong: those of the last steps of each episode, one step fewer than a stack has frames.
# What helps: save_transitions(path, safe=False), which saves the ends too. Its docstring warns of future
# incompatibility.
#
# Seen, for three episodes of 4 steps, each truncated (frames are numbered, a stack is its newest frame last):
#   next_of         safe=True   next observations of the last steps: saved [4, 14, 24] loaded [10, 20, 24]
#   next_of         safe=False  next observations of the last steps: saved [4, 14, 24] loaded [4, 14, 24]
#   stack_compress  safe=True   4 of 12 stacks are wrong, such as step 2 with frames [0, 1, 2]: [0, 1, 10]
#   stack_compress  safe=False  0 of 12 stacks are wrong

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet cpprb==11.0.0 numpy==2.4.6
cat > "$dir/see.py" <<'PY'
import cpprb
import numpy as np


def trip(make, steps, safe):
    """The transitions of a buffer, and those of another that loaded its file."""
    saved, loaded = make(), make()
    for episode in steps:
        for step in episode:
            saved.add(**step)
        saved.on_episode_end()
    saved.save_transitions("file.npz", safe=safe)
    loaded.load_transitions("file.npz")
    return saved.get_all_transitions(), loaded.get_all_transitions()


# Episodes 0, 1, 2 have frames 0 to 4, 10 to 14 and 20 to 24.
starts = (0, 10, 20)
plain = [[{"obs": s + t, "next_obs": s + t + 1} for t in range(4)] for s in starts]
frames = [[max(0, t - 2), max(0, t - 1), t] for t in range(4)]
stacked = [[{"step": s + t, "obs": np.array([frames[t]]) + s} for t in range(4)] for s in starts]


def with_next():
    return cpprb.ReplayBuffer(100, {"obs": {}}, next_of="obs")


def with_stacks():
    return cpprb.ReplayBuffer(100, {"obs": {"shape": (1, 3)}, "step": {}}, stack_compress="obs")


for safe in (True, False):
    found = [batch["next_obs"].ravel()[3::4].astype(int).tolist() for batch in trip(with_next, plain, safe)]
    print(f"next_of         safe={safe!s:5}  next observations of the last steps: saved {found[0]} loaded {found[1]}")
    assert found == [[4, 14, 24], [10, 20, 24] if safe else [4, 14, 24]]
for safe in (True, False):
    saved, loaded = trip(with_stacks, stacked, safe)
    wrong = np.flatnonzero((saved["obs"] != loaded["obs"]).any((1, 2)))
    example = ""
    if len(wrong):
        right, other = (batch["obs"][wrong[0]].ravel().astype(int).tolist() for batch in (saved, loaded))
        example = f", such as step {int(saved['step'][wrong[0]].item())} with frames {right}: {other}"
    print(f"stack_compress  safe={safe!s:5}  {len(wrong)} of 12 stacks are wrong{example}")
    assert (len(wrong) > 0) == safe
PY
cd "$dir"
"$dir/venv/bin/python" see.py

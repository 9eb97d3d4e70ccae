#!/usr/bin/env bash
# flashbax 0.1.3: set_priorities after an add, in a prioritised trajectory buffer that is full.
#
# One would guess: rows that were added since a batch was sampled make its indices stale, and priorities of items that
# are no longer there are dropped. At worst, a new item gets an old one's priority.
#
# What happens: an item that spans the place where rows are written next has priority zero, so that it is never drawn.
# set_priorities gives it one. From then on sequences are drawn that begin with the newest rows and go on with the
# oldest, until the next add moves on. Nothing marks them.
#
# Why it hurts: an actor that adds while the learner computes, or a batch that is sampled one step ahead, is enough. The
# network is trained on transitions that never happened. Their errors are large, so they are drawn again and again.
# What helps: set the priorities of a batch before anything else is added.
#
# Seen:
#   sample, set_priorities, add: 0 of 9600 sequences have a gap
#   sample, add, set_priorities: 208 of 9600 sequences have a gap, such as [1259, 1196, 1197, 1198]

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet flashbax==0.1.3 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat > "$dir/see.py" <<'PY'
import flashbax
import jax
import jax.numpy as jnp
import numpy as np


def sequences(is_set_first):
    """Fill a buffer with numbered rows, then sample, add and set priorities 300 times; return what is drawn last."""
    buffer = flashbax.make_prioritised_trajectory_buffer(
        add_batch_size=1,
        sample_batch_size=32,
        sample_sequence_length=4,
        period=1,
        min_length_time_axis=4,
        max_length_time_axis=64,
        device="cpu",
    )
    add, sample, set_priorities = jax.jit(buffer.add), jax.jit(buffer.sample), jax.jit(buffer.set_priorities)
    state = buffer.init({"row": jnp.zeros((), jnp.int32)})
    state = add(state, {"row": jnp.arange(64)[None]})
    drawn = []
    for step in range(300):
        batch = sample(state, jax.random.PRNGKey(2 * step))
        rows = {"row": jnp.arange(64 + 4 * step, 68 + 4 * step)[None]}
        if is_set_first:
            state = add(set_priorities(state, batch.indices, jnp.full(32, 0.5)), rows)
        else:
            state = set_priorities(add(state, rows), batch.indices, jnp.full(32, 0.5))
        drawn.append(np.asarray(sample(state, jax.random.PRNGKey(2 * step + 1)).experience["row"]))
    return np.concatenate(drawn)


for name, is_set_first in (("sample, set_priorities, add", True), ("sample, add, set_priorities", False)):
    rows = sequences(is_set_first)
    gaps = rows[(np.diff(rows, axis=1) != 1).any(1)]
    example = f", such as {gaps[-1].tolist()}" if len(gaps) else ""
    print(f"{name}: {len(gaps)} of {len(rows)} sequences have a gap{example}")
    assert len(gaps) == 0 if is_set_first else len(gaps) > 50
    # The newest of 64 rows is followed by the oldest.
    assert all(np.diff(gap).min() == -63 for gap in gaps)
PY
cd "$dir"
JAX_PLATFORMS=cpu "$dir/venv/bin/python" see.py

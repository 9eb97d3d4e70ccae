#!/usr/bin/env bash
# flashbax 0.1.3: Vault.write in a run that was resumed with its buffer state.
#
# One would guess: "Write any new data from the fbx buffer state to the vault", as the docstring says. A vault that is
# opened again continues after the rows that it has.
#
# What happens: the Vault object remembers how far the buffer has been written, the vault on disk does not. After it is
# opened again, the first write takes the slots from 0 to the buffer's current index. Rows that the vault has are
# written again. If the buffer has wrapped around since, new rows in its last slots are left out. There is no warning.
#
# Why it hurts: the vault is a dataset for offline learning. After a restart it holds part of the run twice or lacks
# part of it, and sequences across the seam never happened.
# What helps: name the slots in the first write after opening: vault.write(state, source_interval=(start, stop)).
#
# Seen, a buffer of 10 rows; some rows, a restart with the same state, and some more rows:
#   6 rows and 2 more              [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 6, 7]
#   8 rows and 4 more              [0, 1, 2, 3, 4, 5, 6, 7, 10, 11]
#   6 rows and 2 more, by interval [0, 1, 2, 3, 4, 5, 6, 7]
#   8 rows and 4 more, no restart  [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet "flashbax[vault]==0.1.3" jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat > "$dir/see.py" <<'PY'
import contextlib
import pickle
import tempfile

import flashbax
import jax
import jax.numpy as jnp
from flashbax.vault import Vault

buffer = flashbax.make_trajectory_buffer(
    add_batch_size=1,
    sample_batch_size=1,
    sample_sequence_length=2,
    period=1,
    min_length_time_axis=2,
    max_length_time_axis=10,
)


def add(state, start, stop):
    return buffer.add(state, {"row": jnp.arange(start, stop)[None]})


def rows_of_vault(num_before, num_after, is_restarted=True, interval=(0, 0)):
    """The vault's rows after these were added, a restart, and those."""
    state = buffer.init({"row": jnp.zeros((), jnp.int32)})
    with tempfile.TemporaryDirectory() as path, contextlib.redirect_stdout(None):
        vault = Vault("run", experience_structure=state.experience, rel_dir=path, vault_uid="one")
        state = add(state, 0, num_before)
        vault.write(state)
        if is_restarted:
            state = jax.tree.map(jnp.asarray, pickle.loads(pickle.dumps(jax.device_get(state))))
            vault = Vault("run", rel_dir=path, vault_uid="one")
        state = add(state, num_before, num_before + num_after)
        vault.write(state, source_interval=interval)
        return vault.read().experience["row"][0].tolist()


seen = {
    "6 rows and 2 more": rows_of_vault(6, 2),
    "8 rows and 4 more": rows_of_vault(8, 4),
    "6 rows and 2 more, by interval": rows_of_vault(6, 2, interval=(6, 8)),
    "8 rows and 4 more, no restart": rows_of_vault(8, 4, is_restarted=False),
}
for name, rows in seen.items():
    print(f"{name:30} {rows}")
assert seen["6 rows and 2 more"] == [*range(6), *range(8)]
assert seen["8 rows and 4 more"] == [*range(8), 10, 11]
assert seen["6 rows and 2 more, by interval"] == list(range(8))
assert seen["8 rows and 4 more, no restart"] == list(range(12))
PY
cd "$dir"
JAX_PLATFORMS=cpu "$dir/venv/bin/python" see.py

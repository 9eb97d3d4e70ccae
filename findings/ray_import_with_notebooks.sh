#!/usr/bin/env bash
# Ray 2.60.0 in an environment that has notebooks: jsonschema 4.26.0 with its extra "format-nongpl", as jupyter-events
# requires it.
#
# One would guess: what else is installed does not change how long a process of Ray takes to start.
#
# What happens: `import ray` imports jsonschema, in the driver, the agents and every worker. That imports
# rfc3987_syntax, if it is there, which builds a parser of its grammar as it is imported: seconds of one core. With
# 4.24.0 and the same extra, nothing of the kind is imported.
#
# Why it hurts: each actor, and each shard that comes back after a kill, starts that much later; on a machine with few
# cores the processes that start at once hold each other up, and `ray.init` may give up waiting for its agents.
# What helps: an environment for Ray without notebooks, or jsonschema 4.24.0.
#
# Seen, on two cores:
#   jsonschema 4.24.0: import ray took 0.5 s, with a grammar: False
#   jsonschema 4.26.0: import ray took 2.9 s, with a grammar: True

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet ray==2.60.0
cat > "$dir/see.py" <<'PY'
import sys
import time
from importlib.metadata import version

begin = time.perf_counter()
import ray  # noqa: E402, F401

seconds = time.perf_counter() - begin
is_built = "rfc3987_syntax" in sys.modules and "lark" in sys.modules
print(f"jsonschema {version('jsonschema')}: import ray took {seconds:.1f} s, with a grammar: {is_built}")
assert "jsonschema" in sys.modules and is_built == (sys.argv[1] == "True")
PY
for found in 4.24.0:False 4.26.0:True; do
  "$dir/venv/bin/pip" install --quiet "jsonschema[format-nongpl]==${found%:*}" rfc3987-syntax==1.1.0
  # The first import writes bytecode.
  "$dir/venv/bin/python" -c "import ray"
  "$dir/venv/bin/python" "$dir/see.py" "${found#*:}"
done

"""`python -m buffers demo | inspect | import | export | upload | download`, each with `--help`."""

import sys

from buffers.viewing.commands import main

if __name__ == "__main__":
    sys.exit(main())

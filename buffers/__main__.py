"""`python -m buffers demo` and `python -m buffers inspect DIRECTORY`."""

import sys

from buffers.viewing.commands import main

if __name__ == "__main__":
    sys.exit(main())

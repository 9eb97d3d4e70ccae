"""`python -m buffers demo | inspect DIRECTORY | import FORMAT SOURCE DIRECTORY | export FORMAT DIRECTORY TARGET`."""

import sys

from buffers.viewing.commands import main

if __name__ == "__main__":
    sys.exit(main())

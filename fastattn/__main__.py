"""python -m fastattn: the same as the command `fastattn`."""

import sys

from .cli import main

sys.exit(main())

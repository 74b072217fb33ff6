"""``python -m diffkern``: the command line."""

import sys

from diffkern.cli import main

sys.exit(main())

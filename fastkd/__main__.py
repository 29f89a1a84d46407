"""``python -m fastkd`` is ``fastkd``."""

import sys

from fastkd.cli import main

sys.exit(main())

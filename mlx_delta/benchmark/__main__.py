"""``python -m mlx_delta.benchmark``."""

import sys

from .command import main

sys.exit(main())

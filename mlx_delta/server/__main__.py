"""``python -m mlx_delta.server``."""

import sys

from .command import main

sys.exit(main())

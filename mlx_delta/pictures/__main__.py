"""``python -m mlx_delta.pictures``."""

import sys

from .command import main

sys.exit(main())

"""``python -m mlx_delta.generate``."""

import sys

from .command import main

sys.exit(main())

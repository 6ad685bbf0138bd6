"""``python -m mlx_delta.evaluate``."""

import sys

from .command import main

sys.exit(main())

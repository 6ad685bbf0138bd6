"""``python -m mlx_delta.chat``."""

import sys

from .command import main

sys.exit(main())

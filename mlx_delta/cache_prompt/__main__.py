"""``python -m mlx_delta.cache_prompt``."""

import sys

from .command import main

sys.exit(main())

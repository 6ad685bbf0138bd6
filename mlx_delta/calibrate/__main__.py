"""``python -m mlx_delta.calibrate``."""

import sys

from .command import main

sys.exit(main())

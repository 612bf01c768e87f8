"""`python -m layersync_kernels`, which is `layersync`, for launchers that take a module: torchrun -m."""

import sys

from .cli import main

sys.exit(main())

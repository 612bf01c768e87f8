"""`python -m layersync_kernels.bench`: as `layersync bench`."""

import sys

from .cli import main

sys.exit(main())

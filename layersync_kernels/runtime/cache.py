"""Where what was measured or computed once is kept for other runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """The package's folder in the user's cache, which need not be there yet."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if named.is_absolute():  # the specification has others ignored
        cache = named
    elif sys.platform == "darwin":
        cache = Path("~/Library/Caches").expanduser()
    elif sys.platform == "win32":
        cache = Path(os.environ.get("LOCALAPPDATA", "~/AppData/Local")).expanduser()
    else:
        cache = Path("~/.cache").expanduser()
    return cache / "layersync_kernels"

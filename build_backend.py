"""setuptools' build backend, with torch as a build requirement where it is not installed yet.

Under build isolation pip hides the environment's packages. Where torch is installed, setup.py finds it all the same, so
it is not downloaded twice; where it is not, pip is asked to bring it. The extension uses torch's stable ABI, so any
release from 2.10 on will do.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

TORCH_REQUIREMENT = "torch>=2.10"


def installed_torch() -> Path | None:
    """The site-packages folder of this environment that holds torch, isolated build or not."""
    for scheme in ("purelib", "platlib"):
        folder = Path(sysconfig.get_path(scheme))
        if (folder / "torch" / "version.py").exists():
            return folder
    return None


def _requires(hook: Any, config_settings: Any) -> list[str]:
    return [*hook(config_settings), *([] if installed_torch() else [TORCH_REQUIREMENT])]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """PEP 517 hook."""
    return _requires(build_meta.get_requires_for_build_wheel, config_settings)


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """PEP 660 hook."""
    return _requires(build_meta.get_requires_for_build_editable, config_settings)

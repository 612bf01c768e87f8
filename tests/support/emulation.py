"""Whether the CUDA kernels of this process run on the CPU, in the emulator: see tests/cuda_emulation/launchers.py."""

import os

LIBRARY = "LAYERSYNC_EMULATED_CUDA"  # the variable with the path of the library, in a process that it serves
EMULATED = LIBRARY in os.environ

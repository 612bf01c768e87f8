"""Counts what Triton compiles for an H100 that is not there: it asks its driver for names only, nothing is launched."""

import os
import subprocess
import sys
import types


class CompileOnly:
    """Stands in for a kernel: compiles each launch, and keeps what came out."""

    def __init__(self, kernel):
        self.kernel, self.compiled = kernel, set()

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.compiled.add(self.kernel.warmup(*args, grid=grid, **kwargs).hash)


def watch(*modules):
    """Replace the kernels of modules of Triton code; a function that gives how often each was compiled."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    driver.set_active(
        types.SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda _: 0,
        )
    )
    watched = []
    for module in modules:
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel"):
                watched.append(CompileOnly(kernel))
                setattr(module, name, watched[-1])
    return lambda: [len(kernel.compiled) for kernel in watched]


def run(code, cache):
    """The lines that `code` prints, in a process of its own: Triton chooses at import to compile or to interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()

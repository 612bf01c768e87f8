"""Compiles Triton kernels as their launchers would run them, without a GPU; prints one line of JSON for each.

python -m tests.compile_triton '[[90, "bfloat16", "bfloat16", 1152], ...]' with TRITON_INTERPRET unset: Triton decides
at import between compiler and interpreter, so the tests run this in a process of its own.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from layersync_kernels.ops.cosine_alignment import triton as cosine_alignment

from .sass import inspect

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


class Recorder:
    """Stands in for a kernel and keeps the arguments of its launch."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.record

    def record(self, *args, **kwargs):
        self.warps = kwargs.pop("num_warps")
        self.arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs

    def compile(self, capability):
        signature, constants, attributes = {}, {}, {}
        for place, name in enumerate(self.kernel.arg_names):
            value = self.arguments[name]
            if value is None or self.kernel.params[place].is_constexpr:
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = POINTERS[value.dtype]
                if value.data_ptr() % 16 == 0:
                    attributes[(place,)] = [["tt.divisibility", 16]]
            else:
                signature[name] = "i32" if isinstance(value, int) else "fp32"
        source = ASTSource(self.kernel, signature, constants, attributes)
        target = GPUTarget("cuda", capability, 32)
        return triton.compile(source, target=target, options={"num_warps": self.warps})


def report(recorder, capability, case):
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(recorder.compile(capability).asm["cubin"])
        (kernel,) = inspect(cubin)
    print(json.dumps({"case": case, "warps": recorder.warps, **kernel._asdict()}), flush=True)


def main():
    cases = json.loads(sys.argv[1])
    for case in cases:
        capability, *dtypes, width = case
        student, teacher = (torch.zeros(8, width, dtype=getattr(torch, dtype)) for dtype in dtypes)
        names = ("forward_kernel", "finish_kernel", "backward_kernel")
        recorders = {name: Recorder(getattr(cosine_alignment, name)) for name in names}
        for name, recorder in recorders.items():
            setattr(cosine_alignment, name, recorder)
        weight = torch.ones(8)
        _, stats, scale = cosine_alignment.forward(student, teacher, weight, 1e-6, 1)
        cosine_alignment.backward(torch.ones(()), student, teacher, weight, stats, scale, True, False)
        for name, recorder in recorders.items():
            setattr(cosine_alignment, name, recorder.kernel)
            if name != "finish_kernel" or case == cases[0]:
                report(recorder, capability, case)


if __name__ == "__main__":
    main()

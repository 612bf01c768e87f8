"""Compiles Triton kernels as their launchers would run them, without a GPU; prints one line of JSON for each.

python -m tests.support.compile_triton '[["cosine_alignment", 90, "bfloat16", "bfloat16", 1152], ...]' with
TRITON_INTERPRET
unset: Triton decides at import between compiler and interpreter, so the tests run this in a process of its own.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from layersync_kernels.ops import tiles
from layersync_kernels.ops.cosine_alignment import triton as cosine_alignment
from layersync_kernels.ops.gated_residual_norm import triton as gated_residual_norm
from layersync_kernels.ops.gelu import triton as gelu
from layersync_kernels.ops.gram_alignment import strips
from layersync_kernels.ops.gram_alignment import triton as gram_alignment
from layersync_kernels.ops.projected_alignment import triton as projected_alignment
from layersync_kernels.ops.spatial_norm import triton as spatial_norm

from .sass import inspect

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


class Recorder:
    """Stands in for a kernel and keeps the arguments of its launch."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.record

    def record(self, *args, **kwargs):
        self.options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in kwargs}
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
        return triton.compile(source, target=target, options=self.options)


def report(recorder, capability, case):
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(recorder.compile(capability).asm["cubin"])
        (kernel,) = inspect(cubin)
    print(json.dumps({"case": case, "warps": recorder.options["num_warps"], **kernel._asdict()}), flush=True)


def run_cosine_alignment(student_type, teacher_type, width):
    student, teacher = torch.zeros(8, width, dtype=student_type), torch.zeros(8, width, dtype=teacher_type)
    weight = torch.ones(8)
    _, stats, scale = cosine_alignment.forward(student, teacher, weight, 1e-6, 1)
    cosine_alignment.backward(torch.ones(()), student, teacher, weight, stats, scale, True, False)


def run_gated_residual_norm(x_type, dtype, width):
    """The modulated norm between two half-blocks, as all blocks have it."""
    x, branch = torch.zeros(64, width, dtype=x_type), torch.zeros(64, width, dtype=dtype)
    gate, shift, scale = torch.zeros(2, 3 * width, dtype=dtype).chunk(3, dim=-1)
    residual, normed, stats, _ = gated_residual_norm.forward(
        x, branch, gate, shift, scale, None, True, False, 1e-6, 1e-6, dtype
    )
    gated_residual_norm.backward(residual, normed, residual, branch, gate, scale, stats, None, None, False, 2)


def run_gated_residual_norm_aligned(x_type, dtype, width):
    """Every part at once: forward the cosine with a student, backward the gradient of one."""
    x, branch = torch.zeros(64, width, dtype=x_type), torch.zeros(64, width, dtype=dtype)
    gate, shift, scale = torch.zeros(2, 3 * width, dtype=dtype).chunk(3, dim=-1)
    residual, normed, stats, alignment = gated_residual_norm.forward(
        x, branch, gate, shift, scale, x, True, False, 1e-6, 1e-6, dtype
    )
    factors = alignment[1:]
    gated_residual_norm.backward(residual, normed, residual, branch, gate, scale, stats, x, factors, False, 2)


def run_gelu(dtype, width):
    preactivation = torch.zeros(64, width, dtype=dtype)
    gelu.forward(preactivation)
    gelu.backward(preactivation, preactivation, True, True)


def run_spatial_norm(dtype, width):
    spatial_norm.spatial_norm(torch.zeros(2, 65, width, dtype=dtype)[:, 1:], 1.0, 1e-6)


def run_projected_alignment(dtype, width):
    hidden, weight, teacher, z = (
        torch.zeros(n, m, dtype=dtype) for n, m in ((64, width), (768, width), *[(64, 768)] * 2)
    )
    projected_alignment.project(hidden, weight, z[0], teacher, torch.ones(64), 1e-6, 2, z)


def run_gram_alignment(dtype, width):
    u, v = torch.zeros(2, 512, width, dtype=dtype), torch.zeros(2, 1024, width, dtype=dtype)
    gradient = torch.zeros(2, 512, 1024, dtype=dtype)
    gram_alignment.strip(strips.Strip(u, v, gradient, gradient, 0.1, 0))


CASES = {
    "cosine_alignment": (cosine_alignment, run_cosine_alignment),
    "gated_residual_norm": (gated_residual_norm, run_gated_residual_norm),
    "gated_residual_norm_aligned": (gated_residual_norm, run_gated_residual_norm_aligned),
    "gelu": (gelu, run_gelu),
    "spatial_norm": (spatial_norm, run_spatial_norm),
    "projected_alignment": (projected_alignment, run_projected_alignment),
    "gram_alignment": (gram_alignment, run_gram_alignment),
}


def kernels_of(module):
    return {name: kernel for name, kernel in vars(module).items() if name.endswith("_kernel")}


def main():
    seen = set()
    for case in json.loads(sys.argv[1]):
        op, capability, *dtypes, width = case
        module, run = CASES[op]
        recorders = {}
        for place in (module, tiles):
            for name, kernel in kernels_of(place).items():
                recorders[place, name] = Recorder(kernel)
                setattr(place, name, recorders[place, name])
        run(*(getattr(torch, dtype) for dtype in dtypes), width)
        for (place, name), recorder in recorders.items():
            setattr(place, name, recorder.kernel)
            small = name in ("finish_kernel", "sum_kernel")  # once for each op is enough
            if hasattr(recorder, "arguments") and not (small and (op, name) in seen):
                report(recorder, capability, case)
                seen.add((op, name))


if __name__ == "__main__":
    main()

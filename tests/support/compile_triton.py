"""Compiles Triton kernels as their launchers would run them, without a GPU; prints one line of JSON for each.

python -m tests.support.compile_triton '[["cosine_alignment", 90, "bfloat16", "bfloat16", 1152], ...]' with
TRITON_INTERPRET
unset: Triton decides at import between compiler and interpreter, so the tests run this in a process of its own.

Launches are those of ROWS rows on tensors without memory, modulated in one group and in groups of TOKENS rows. For the
widths of the occupancy model, a block of each is run as well (sass_run.py).
"""

import json
import struct
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
from layersync_kernels.ops.swiglu import triton as swiglu

from .launches import ROWS, STREAMED, TOKENS, WIDTHS, Launch, run
from .sass import inspect
from .sass_run import parse

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


PASSES = ("forward_kernel", "backward_kernel", "project_kernel", "strip_kernel")
MODELLED = ("cosine_alignment", "gated_residual_norm", "gelu", "spatial_norm", "swiglu")
SMALL = ("grad", "weight", "gate", "shift", "scale", "d_gate", "d_shift", "d_scale", "sums")
"""Arguments that stay in the caches while the others stream by."""


class Recorder:
    """Stands in for a kernel and keeps the arguments of its launches."""

    def __init__(self, kernel):
        self.kernel, self.grids = kernel, []

    def __getitem__(self, grid):
        self.grids.append(grid)
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

    def parameters(self, **changed):
        """The bytes that the kernel is given, with pointers as launches.cpp makes them."""
        packed = b""
        for place, name in enumerate(self.kernel.arg_names):
            value = (self.arguments | changed)[name]
            if value is None or self.kernel.params[place].is_constexpr:
                continue
            if isinstance(value, torch.Tensor):
                number = place + 1 + (STREAMED if name in SMALL else 0)
                part = struct.pack("q", (number << 40) + value.storage_offset() * value.element_size())
            else:
                part = struct.pack("i" if isinstance(value, int) else "f", value)
            packed += bytes(-len(packed) % len(part)) + part
        return packed

    def launch(self):
        """The last launch, with long runs of rows cut as launches.cpp does."""
        blocks, threads = self.grids[-1], 32 * self.options["num_warps"]
        shared_rows = len(blocks) > 1 or "tokens" in self.arguments  # several programs, each with its columns
        width, block = self.arguments.get("WIDTH", 0), self.arguments["BLOCK"]
        tiles = triton.cdiv(width, block) if shared_rows and width % block else 1
        launched = self.kernel.__name__, blocks, threads, tiles
        steps = triton.cdiv(self.arguments.get("run", 0), self.arguments.get("ROWS", 1)) - 2
        if steps < 1:
            return Launch(*launched, self.parameters())
        short, longer = (self.parameters(run=count * self.arguments["ROWS"]) for count in (2, 3))
        return Launch(*launched, short, longer, steps)


def report(recorder, capability, case, launches):
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        compiled = recorder.compile(capability)
        cubin.write_bytes(compiled.asm["cubin"])
        (kernel,) = inspect(cubin)
    code, ran, unknown = parse(kernel.sass), {}, None
    try:
        for launch in launches.values():
            if launch not in ran:
                ran[launch] = run(code, capability, launch)
    except NotImplementedError as error:  # of the model alone: what else is known of the kernel is worth as much
        unknown = str(error)
    blocks = {groups: [launch.blocks, launch.threads, *ran.get(launch, ())] for groups, launch in launches.items()}
    kernel = kernel._replace(sass="", shared=kernel.shared + compiled.metadata.shared)
    facts = {"case": case, "warps": recorder.options["num_warps"], "blocks": blocks, "unknown": unknown}
    print(json.dumps({**facts, **kernel._asdict()}), flush=True)


def tokens(width, dtype, rows=ROWS):
    return torch.empty(rows, width, dtype=dtype, device="meta")


def run_cosine_alignment(student_type, teacher_type, width, groups):
    student, teacher, weight = tokens(width, student_type), tokens(width, teacher_type), tokens(1, torch.float32)[:, 0]
    _, stats, scale = cosine_alignment.forward(student, teacher, weight, 1e-6, 1)
    cosine_alignment.backward(scale, student, teacher, weight, stats, scale, True, False)


def run_gated_residual_norm(x_type, dtype, width, groups):
    """The modulated norm between two half-blocks, as all blocks have it."""
    x, branch = tokens(width, x_type), tokens(width, dtype)
    gate, shift, scale = tokens(3 * width, dtype, groups).chunk(3, dim=-1)
    residual, normed, stats, _ = gated_residual_norm.forward(
        x, branch, gate, shift, scale, None, True, False, 1e-6, 1e-6, dtype
    )
    gated_residual_norm.backward(
        residual, normed, residual, branch, gate, scale, stats, None, None, False, groups, True
    )


def run_gated_residual_norm_aligned(x_type, dtype, width, groups):
    """Every part at once: forward the cosine with a student, backward the gradient of one."""
    x, branch = tokens(width, x_type), tokens(width, dtype)
    gate, shift, scale = tokens(3 * width, dtype, groups).chunk(3, dim=-1)
    residual, normed, stats, alignment = gated_residual_norm.forward(
        x, branch, gate, shift, scale, x, True, False, 1e-6, 1e-6, dtype
    )
    factors = alignment[1:]
    gated_residual_norm.backward(
        residual, normed, residual, branch, gate, scale, stats, x, factors, False, groups, True
    )


def run_gelu(dtype, width, groups):
    preactivation = tokens(width, dtype)
    gelu.forward(preactivation)
    gelu.backward(preactivation, preactivation, True, True)


def run_swiglu(dtype, width, groups, interleaved=False):
    x12, grad = tokens(2 * width, dtype), tokens(width, dtype)
    swiglu.forward(x12, False, interleaved)
    swiglu.backward(grad, x12, False, interleaved, True, True)


def run_swiglu_of_pairs(dtype, width, groups):
    run_swiglu(dtype, width, groups, interleaved=True)


def run_spatial_norm(dtype, width, groups):
    samples = torch.empty(ROWS // TOKENS, TOKENS + 1, width, dtype=dtype, device="meta")
    spatial_norm.spatial_norm(samples[:, 1:], 1.0, 1e-6)


def run_projected_alignment(dtype, width, groups):
    hidden, weight, teacher, z = (
        torch.zeros(n, m, dtype=dtype) for n, m in ((64, width), (768, width), *[(64, 768)] * 2)
    )
    projected_alignment.project(hidden, weight, z[0], teacher, torch.ones(64), 1e-6, 2, z)


def run_gram_alignment(dtype, width, groups):
    u, v = torch.zeros(2, 512, width, dtype=dtype), torch.zeros(2, 1024, width, dtype=dtype)
    gradient = torch.zeros(2, 512, 1024, dtype=dtype)
    gram_alignment.strip(strips.Strip(u, v, gradient, gradient, 0.1, 0))


CASES = {
    "cosine_alignment": (cosine_alignment, run_cosine_alignment),
    "gated_residual_norm": (gated_residual_norm, run_gated_residual_norm),
    "gated_residual_norm_aligned": (gated_residual_norm, run_gated_residual_norm_aligned),
    "gelu": (gelu, run_gelu),
    "spatial_norm": (spatial_norm, run_spatial_norm),
    "swiglu": (swiglu, run_swiglu),
    "swiglu_of_pairs": (swiglu, run_swiglu_of_pairs),
    "projected_alignment": (projected_alignment, run_projected_alignment),
    "gram_alignment": (gram_alignment, run_gram_alignment),
}


def kernels_of(module):
    return {name: kernel for name, kernel in vars(module).items() if name.endswith("_kernel")}


def main():
    seen = set()
    for case in json.loads(sys.argv[1]):
        op, capability, *dtypes, width = case
        module, run_op = CASES[op]
        recorders, launches = {}, {}
        for place in (module, tiles):
            for name, kernel in kernels_of(place).items():
                recorders[place, name] = Recorder(kernel)
                setattr(place, name, recorders[place, name])
        for groups in (1, ROWS // TOKENS):
            run_op(*(getattr(torch, dtype) for dtype in dtypes), width, groups)
            if op in MODELLED and width in WIDTHS and "float16" not in dtypes:
                for (place, name), recorder in recorders.items():
                    if place is module and name in PASSES:
                        launches.setdefault(name, {})[groups] = recorder.launch()
        for (place, name), recorder in recorders.items():
            setattr(place, name, recorder.kernel)
            small = name not in PASSES  # once for each op is enough
            if recorder.grids and not (small and (op, name) in seen):
                report(recorder, capability, case, launches.get(name, {}))
                seen.add((op, name))


if __name__ == "__main__":
    main()

"""A step counted on the graphs of a GPU that is not there: figures known by hand, and nothing left of the pretence."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from layersync_kernels import functional
from layersync_kernels.analysis import CARDS, compose_step, count_gpu_step
from layersync_kernels.bench.gpu_traffic import Setting, block_alone
from layersync_kernels.bench.traffic import Provider, training_step
from layersync_kernels.compiler import gpu_code, gpu_graph, pretended_card, pretended_gpu
from layersync_kernels.errors import UserError
from layersync_kernels.modules.block import AdaLNZeroBlock
from layersync_kernels.modules.norm import Stream
from layersync_kernels.ops import dispatch, native
from layersync_kernels.ops.gelu import epilogue, quack
from layersync_kernels.runtime.machine import find_tool

lowers = pytest.mark.skipif(pretended_gpu.obstacle() is not None, reason=f"{pretended_gpu.obstacle()}")

ROOT = Path(__file__).parents[2]
BATCH, TOKENS, WIDTH, HEADS = 256, 256, 1152, 16  # SiT-XL
MD = 4 * BATCH * TOKENS * WIDTH
XL = Setting("SiT-XL/2", BATCH, "bf16", CARDS["h100"])


def modulated_norm(fused):
    def make():
        x = torch.randn(BATCH, TOKENS, WIDTH, requires_grad=True)
        shift, scale = (torch.randn(BATCH, WIDTH, requires_grad=True) for _ in range(2))
        if fused:
            return lambda: functional.modulated_layer_norm(x, shift, scale)
        return lambda: F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

    return make


def two_fused_blocks():
    blocks = nn.ModuleList(AdaLNZeroBlock(WIDTH, HEADS) for _ in range(2))
    x, c = torch.randn(BATCH, TOKENS, WIDTH, requires_grad=True), torch.randn(BATCH, WIDTH, requires_grad=True)

    def forward():
        with torch.autocast("cpu", torch.bfloat16):
            stream = Stream(x)
            for block in blocks:
                stream = block(stream, c, lend_bias=True).stream
            return stream.finished()

    return forward


@pytest.fixture(scope="module")
def two_blocks():
    return count_gpu_step(two_fused_blocks, compiled=True)


def large(step, groups=("ours", "other")):
    """Name and MD of kernels outside of products and attention, as often as they are launched; those that matter."""
    return [
        (kernel.name, round(kernel.bytes / MD, 1))
        for kernel, times in step.kernels.items()
        for _ in range(times)
        if kernel.group in groups and kernel.bytes > MD / 4
    ]


# ---- Figures


@lowers
def test_modulated_layer_norm_costs_7_md_in_inductors_kernels_and_5_in_ours():
    compiled = count_gpu_step(modulated_norm(fused=False), compiled=True)
    assert compiled.outside / MD == pytest.approx(7.0, abs=0.05)
    assert compiled.launches() == 3
    fused = count_gpu_step(modulated_norm(fused=True))
    assert fused.outside / MD == pytest.approx(5.0, abs=0.05)
    assert {kernel.name for kernel in fused.kernels} == {
        "layersync_cuda::gated_residual_norm_forward",
        "layersync_cuda::gated_residual_norm_backward",
    }


OURS_OF_TWO_BLOCKS = Counter(
    {
        ("layersync_cuda::gelu_backward", 8.0): 2,
        ("layersync_cuda::gelu_forward", 4.0): 2,
        ("layersync_cuda::qk_norm_rope_backward", 3.0): 2,  # gradients of qkv packed, and summed for its bias
        ("layersync_cuda::gated_residual_norm_forward", 1.5): 1,  # the first norm
        ("layersync_cuda::gated_residual_norm_backward", 3.5): 1,  # with the sum of both gradients of the tokens
        ("layersync_cuda::gated_residual_norm_forward", 3.0): 3,  # the seams
        ("layersync_cuda::gated_residual_norm_backward", 4.5): 3,
        ("layersync_cuda::gated_residual_norm_forward", 2.5): 1,  # the last update
        ("layersync_cuda::gated_residual_norm_backward", 3.0): 1,
    }
)


@lowers
def test_fused_blocks_compiled_around_move_no_more_than_they_did(two_blocks):
    ours, other = (two_blocks.bytes(group) / MD / 2 for group in ("ours", "other"))
    more_of_ours = Counter(large(two_blocks, ["ours"])) - OURS_OF_TWO_BLOCKS
    assert not more_of_ours, f"kernels of ours that move more than they did, in MD: {dict(more_of_ours)}"
    new = large(two_blocks, ["other"])
    assert not new, f"kernels of Inductor's that were not there, in MD: {new}"
    listing = "\n".join(map(str, large(two_blocks)))
    assert ours + other < 32.6 * 1.005, f"a block moves {ours + other:.2f} MD outside of products, not 32.6:\n{listing}"
    assert ours == pytest.approx(31.6, abs=0.1)
    assert other == pytest.approx(1.0, abs=0.1)


def mlp_of_a_block(backend, keep="preactivation", bias=True):
    """The MLP of a block in bf16, without the bias of its second layer, whose sum is of no pass of ours."""

    def make():
        shapes = [(BATCH * TOKENS, WIDTH), (4 * WIDTH, WIDTH), (4 * WIDTH,), (WIDTH, 4 * WIDTH)]
        x, weight1, bias1, weight2 = (torch.randn(s, dtype=torch.bfloat16, requires_grad=True) for s in shapes)
        bias1 = bias1 if bias else None
        return lambda: functional.gelu_mlp(x, weight1, bias1, weight2, None, keep=keep, backend=backend)

    return make


@pytest.fixture
def quack_installed(monkeypatch):
    monkeypatch.setitem(epilogue.ROUTES, "quack", dataclasses.replace(quack.ROUTE, obstacle=lambda dtype: None))
    monkeypatch.setitem(dispatch._OBSTACLES, "triton", lambda device: None)


# The passes read the pre-activation and write the activation, read its gradient and the pre-activation, and write the
# latter's gradient and the activation: 2 MD each. An epilogue writes or reads one of these beside the product.
ROUTES_OF_THE_MLP = {  # (backend, keep, bias) → MD outside of products and beside them, MD kept
    ("cuda", "preactivation", True): (12, 2),
    ("cuda", "activation", True): (10, 4),
    ("cublaslt", "preactivation", True): (8, 2),  # forward 2, backward 2, and the activation's own pass: 4
    ("cublaslt", "activation", True): (4, 4),
    ("quack", "preactivation", False): (6, 2),  # forward 2, backward 4
    ("quack", "preactivation", True): (8, 2),  # and the sums for the bias over the gradient
    ("quack", "activation", True): (8, 2),
}


@pytest.mark.parametrize("route", ROUTES_OF_THE_MLP, ids=lambda route: "-".join(map(str, route)))
def test_the_mlp_moves_and_keeps_on_each_route_what_is_known_by_hand(route, quack_installed):
    moved, kept = ROUTES_OF_THE_MLP[route]
    step = count_gpu_step(mlp_of_a_block(*route))
    assert step.outside / MD == pytest.approx(moved, abs=0.01), large(step)
    assert step.saved_bytes / MD - 0.5 == pytest.approx(kept, abs=0.01)  # without the gradient from outside
    beside = sum(times * kernel.beside for kernel, times in step.kernels.items())
    assert (step.bytes("gemm") - beside) / MD == pytest.approx(6 * 2.5 + 0.2, abs=0.05)  # six products, and weights


@lowers
@pytest.mark.parametrize(("backend", "moved"), [("cublaslt", 8), ("quack", 8)])
def test_a_compiled_mlp_moves_no_more_on_a_route(backend, moved, quack_installed):
    step = count_gpu_step(mlp_of_a_block(backend), compiled=True)
    assert step.outside / MD == pytest.approx(moved, abs=0.01), large(step)


@lowers
def test_a_published_block_compiled_moves_40_md():
    step = count_gpu_step(lambda: block_alone("eager", XL), compiled=True)
    # 40.3 without what is done to the modulation and the weights that make it.
    assert step.outside / MD == pytest.approx(40.5, abs=0.3), large(step)
    assert step.bytes("ours") == 0
    assert step.launches("gemm") == 5 + 10  # each linear layer once forward and twice backward
    assert step.launches("attention") == 2
    of_attention = {kernel.name for kernel in step.kernels if kernel.group == "attention"}
    assert of_attention == {
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_backward",
    }


@lowers
def test_every_kernel_that_the_code_launches_is_counted(two_blocks):
    launched = re.findall(r"\btriton_\w+\.run\(", "\n".join(two_blocks.code))
    named = [kernel for kernel in Counter(two_blocks.kernels).elements() if kernel.name.startswith("triton_")]
    assert len(named) == len(launched) > 20


@lowers
def test_our_ops_are_counted_alike_op_by_op_and_in_compiled_graphs(two_blocks):
    eager = count_gpu_step(two_fused_blocks)
    assert two_blocks.bytes("ours") == pytest.approx(eager.bytes("ours"), rel=0.005)
    for group in ("gemm", "attention"):
        assert two_blocks.bytes(group) == eager.bytes(group)
    flops = [sum(n * k.flops for k, n in s.kernels.items() if k.group == "attention") for s in (two_blocks, eager)]
    assert flops[0] == flops[1] > 0


def test_a_step_counted_by_hand():
    def make():
        weight = nn.Parameter(torch.randn(8, 4))
        x = torch.randn(16, 4)
        return lambda: F.linear(x, weight).sum()

    step = count_gpu_step(make)
    kernels = {(k.phase, k.group, k.name): (n, k.bytes, k.flops) for k, n in step.kernels.items()}
    assert kernels["forward", "gemm", "aten::mm"] == (1, 4 * (64 + 32 + 128), 2 * 16 * 4 * 8)
    assert kernels["forward", "other", "aten::sum"] == (1, 4 * (128 + 1), 0)
    assert kernels["backward", "gemm", "aten::mm"][2] == 2 * 16 * 4 * 8
    assert {k.dtype for k in step.kernels if k.group == "gemm"} == {torch.float32}
    assert (step.saved_bytes, step.weight_bytes) == (0, 0)
    assert (step + step * 2 - step).launches() == 2 * step.launches()
    assert (step - step).kernels == {}


@pytest.mark.parametrize(
    ("autocast", "kernel"),
    [(None, "_scaled_dot_product_efficient_attention"), (torch.bfloat16, "_scaled_dot_product_flash_attention")],
)
def test_attention_is_the_kernel_of_a_gpu(autocast, kernel):
    def make():
        q = torch.randn(2, 3, 16, 8, requires_grad=True)

        def forward():
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                return F.scaled_dot_product_attention(q, q, q).sum()

        return forward

    names = {k.name for k in count_gpu_step(make).kernels if k.group == "attention"}
    assert names == {f"aten::{kernel}", f"aten::{kernel}_backward"}


def test_a_step_is_the_sum_of_its_blocks():
    def count(depth):
        return count_gpu_step(lambda: training_step(Provider("fused"), "SiT-P/8", 2, torch.bfloat16, depth))

    block, step = compose_step(count(2), count(3), 5)
    whole = count(5)
    assert (step.bytes(), step.launches(), step.saved_bytes) == (whole.bytes(), whole.launches(), whole.saved_bytes)
    assert block.launches("ours") == 7  # two seams, GELU, and the packing of the gradient of qkv


def test_other_backends_are_named():
    def make():
        x, c = torch.randn(2, 16, 64, requires_grad=True), torch.randn(2, 64, requires_grad=True)
        return lambda: functional.modulated_layer_norm(x, c, c)

    names = {kernel.name for kernel in count_gpu_step(make, backend="triton").kernels if kernel.group == "ours"}
    assert {name.partition("::")[0] for name in names} == {"layersync_triton"}
    with pytest.raises(ValueError, match="backend='cpp': expected one of cuda, triton"):
        count_gpu_step(make, backend="cpp")


# ---- What goes wrong


def test_a_forward_without_gradient_or_for_cuda_is_refused():
    with pytest.raises(ValueError, match="must return the loss"):
        count_gpu_step(lambda: lambda: torch.ones(3))
    if torch.cuda.is_available():
        return

    def forward():
        with torch.autocast("cuda", torch.bfloat16):
            return torch.ones(3)

    with pytest.raises(UserWarning, match="CUDA is not available"):
        count_gpu_step(lambda: forward)


def state():
    interface = pretended_card.inside("torch._dynamo.device_interface:CudaInterface")
    lowering = pretended_card.inside("torch._inductor.graph:GraphLowering")
    config = pretended_card.inside("torch._inductor.config")
    triton = pretended_card.inside("triton:runtime.driver")
    return [
        F.scaled_dot_product_attention, dispatch.resolve, native.cuda, torch.cuda.is_available,
        torch.cuda.get_device_properties, interface.get_device_properties, interface.Worker.current_device,
        lowering._update_scheduler, lowering.save_output_code, config.compile_threads, config.force_disable_caches,
        config.triton.cudagraphs, triton._active, torch._C._len_torch_dispatch_stack(),
    ]  # fmt: skip


@lowers
@pytest.mark.parametrize("where", ["make", "forward", "lower", "backward"])
def test_nothing_is_left_of_the_pretence_after_an_error(where, monkeypatch):
    def fail(*args, **kwargs):
        raise ZeroDivisionError(where)

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return fail()

    def make():
        x = torch.randn(3, requires_grad=True)
        if where == "make":
            fail()
        if where == "forward":
            return fail
        return lambda: (Fails.apply(x) if where == "backward" else x).exp().sum()

    if where == "lower":
        monkeypatch.setattr(pretended_gpu._Recorder, "_note", fail)
    before = state()
    with pytest.raises(Exception, match=where):
        count_gpu_step(make, compiled=where == "lower")
    assert state() == before


@lowers
def test_what_a_version_of_torch_has_moved_is_named(monkeypatch):
    lowering = pretended_gpu.inside("torch._inductor.graph:GraphLowering")
    monkeypatch.delattr(lowering, "save_output_code")

    def make():
        x = torch.randn(3, requires_grad=True)
        return lambda: x.exp().sum()

    with pytest.raises(Exception, match=r"written for torch 2.10-2.14; torch \S+ moved GraphLowering.save_output_code"):
        count_gpu_step(make, compiled=True)
    with pytest.raises(UserError, match=r"torch \S+ moved torch._inductor.nowhere.that"):
        pretended_gpu.inside("torch._inductor.nowhere:that")


@pytest.mark.parametrize(("missing", "message"), [("triton", "Triton is not installed"), ("cuda", "without CUDA")])
def test_compiled_graphs_need_triton_and_a_cuda_build(missing, message, monkeypatch):
    if missing == "cuda":
        monkeypatch.setattr(torch.version, "cuda", None)
    else:
        find = gpu_graph.pretended_gpu.importlib.util.find_spec
        monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "triton" else find(name, *a))
    with pytest.raises(UserError, match=message):
        count_gpu_step(modulated_norm(fused=False), compiled=True)
    assert count_gpu_step(modulated_norm(fused=True)).outside / MD == pytest.approx(5.0, abs=0.05)


# ---- Machine code

REGISTERS = """
import json, torch
from layersync_kernels.analysis import CARDS, count_gpu_step
from layersync_kernels.compiler import gpu_code
from tests.compiler.test_gpu_graph import modulated_norm

step = count_gpu_step(modulated_norm(fused=False), compiled=True)
names = sorted({kernel.name for kernel in step.kernels})
assert gpu_code.obstacle() is None, gpu_code.obstacle()
found = gpu_code.inductor_resources(step.code, names[:1], CARDS["h100"])
ours, why = gpu_code.our_resources(["layersync_cuda::gelu_backward"], torch.bfloat16, CARDS["h100"])
print(json.dumps([names[:1], found, ours, why]))
"""


@lowers
@pytest.mark.skipif(find_tool("cuobjdump") is None, reason="no cuobjdump")
def test_registers_of_inductors_kernels_and_of_ours():
    # In a process of its own: Triton decides at import between compiler and interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", REGISTERS], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    names, found, ours, why = json.loads(done.stdout.splitlines()[-1])
    assert [each[0] for each in found] == names
    for _, variants, (least, most), spilled in [*found, *ours]:
        assert variants >= 1
        assert 16 <= least <= most <= 255
        assert spilled == 0
    assert [each[0] for each in ours] == ["layersync_cuda::gelu_backward"] if why is None else "extension" in why


def test_a_triton_that_interprets_compiles_nothing(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET=1" in gpu_code.obstacle()

"""Calls every op on tensors without elements whose channels are not dense, each in a process of its own.

    python -m tests.ops.empty_calls BACKEND DEVICE

`contiguous()` returns such a tensor as it is. Prints a line for every call: its name, and how it ended.
"""

import os
import sys
import traceback

import torch

from layersync_kernels import functional as F
from layersync_kernels.ops import native

from ..cuda_emulation import launchers
from ..support.emulation import EMULATED

D = 6


def no_samples(*shape):
    """(0, *shape), every other of the channels that there are."""
    *leading, width = shape
    return torch.randn(4, *leading, 2 * width)[..., ::2][:0].requires_grad_()


def no_channels(*shape):
    """(*shape, 0) at three strides, which no layout of rows covers."""
    wide = torch.randn(2, 2 * shape[0], 3, 2 * shape[1], 4, 6)
    return wide[:, ::2, 1, ::2, ..., :0].requires_grad_()


def modulation():
    return torch.randn(D, requires_grad=True)


def head():
    return torch.randn(D // 3, requires_grad=True)


def weight(rows=4):
    return torch.randn(rows, D, requires_grad=True)


def aligned(x, branch, backend):
    first = F.aligned_residual_norm(x, branch, modulation(), modulation(), modulation(), tap=True, backend=backend)
    second = F.aligned_residual_norm(
        first.residual, branch, modulation(), None, None, student=first.tap, backend=backend
    )
    return second.cosine, second.normed


TOKENS = (3, D)
CALLS = {
    "layersync_loss": lambda b: F.layersync_loss(
        no_samples(*TOKENS), no_samples(*TOKENS), teacher_grad=True, backend=b
    ),
    "layersync_loss without channels": lambda b: F.layersync_loss(
        no_channels(2, 3), no_channels(2, 3), teacher_grad=True, backend=b
    ),
    "cosine_loss": lambda b: F.cosine_loss(no_samples(*TOKENS)),
    "projected_alignment_loss": lambda b: F.projected_alignment_loss(
        no_samples(*TOKENS), weight(), None, no_samples(3, 4), backend=b
    ),
    "dispersive_loss": lambda b: F.dispersive_loss(no_samples(*TOKENS)),
    "gram_alignment_loss": lambda b: F.gram_alignment_loss(no_samples(*TOKENS), no_samples(*TOKENS), backend=b),
    "modulated_layer_norm": lambda b: F.modulated_layer_norm(
        no_samples(*TOKENS), modulation(), modulation(), backend=b
    ),
    "modulated_rms_norm": lambda b: F.modulated_rms_norm(no_samples(*TOKENS), modulation(), None, backend=b),
    "gated_residual": lambda b: F.gated_residual(no_samples(*TOKENS), no_samples(*TOKENS), modulation(), backend=b),
    "gated_residual_norm": lambda b: F.gated_residual_norm(
        no_samples(*TOKENS), no_samples(*TOKENS), modulation(), modulation(), modulation(), backend=b
    ),
    "aligned_residual_norm": lambda b: aligned(no_samples(*TOKENS), no_samples(*TOKENS), b),
    "attention": lambda b: F.attention(*3 * [no_samples(2, 3, D)], backend=b),
    "self_attention": lambda b: F.self_attention(no_samples(3, 3 * D), 2, backend=b),
    "qk_norm_rope": lambda b: F.qk_norm_rope(
        no_samples(3, 3 * D), head(), head(), *2 * [torch.ones(3, D // 3)], 3, bias=torch.ones(3 * D), backend=b
    ),
    "linear_gelu": lambda b: F.linear_gelu(no_samples(*TOKENS), weight(), None, backend=b),
    "gelu_mlp": lambda b: F.gelu_mlp(no_samples(*TOKENS), weight(), None, weight(5)[:, :4], None, backend=b),
    "spatial_norm": lambda b: F.spatial_norm(no_samples(*TOKENS).detach(), backend=b),
    "swiglu": lambda b: F.swiglu(no_samples(*TOKENS), backend=b),
    "swiglu_mlp": lambda b: F.swiglu_mlp(no_samples(*TOKENS), weight(), None, weight(5)[:, :2], None, backend=b),
}


def x():
    return no_samples(*TOKENS).detach()


def floats(*shape):
    return torch.ones(shape)


# The raw ops behind them: the Python edge leaves most empty tensors to the reference.
RAW_CALLS = {
    "attention_forward": lambda op: op(x(), x(), x(), None, 2),
    "attention_backward": lambda op: op(x(), x(), x(), x(), None, 2, True),
    "cosine_alignment_forward": lambda op: op(x(), x(), None, 1e-6, 1),
    "cosine_alignment_backward": lambda op: op(floats(), x(), x(), None, floats(3, 0), floats(), True, True),
    "cosine_alignment_in_place": lambda op: op(x(), x(), None, floats(), 1e-6, 1.0, 1, True),
    "gated_residual_norm_forward": lambda op: op(
        x(), x(), None, None, None, x(), True, False, 1e-6, 1e-6, torch.float32
    ),
    "gated_residual_norm_backward": lambda op: op(
        x(), x(), x(), x(), None, None, floats(2, 0), None, None, False, 0, False
    ),
    "gelu_forward": lambda op: op(no_samples(D).detach()),
    "gelu_backward": lambda op: op(no_samples(D).detach(), no_samples(D).detach(), True, True),
    "qk_norm_rope_forward": lambda op: op(
        no_samples(3, 3 * D).detach(), floats(2), floats(2), floats(3, 2), floats(3, 2), 3, 1e-6, True, False
    ),
    "qk_norm_rope_backward": lambda op: op(
        *3 * [no_samples(3, 3, 2).detach()],
        no_samples(3, 3 * D).detach(),
        floats(2),
        floats(2),
        None,
        None,
        1e-6,
        False,
        True,
        True,
        True,
    ),
    "gram_alignment_strip": lambda op: op(x(), 3, 0.0, 0, x()),
    "spatial_norm": lambda op: op(x(), 1.0, 1e-6),
    "swiglu_forward": lambda op: op(x(), False, True),
    "swiglu_backward": lambda op: op(x()[..., :3], x(), True, False, True, True),
}


def differentiate(call):
    outputs = call()
    for output in outputs if isinstance(outputs, tuple) else (outputs,):
        if output.requires_grad:
            output.sum().backward(retain_graph=True)


def in_a_process(name, call):
    """A crash of the call is its exit code; one that does not return is killed."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            call()
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(f"{name}: {'ended' if code == 0 else f'exit code {code}'}")


def main(backend, device):
    torch.set_num_threads(1)
    torch.set_default_device(device)
    if EMULATED:
        launchers.serve()
    native.cuda()  # raw ops have no Python edge that loads them
    for name, call in CALLS.items():
        if not (name in ("attention", "self_attention") and backend in ("triton", "cuda")):
            in_a_process(f"{backend}: {name}", lambda call=call: differentiate(lambda: call(backend)))
    raw = getattr(torch.ops, f"layersync_{backend}")
    for name, call in RAW_CALLS.items():
        if backend == "cpp" or hasattr(raw, name):
            in_a_process(f"{backend}: raw {name}", lambda name=name, call=call: call(getattr(raw, name)))


if __name__ == "__main__":
    main(*sys.argv[1:])

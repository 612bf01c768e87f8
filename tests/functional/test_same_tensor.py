"""The same tensor for two arguments of an op: values and gradients are those of two equal tensors."""

import pytest
import torch

from layersync_kernels.functional import (
    aligned_residual_norm,
    gated_residual,
    gated_residual_norm,
    gelu_mlp,
    gram_alignment_loss,
    layersync_loss,
    linear_gelu,
    modulated_layer_norm,
    modulated_rms_norm,
    projected_alignment_loss,
    swiglu_mlp,
)

from ..support.backends import FUSED, device_of

BACKENDS = [
    *(backend for backend in FUSED if backend.values[0] != "triton"),
    "reference",
]  # its interpreter does not compile
TOKENS, ROWS, SQUARE, BIAS = (2, 5, 8), (2, 8), (8, 8), (8,)


def aligned(x, branch, gate, shift, scale, backend):
    tap = aligned_residual_norm(x, branch, gate, shift, scale, tap=True, backend=backend).tap
    seam = aligned_residual_norm(x, branch, gate, shift, scale, student=tap, backend=backend)
    return seam.residual, seam.normed, seam.cosine


# Of each op: shapes of the distinct tensors, which of them each argument is, and the call.
CASES = {
    "modulated_layer_norm, shift is scale": ((TOKENS, ROWS), (0, 1, 1), modulated_layer_norm),
    "modulated_layer_norm, all one": ((TOKENS,), (0, 0, 0), modulated_layer_norm),
    "modulated_rms_norm, shift is scale": ((TOKENS, ROWS), (0, 1, 1), modulated_rms_norm),
    "gated_residual, x is branch": ((TOKENS, ROWS), (0, 0, 1), gated_residual),
    "gated_residual, branch is gate": ((TOKENS, TOKENS), (0, 1, 1), gated_residual),
    "gated_residual_norm, x is branch": ((TOKENS, ROWS, ROWS, ROWS), (0, 0, 1, 2, 3), gated_residual_norm),
    "gated_residual_norm, one modulation": ((TOKENS, TOKENS, ROWS), (0, 1, 2, 2, 2), gated_residual_norm),
    "gated_residual_norm, two tensors": ((TOKENS, ROWS), (0, 0, 1, 1, 1), gated_residual_norm),
    "aligned_residual_norm, two tensors": ((TOKENS, ROWS), (0, 0, 1, 1, 1), aligned),
    "layersync_loss": ((TOKENS,), (0, 0), layersync_loss),
    "layersync_loss, teacher_grad": (
        (TOKENS,),
        (0, 0),
        lambda s, t, backend: layersync_loss(s, t, teacher_grad=True, reduction="none", backend=backend),
    ),
    "gram_alignment_loss": (  # the other kinds have a kink where student and teacher are equal
        (TOKENS,),
        (0, 0),
        lambda s, t, backend: gram_alignment_loss(s, t, kind="square", backend=backend),
    ),
    "projected_alignment_loss, hidden is teacher": (
        (TOKENS, SQUARE, BIAS),
        (0, 1, 2, 0),
        projected_alignment_loss,
    ),
    "projected_alignment_loss, all one": (
        (SQUARE,),
        (0, 0, 0),
        lambda hidden, weight, teacher, backend: projected_alignment_loss(
            hidden, weight, None, teacher, backend=backend
        ),
    ),
    "linear_gelu, x is weight": ((SQUARE, BIAS), (0, 0, 1), linear_gelu),
    "gelu_mlp, weights and biases are one": ((TOKENS, SQUARE, BIAS), (0, 1, 2, 1, 2), gelu_mlp),
    "gelu_mlp, tied weights": (
        (TOKENS, (12, 8), (12,), BIAS),
        (0, 1, 2, 1, 3),
        lambda x, w1, b1, w2, b2, backend: gelu_mlp(x, w1, b1, w2.t(), b2, backend=backend),
    ),
    "swiglu_mlp, x is the second weight": (
        (SQUARE, (16, 8), (16,), BIAS),
        (0, 1, 2, 0, 3),
        swiglu_mlp,
    ),
}


def outputs_and_gradients(call, leaves, which, backend):
    outputs = call(*(leaves[index] for index in which), backend=backend)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum((output * output.detach().cos()).sum() for output in outputs).backward()
    return outputs, [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]


@pytest.mark.parametrize("how", ["eager", "fullgraph"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_the_same_tensor_twice_is_two_equal_ones(case, backend, how):
    shapes, which, call = CASES[case]
    values = [torch.randn(shape, device=device_of(backend)) for shape in shapes]
    copies = [values[index].clone().requires_grad_() for index in which]
    expected, by_argument = outputs_and_gradients(call, copies, range(len(which)), "reference")
    wanted = [torch.zeros_like(value) for value in values]
    for index, gradient in zip(which, by_argument, strict=True):
        wanted[index] += gradient
    if how == "fullgraph":
        torch.compiler.reset()
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    leaves = [value.requires_grad_() for value in values]
    outputs, gradients = outputs_and_gradients(call, leaves, which, backend)
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-5)

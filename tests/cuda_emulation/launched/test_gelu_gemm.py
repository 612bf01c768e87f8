"""The ops whose GEMMs have GELU in cuBLASLt's epilogue, as a whole, on an emulated library."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from layersync_kernels.ops.gelu import cublaslt, op

from .. import launchers
from .harness import BF16, HALF, NAMES, rows_of

COUNT, WIDTH, HIDDEN = 5, 24, 40
DTYPES = pytest.mark.parametrize("dtype", [BF16, HALF], ids=NAMES.get)


@pytest.fixture
def library():
    """The emulated library; whatever an op creates in it, but handles, it has to destroy."""
    state = launchers.cublaslt()
    yield state
    state.workspace = state.refuse = 0
    assert state.descriptors == 0


def wider(tensor: Tensor) -> Tensor:
    """The same values with the rows further apart."""
    return torch.cat([tensor, torch.full((len(tensor), 16), torch.nan, dtype=tensor.dtype)], -1)[:, : tensor.shape[1]]


def shifted(tensor: Tensor) -> Tensor:
    """The same values, no row of which starts at 16 bytes."""
    return torch.cat([tensor.new_zeros(len(tensor), 4), tensor, tensor.new_zeros(len(tensor), 4)], -1)[:, 4:-4]


SPREADS = pytest.mark.parametrize("spread", [lambda t: t, wider, shifted], ids=["dense", "strided", "shifted"])


def assert_rounded(found: Tensor, exact: Tensor) -> None:
    eps = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), exact, rtol=eps / 2 * 1.001, atol=1e-6)


@DTYPES
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@SPREADS
def test_forward_multiplies_by_the_transposed_weight(library, dtype, bias, spread):
    library.workspace = 48
    x, weight = rows_of(COUNT, WIDTH, dtype=dtype), rows_of(HIDDEN, WIDTH, dtype=dtype, seed=1) / 4
    offset = rows_of(HIDDEN, dtype=dtype, seed=2) if bias else None
    activation, preactivation = cublaslt.FORWARD(spread(x), spread(weight), offset)
    u = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
    assert_rounded(preactivation, u)
    assert_rounded(activation, F.gelu(u, approximate="tanh"))


@DTYPES
@SPREADS
def test_backward_sums_the_gradient_over_rows_and_not_over_channels(library, dtype, spread):
    d_output, weight = rows_of(COUNT, WIDTH, dtype=dtype), rows_of(WIDTH, HIDDEN, dtype=dtype, seed=1) / 4
    u = rows_of(COUNT, HIDDEN, dtype=dtype, seed=2)
    d_u, d_bias = cublaslt.BACKWARD(spread(d_output), spread(weight), u)
    wide = u.double().requires_grad_()
    output = F.linear(F.gelu(wide, approximate="tanh"), weight.double())
    (exact,) = torch.autograd.grad(output, wide, d_output.double())
    assert_rounded(d_u, exact)
    assert_rounded(d_bias, exact.sum(0))


def test_a_shape_is_asked_about_once(library):
    x, weight = rows_of(7, WIDTH, dtype=BF16), rows_of(56, WIDTH, dtype=BF16)
    questions, products = library.questions, library.products
    for _ in range(3):
        cublaslt.FORWARD(x, weight, None)
    assert library.questions == questions + 1
    assert library.products == products + 3
    cublaslt.FORWARD(x[:6], weight, None)
    assert library.questions == questions + 2


def test_every_card_has_one_handle_of_its_own(library):
    """The emulated library refuses a handle of another card than the current one."""
    handles = library.handles
    inputs = [(rows_of(COUNT, WIDTH, dtype=BF16), rows_of(HIDDEN, WIDTH, dtype=BF16)) for _ in range(3)]
    with launchers.placed({3: inputs[0], 4: inputs[1]}):
        for _ in range(2):
            results = [cublaslt.FORWARD(x, weight, None) for x, weight in inputs]
    assert handles + 2 <= library.handles <= handles + 3  # the third pair is on the card that other tests use
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0])


def test_tensors_of_two_cards_are_refused(library):
    x, weight = rows_of(COUNT, WIDTH, dtype=BF16), rows_of(HIDDEN, WIDTH, dtype=BF16)
    with launchers.placed({3: [weight]}), pytest.raises(RuntimeError, match="all tensors must be on the same GPU"):
        cublaslt.FORWARD(x, weight, None)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_what_the_library_has_no_plan_for_is_its_plain_product_and_our_pass(library, bias):
    """And is not asked about again."""
    library.refuse = 1
    questions, products = library.questions, library.products
    x, weight, u = (rows_of(*shape, dtype=BF16, seed=3) / 4 for shape in ((9, WIDTH), (HIDDEN, WIDTH), (9, HIDDEN)))
    offset = rows_of(HIDDEN, dtype=BF16, seed=2) if bias else None
    for _ in range(2):
        activation, preactivation = cublaslt.FORWARD(x, weight, offset)
    assert library.questions == questions + 1
    d_u, d_bias = cublaslt.BACKWARD(x, weight.t().contiguous(), u)
    assert library.products == products
    expected = F.linear(x, weight, offset)
    assert torch.equal(preactivation, expected)
    assert torch.equal(activation, op.FORWARD["cuda"](expected))
    plain = op.BACKWARD["cuda"](x @ weight.t(), u, False, True)
    assert torch.equal(d_u, plain[0])
    assert torch.equal(d_bias, plain[2].bfloat16())


@pytest.mark.parametrize(
    ("x", "weight", "bias", "match"),
    [
        (rows_of(5, 20, dtype=BF16), rows_of(40, 20, dtype=BF16), None, r"x of shape \(5, 20\) .* multiple of 8"),
        (rows_of(5, 24, dtype=BF16), rows_of(36, 24, dtype=BF16), None, "widths must fit, and be multiples of 8"),
        (rows_of(5, 24), rows_of(40, 24), None, "take bfloat16 or float16"),
        (rows_of(5, 24, dtype=BF16), rows_of(40, 24, dtype=HALF), None, "weight must have the dtype of"),
        (rows_of(5, 24, dtype=BF16), rows_of(40, 24, dtype=BF16), rows_of(8, dtype=BF16), "the bias must be 40"),
        (rows_of(0, 24, dtype=BF16), rows_of(40, 24, dtype=BF16), None, r"x of shape \(0, 24\)"),
    ],
    ids=["width", "outputs", "fp32", "dtypes", "bias", "empty"],
)
def test_what_the_library_would_refuse_is_refused_before(library, x, weight, bias, match):
    questions = library.questions
    with pytest.raises(RuntimeError, match=match):
        cublaslt.FORWARD(x, weight, bias)
    assert library.questions == questions

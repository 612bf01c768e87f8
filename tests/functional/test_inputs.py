"""What every public op says of tensors that are not dense ones, and which kinds of dense ones it takes."""

import inspect

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.two_tensor import TwoTensor

from layersync_kernels import RepresentationAlignmentLoss, functional

D = 8
TOKENS = (2, 4, D)
MASK = torch.tensor([[True, True, False, True], [True, False, True, True]])
ROWS = {"mask": MASK, "token_weight": (2, 4)}
SEAM = {"x": TOKENS, "branch": TOKENS, "gate": (2, D), "shift": (2, D), "scale": (2, D), "bias": (D,)}
MODULATED = {name: SEAM[name] for name in ("x", "shift", "scale")}

# The tensors of each op: a shape, or the tensor itself.
TENSORS = {
    "aligned_residual_norm": SEAM,
    "attention": {**dict.fromkeys("qkv", (2, 2, 4, 4)), "lengths": torch.tensor([4, 2])},
    "cosine_loss": {"cosine": (2, 4), **ROWS},
    "dispersive_loss": {"hidden": TOKENS},
    "gated_residual": {name: SEAM[name] for name in ("x", "branch", "gate", "bias")},
    "gated_residual_norm": SEAM,
    "gelu_mlp": {"x": TOKENS, "weight1": (D, D), "bias1": (D,), "weight2": (D, D), "bias2": (D,)},
    "gram_alignment_loss": {"student": TOKENS, "teacher": TOKENS, "mask": MASK},
    "layersync_loss": {"student": TOKENS, "teacher": TOKENS, **ROWS},
    "linear_gelu": {"x": TOKENS, "weight": (D, D), "bias": (D,)},
    "modulated_layer_norm": MODULATED,
    "modulated_rms_norm": MODULATED,
    "projected_alignment_loss": {"hidden": TOKENS, "weight": (D, D), "bias": (D,), "teacher": TOKENS, **ROWS},
    "qk_norm_rope": {
        "qkv": (2, 4, 3 * D),
        "q_weight": (4,),
        "k_weight": (4,),
        "cos": (4, 4),
        "sin": (4, 4),
        "bias": (3 * D,),
    },
    "self_attention": {"qkv": (2, 4, 3 * D), "lengths": torch.tensor([4, 2]), "bias": (3 * D,)},
    "spatial_norm": {"x": TOKENS},
    "swiglu": {"x12": TOKENS},
    "swiglu_mlp": {"x": TOKENS, "weight12": (2 * D, D), "bias12": (2 * D,), "weight3": (D, D), "bias3": (D,)},
}
OPTIONS = {"self_attention": {"num_heads": 2}, "qk_norm_rope": {"num_heads": 2}}


def inputs_of(op):
    return {name: given if isinstance(given, Tensor) else torch.rand(given) for name, given in TENSORS[op].items()}


def call(op, **inputs):
    return getattr(functional, op)(**inputs, **OPTIONS.get(op, {}))


def test_every_tensor_of_every_op_is_listed():
    ops = {name for name in functional.__all__ if not inspect.isclass(getattr(functional, name))}
    assert set(TENSORS) == ops
    for op in ops:
        parameters = inspect.signature(getattr(functional, op)).parameters.values()
        assert list(TENSORS[op]) == [p.name for p in parameters if p.annotation in ("Tensor", "Tensor | None")]


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield DeviceMesh("cpu", [0])
    dist.destroy_process_group()


def quantised(x):
    return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)


def jagged(x):
    return torch.nested.nested_tensor(list(x), layout=torch.jagged)


# How one is made, and what the message says that came, and what to do.
REFUSED = {
    "sparse": (Tensor.to_sparse, r"sparse tensor \(torch\.sparse_coo\).*to_dense\(\)"),
    "compressed": (Tensor.to_sparse_csr, r"sparse tensor \(torch\.sparse_csr\).*to_dense\(\)"),
    "mkldnn": (Tensor.to_mkldnn, r"tensor of layout torch\._mkldnn.*to_dense\(\)"),
    "quantised": (quantised, r"quantised tensor \(torch\.qint8\).*dequantize\(\)"),
    "nested": (lambda x: torch.nested.nested_tensor(list(x)), r"nested tensor.*torch\.nested\.to_padded_tensor"),
    "jagged": (jagged, r"nested tensor.*torch\.nested\.to_padded_tensor"),
    "masked": (lambda x: torch.masked.masked_tensor(x, x > 0), r"MaskedTensor, which wraps.*dense tensor inside"),
    "wrapper": (lambda x: TwoTensor(x, x), r"TwoTensor, which wraps.*dense tensor inside"),
    "sharded": (None, r"DTensor, which wraps.*to_local\(\)"),
    "list": (Tensor.tolist, "must be a tensor.*got list"),
}
NO_BOOL = {"mkldnn", "quantised"}  # has no such masks
NO_VECTOR = {"compressed", "nested", "jagged"}  # nor one-dimensional biases


def refused():
    for op, tensors in TENSORS.items():
        for name, given in tensors.items():
            for kind in REFUSED:
                lacking = NO_BOOL if isinstance(given, Tensor) else set()
                vector = given.dim() == 1 if isinstance(given, Tensor) else len(given) == 1
                lacking = lacking | NO_VECTOR if vector else lacking
                if kind not in lacking:
                    yield pytest.param(op, name, kind, id=f"{op}-{name}-{kind}")


@pytest.mark.parametrize(("op", "name", "kind"), list(refused()))
@pytest.mark.filterwarnings("ignore:.*(prototype|beta|deprecated|nested)")
def test_what_is_not_dense_is_explained(op, name, kind, mesh):
    make, message = REFUSED[kind]
    inputs = inputs_of(op)
    inputs[name] = DTensor.from_local(inputs[name], mesh) if kind == "sharded" else make(inputs[name])
    with pytest.raises(TypeError, match=rf"^{op}: {name} .*{message}"):
        call(op, **inputs)


def test_a_taps_tokens_are_checked():
    inputs = inputs_of("aligned_residual_norm")
    tap = call("aligned_residual_norm", **inputs, tap=True).tap
    with pytest.raises(TypeError, match=r"^aligned_residual_norm: student\.hidden .*sparse tensor"):
        call("aligned_residual_norm", **inputs, student=tap._replace(hidden=tap.hidden.to_sparse()))
    with pytest.raises(TypeError, match=r"^aligned_residual_norm: student must be a Tap.*got Tensor"):
        call("aligned_residual_norm", **inputs, student=tap.hidden)


class Subclass(Tensor):
    """Without a word of its own in what torch does with it."""


class Named(Tensor):
    """Is asked before each function, as torchvision's images are."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


TAKEN = {
    "parameter": lambda x: nn.Parameter(x, requires_grad=False),
    "buffer": nn.Buffer,
    "subclass": lambda x: x.as_subclass(Subclass),
    "named": lambda x: x.as_subclass(Named),
    "collective": AsyncCollectiveTensor,
}


def results(outputs):
    return [t for t in torch.utils._pytree.tree_leaves(outputs) if isinstance(t, Tensor)]


@pytest.mark.parametrize("kind", TAKEN)
@pytest.mark.parametrize("op", TENSORS)
def test_dense_tensors_of_any_class_are_taken(op, kind):
    inputs = inputs_of(op)
    wrapped = {name: TAKEN[kind](x) for name, x in inputs.items()}
    for actual, expected in zip(results(call(op, **wrapped)), results(call(op, **inputs)), strict=True):
        assert torch.equal(actual.detach().as_subclass(Tensor), expected)


@pytest.mark.parametrize("op", TENSORS)
def test_shapes_are_known_without_data(op):
    inputs = inputs_of(op)
    expected = results(call(op, **inputs))
    with FakeTensorMode() as mode:
        fake = results(call(op, **{name: mode.from_tensor(x) for name, x in inputs.items()}))
    meta = results(call(op, **{name: x.to("meta") for name, x in inputs.items()}))
    # A tap's slot and factors are those of a backend, and meta tensors have none but the reference.
    count = 2 if op == "aligned_residual_norm" else None
    for outputs in (fake, meta):
        assert [(o.shape, o.dtype) for o in outputs[:count]] == [(e.shape, e.dtype) for e in expected[:count]]


@pytest.mark.parametrize("kind", ["tensor", "parameter"])
@pytest.mark.parametrize("op", TENSORS)
def test_compiles_without_graph_breaks(op, kind):
    torch._dynamo.reset()
    inputs = inputs_of(op)
    if kind == "parameter":
        inputs = {name: TAKEN["parameter"](x) for name, x in inputs.items()}
    compiled = torch.compile(lambda inputs: call(op, **inputs), fullgraph=True, backend="aot_eager")
    for actual, expected in zip(results(compiled(inputs)), results(call(op, **inputs)), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("op", TENSORS)
def test_functional_gradients(op):
    inputs = inputs_of(op)
    first = next(iter(inputs))

    def total(x):
        return sum(t.sum() for t in results(call(op, **{**inputs, first: x})))

    leaf = inputs[first].clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(total)(inputs[first]), *torch.autograd.grad(total(leaf), leaf))


def test_the_loss_of_a_teacher_names_what_came():
    align = RepresentationAlignmentLoss(D, D, projector=nn.Identity())
    hidden, teacher = torch.rand(TOKENS), torch.rand(TOKENS)
    with pytest.raises(TypeError, match=r"RepresentationAlignmentLoss: the teacher of block 8 .*sparse"):
        align({8: hidden}, teacher.to_sparse())
    with pytest.raises(TypeError, match=r"RepresentationAlignmentLoss: block 8 .*sparse"):
        align({8: hidden.to_sparse()}, teacher)

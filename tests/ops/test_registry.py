"""What holds for every op: the registry's entries are whole, and a fake tells what its kernel returns.

An op gets these tests by being declared. Its own test file, tests/ops/test_<op>.py, brings `raw_samples(backend)`,
which yields (name, arguments) of its raw ops.
"""

import importlib
import inspect

import pytest
import torch

from layersync_kernels import doctor, functional
from layersync_kernels.compiler.analysis import KINDS
from layersync_kernels.ops import raw_op, registry

from ..support.backends import mark

OPS = registry.ops()
RAW_OPS = [raw for op in OPS for raw in op.raw_ops]
SCHEMAS = {
    "attention_forward": "(Tensor q, Tensor k, Tensor v, Tensor? lengths, int heads) -> Tensor",
    "attention_backward": (
        "(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor? lengths, int heads, bool bias) -> (Tensor, Tensor)"
    ),
    "cosine_alignment_forward": (
        "(Tensor student, Tensor teacher, Tensor? weight, float eps, int reduction) -> (Tensor, Tensor, Tensor)"
    ),
    "cosine_alignment_backward": (
        "(Tensor grad, Tensor student, Tensor teacher, Tensor? weight, Tensor stats, Tensor scale, bool student_grad, "
        "bool teacher_grad) -> (Tensor, Tensor)"
    ),
    "cosine_alignment_in_place": (
        "(Tensor(a0!) student, Tensor teacher, Tensor? weight, Tensor grad, float eps, float scale, int reduction, "
        "bool summed) -> (Tensor, Tensor)"
    ),
    "dispersive_affinity": "(Tensor rows, int rank, int world, float temperature) -> Tensor",
    "dispersive_affinity_grad": (
        "(Tensor grad, Tensor rows, Tensor affinity, int rank, int world, float temperature) -> Tensor"
    ),
    "gated_residual_norm_forward": (
        "(Tensor x, Tensor? branch, Tensor? gate, Tensor? shift, Tensor? scale, Tensor? student, bool norm, bool rms, "
        "float eps, float align_eps, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "gated_residual_norm_backward": (
        "(Tensor? d_residual, Tensor? d_normed, Tensor residual, Tensor? branch, Tensor? gate, Tensor? scale, "
        "Tensor? stats, Tensor? other, Tensor? factors, bool rms, SymInt groups, bool bias) -> (Tensor, Tensor, "
        "Tensor, Tensor, Tensor, Tensor)"
    ),
    "gelu_forward": "(Tensor preactivation) -> Tensor",
    "gelu_backward": (
        "(Tensor d_activation, Tensor preactivation, bool activation, bool bias) -> (Tensor, Tensor, Tensor)"
    ),
    "linear_gelu_gemm": "(Tensor x, Tensor weight, Tensor? bias) -> (Tensor, Tensor)",
    "gelu_mlp_gemm_backward": "(Tensor d_output, Tensor weight2, Tensor preactivation) -> (Tensor, Tensor)",
    "gelu_mlp_gemm_recompute": "(Tensor d_output, Tensor weight2, Tensor preactivation) -> (Tensor, Tensor)",
    "gram_alignment": (
        "(Tensor student, Tensor teacher, Tensor? mask, float margin, int kind, float eps, bool gradient) "
        "-> (Tensor, Tensor)"
    ),
    "gram_alignment_strip": (
        "(Tensor difference, int diagonal, float margin, int kind, Tensor(a4!)? gradient) -> Tensor"
    ),
    "projected_alignment": (
        "(Tensor hidden, Tensor weight, Tensor? bias, Tensor teacher, Tensor? row_weight, Tensor? grad, float eps, "
        "int reduction, bool hidden_grad, bool weight_grad, bool bias_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "qk_norm_rope_forward": (
        "(Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, int heads, float eps, "
        "bool centred, bool interleaved) -> Tensor"
    ),
    "qk_norm_rope_backward": (
        "(Tensor d_q, Tensor d_k, Tensor d_v, Tensor? qkv, Tensor? q_weight, Tensor? k_weight, Tensor? cos, "
        "Tensor? sin, float eps, bool centred, bool interleaved, bool weights, bool bias) -> (Tensor, Tensor, Tensor)"
    ),
    "spatial_norm": "(Tensor x, float alpha, float eps) -> Tensor",
    "swiglu_forward": "(Tensor x12, bool gelu, bool interleaved) -> Tensor",
    "swiglu_backward": (
        "(Tensor grad, Tensor x12, bool gelu, bool interleaved, bool output, bool bias) -> (Tensor, Tensor, Tensor)"
    ),
}
"""What the compiled libraries register kernels for: a change here is a change of every kernel's signature."""


def each(entries):
    return [pytest.param(entry, id=entry.name) for entry in entries]


@pytest.mark.parametrize("op", each(OPS))
def test_an_op_has_a_reference_and_kernels_for_each_of_its_backends(op):
    assert inspect.getdoc(op.reference)
    having = {backend for raw in op.raw_ops for backend in raw.overloads}
    assert having - set(op.routes) == set(op.backends or (raw_op.LIBRARY,))
    assert registry.find(op.name) is op


@pytest.mark.parametrize("op", each(OPS))
def test_the_functions_of_an_op_take_a_backend_where_it_has_any(op):
    for name in op.functions:
        assert registry.find(name) is op
        assert ("backend" in inspect.signature(getattr(functional, name)).parameters) == bool(op.backends)


def test_every_public_function_is_served_by_an_op():
    functions = {name for name in functional.__all__ if inspect.isfunction(getattr(functional, name))}
    plain = {"cosine_loss"}  # of cosines that another op has made
    assert functions - plain == {name for op in OPS for name in op.functions}


@pytest.mark.parametrize("op", each(OPS))
def test_doctor_has_a_row_for_every_device(op):
    rows = [row for row in doctor.choices() if row[0] == op.name]
    assert {device for _, device, *_ in rows} == {"cpu", "cuda"}
    for _, _, _, backend, reason in rows:
        assert backend in (*op.backends, "reference", "library", "-")
        assert reason


@pytest.mark.parametrize("raw", each(RAW_OPS))
def test_a_raw_op_has_a_kind_and_every_overload_its_schema(raw):
    assert raw.kind in (*KINDS, registry.COMPOSITE)
    for backend, overload in raw.overloads.items():
        assert str(overload._schema) == f"{overload.name()}{raw.schema}"
        assert registry.find_raw(overload.name()) is raw
        if backend in raw.python:
            assert callable(raw.implementation(backend))


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_schemas_are_those_of_the_compiled_kernels(name):
    assert {raw.name: raw.schema for raw in RAW_OPS}[name] == SCHEMAS[name]


CASES = [
    pytest.param(op, *mark(backend).values, marks=mark(backend).marks, id=f"{op.name}-{backend}")
    for op in OPS
    for backend in op.backends or (raw_op.LIBRARY,)
]


@pytest.mark.parametrize(("op", "backend"), CASES)
def test_a_fake_tells_what_the_kernel_returns(op, backend):
    """With torch's other checks of a custom op: its schema tells what is written to, AOTAutograd can trace it."""
    samples = importlib.import_module(f"{__package__}.test_{op.name}").raw_samples
    overloads = {raw.name: raw.overloads[backend] for raw in op.raw_ops if backend in raw.overloads}
    seen = set()
    for name, arguments in samples(backend):
        torch.library.opcheck(overloads[name], arguments)
        seen.add(name)
    assert seen == set(overloads)


def test_a_name_is_served_once():
    reference = OPS[0].reference
    with pytest.raises(ValueError, match="op mine: layersync_loss is served by op cosine_alignment already"):
        registry.register(registry.Op("mine", ("layersync_loss",), reference))
    assert registry.ops() == OPS


def test_ints_are_symbolic_only_where_they_follow_from_shapes():
    def fake(x: torch.Tensor, heads: int, groups: int, out: torch.Tensor | None) -> torch.Tensor:
        return x

    assert raw_op.infer_schema(fake, mutates=("out",), symbolic=("groups",)) == (
        "(Tensor x, int heads, SymInt groups, Tensor(a3!)? out) -> Tensor"
    )

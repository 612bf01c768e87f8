"""The proof that a block computes what the published one computes, before a fused block takes its place.

Values at some points say nothing about others, so three things are looked at beside them. The ops that a block runs: no
op of the published block decides anything by values, so that a clamp, a mask or a branch on a tensor shows wherever it
begins to act. The sizes that its Python code looks at: a trace with symbolic numbers of samples and tokens tells. And
what it leaves behind: random numbers drawn, attributes set. Modes, dtypes and some sizes and magnitudes are tried.
docs/reliability.md says what cannot be seen from here.
"""

from __future__ import annotations

import ast
import copy
import inspect
import itertools
import math
import pickle
import random
import sys
import textwrap
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..modules.published import SiTBlock
from .parts import assembled, sizes
from .rotary import tables, with_tables

MODULE_STATE = frozenset(vars(nn.Module()))

# Samples and tokens: one, odd ones, and more than the tiles and windows of 64, 128 and 256 that attention is cut into.
_SIZES = ((2, 16), (1, 1), (5, 3), (33, 2), (3, 65), (1, 130), (1, 257))
# Of tokens, condition, incoming gradient. Small tokens show where LayerNorm has its eps, gradients what a hook clips.
_MAGNITUDES = ((1.0, 1.0, 1.0), (1e-3, 1e-3, 1e-3), (1e3, 10.0, 1e3), (1e3, 1.0, 1e-3))
# Of the largest value. In fp64 other ways of writing the same block differ by 1e-15, a LayerNorm in fp32 by 1e-7, GELU
# without the tanh by 1e-4; elsewhere by their own roundings, 1e-6, 1e-2 and 1e-3, and a wrong block by more than all.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 8e-2, torch.float16: 2e-2}

# What the published block runs, or another way of writing it: views, and smooth functions. Their gradients' come along.
_OPS = frozenset(
    (
        "t", "transpose", "permute", "view", "_unsafe_view", "reshape", "expand", "unsqueeze", "squeeze",
        "select", "slice", "split", "split_with_sizes", "unbind", "narrow", "cat", "stack", "clone", "copy_",
        "contiguous", "detach", "alias", "_to_copy", "lift_fresh", "addmm", "mm", "bmm", "baddbmm", "linear",
        "matmul", "add", "add_", "sub", "sub_", "rsub", "mul", "mul_", "div", "div_", "neg", "addcmul",
        "addcmul_", "pow", "square", "sqrt", "rsqrt", "exp", "reciprocal", "sum", "mean", "var", "var_mean",
        "std", "native_layer_norm", "_softmax", "_safe_softmax", "_scaled_dot_product_flash_attention_for_cpu",
        "gelu", "silu", "silu_", "sigmoid", "sigmoid_", "tanh", "zeros", "zeros_like", "ones", "ones_like",
        "new_zeros", "empty", "empty_like", "new_empty_strided", "full_like", "scalar_tensor",
    )
)  # fmt: skip

_PUBLISHED = """
def forward(self, x, c):
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
    x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
    x = x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
    return x
"""


class _DifferenceError(Exception): ...


class Verdict(NamedTuple):
    """What the proof found.

    Attributes:
        difference: how the block differs from the published one; None: in nothing that was tried.
        doubt: why it may differ all the same; None: it is proven.
    """

    difference: str | None = None
    doubt: str | None = None


def examine(block: nn.Module, ropes: Sequence[nn.Module | None] = (None,)) -> Verdict:
    """Compare a block built from the published parts with the published block.

    Copies with random parameters run on the CPU, without the block's hooks; random states stay what they were.

    Args:
        block: to be examined.
        ropes: what the model may give it as its third argument, each of which is tried with tables of other sizes.
    """
    try:
        with _apart() as drawn:
            given = _stand_in(block)
            own = {p.dtype for p in block.parameters()}
            doubts = [doubt for rope in ropes for doubt in _tried(given, own, drawn, rope)]
            doubts += [*_overrides(block), *(doubt for rope in ropes for doubt in _decides_by_size(given, rope))]
    except _DifferenceError as found:
        return Verdict(difference=str(found))
    except Exception as error:  # whatever somebody else's forward raises
        return Verdict(difference=f"trying it on the CPU failed: {type(error).__name__}: {error}")
    return Verdict(doubt=next(iter(doubts), None))


# ---- what a try must neither depend on nor change


@contextmanager
def _apart() -> Iterator[Callable[[], str | None]]:
    """Grad mode, autocast and compilation of the caller are off, random states restored; yields who drew from them."""
    before = _random_states()
    plain = {name: _plain(state) for name, state in before.items()}

    def drawn() -> str | None:
        return next((name for name, state in _random_states().items() if _plain(state) != plain[name]), None)

    with ExitStack() as stack:
        stack.callback(_restore, before)
        stack.enter_context(torch.inference_mode(False))  # which enables gradients
        stack.enter_context(torch.autocast("cpu", enabled=False))
        if "torch._dynamo" in sys.modules:  # a compiled forward is tried as it is written
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield drawn


def _random_states() -> dict[str, Any]:
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "random": random.getstate()}
    if "numpy" in sys.modules:
        states["numpy.random"] = sys.modules["numpy"].random.get_state()
    if torch.cuda.is_initialized():
        states["torch.cuda"] = torch.cuda.get_rng_state_all()
    return states


def _restore(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    random.setstate(states["random"])
    if "numpy.random" in states:
        sys.modules["numpy"].random.set_state(states["numpy.random"])
    if "torch.cuda" in states:
        torch.cuda.set_rng_state_all(states["torch.cuda"])


def _plain(state: Any) -> Any:
    if isinstance(state, list | tuple):
        return [_plain(part) for part in state]
    return state.tolist() if hasattr(state, "tolist") else state


class _Ops(TorchDispatchMode):
    """Finds the first op that the published block has no use for."""

    odd: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not (func.namespace == "aten" and (name in _OPS or "_backward" in name)):
            self.odd = self.odd or f"{func.namespace}::{name}"
        return func(*args, **(kwargs or {}))


class _Marks:
    """What the modules of a block hold, so that a change shows."""

    def __init__(self, block: nn.Module) -> None:
        self._held: list[Any] = []  # an id is its owner's as long as it lives
        self._marks = {
            f"{path}.{key}".removeprefix("."): self._mark(value, 0)
            for path, module in block.named_modules()
            for key, value in vars(module).items()
            if key != "training"
        }

    def _mark(self, value: Any, depth: int) -> Any:
        self._held.append(value)
        if isinstance(value, Tensor):
            return id(value), value._version
        if isinstance(value, nn.Module | type | types.FunctionType | types.ModuleType) or depth > 4:
            return id(value)
        if isinstance(value, dict):
            return [(key if isinstance(key, str) else id(key), self._mark(v, depth + 1)) for key, v in value.items()]
        if isinstance(value, list | tuple | set | frozenset):
            return [self._mark(v, depth + 1) for v in value]
        if hasattr(value, "__dict__") and not isinstance(value, random.Random):
            return id(value), self._mark(vars(value), depth + 1)
        try:
            return pickle.dumps(value)  # numbers, strings, generators of random numbers
        except Exception:
            return id(value)

    def changed(self, block: nn.Module) -> list[str]:
        """The attributes that are no longer what they were."""
        old, new = self._marks, _Marks(block)._marks
        return sorted(name for name in old | new if old.get(name) != new.get(name))


# ---- what is tried


class _Try(NamedTuple):
    dtype: torch.dtype
    size: tuple[int, int]
    magnitudes: tuple[float, float, float] = (1.0, 1.0, 1.0)
    training: bool = True
    grad: bool = True
    parameters: bool = False
    autocast: bool = False

    def __str__(self) -> str:
        mode = "training" if self.training else "evaluation"
        samples, tokens = self.size
        kind = f"{self.dtype}".removeprefix("torch.") + (" under bf16 autocast" if self.autocast else "")
        return f"({mode}), tried with {samples} x {tokens} tokens of magnitude {self.magnitudes[0]:g} in {kind}"


def _tries(own: set[torch.dtype]) -> Iterator[_Try]:
    exact = torch.float64
    yield _Try(exact, _SIZES[0], parameters=True)
    yield _Try(exact, _SIZES[0], parameters=True, training=False)
    for size, magnitudes in zip(_SIZES, itertools.cycle(_MAGNITUDES[1:])):
        yield _Try(exact, size, magnitudes)
        yield _Try(exact, size, magnitudes, training=False, grad=False)
    for dtype in sorted({torch.float32, torch.bfloat16, *own} - {exact}, key=str):
        yield _Try(dtype, (2, 16), parameters=True)
        for size in _SIZES[4:] if dtype in own else _SIZES[4:5]:
            yield _Try(dtype, size)
            yield _Try(dtype, size, training=False, grad=False)
        if dtype == torch.float32:
            yield _Try(dtype, (2, 16), autocast=True)
            yield _Try(dtype, (3, 65), training=False, grad=False, autocast=True)


def _stand_in(block: nn.Module) -> Any:
    """A copy on the CPU with random parameters, which takes neither the model's values nor its hooks."""
    draw = _draw(0)
    stand_ins: dict[int, object] = {
        id(parameter): nn.Parameter(draw(parameter.shape) / math.sqrt(parameter.shape[-1]))
        for parameter in block.parameters()
    }
    stand_ins |= {id(v): type(v)() for k, v in vars(block).items() if k in MODULE_STATE and k.endswith("_hooks")}
    return copy.deepcopy(block, stand_ins)


def _draw(seed: int) -> Callable[..., Tensor]:
    return partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu")


def _tried(given: Any, own: set[torch.dtype], drawn: Callable[[], str | None], rope: nn.Module | None) -> list[str]:
    """Raises at the first try whose results differ; returns what is odd about the way to equal ones."""
    doubts: list[str] = []
    published = assembled(SiTBlock, given, "none")
    positions: tuple[Any, ...] = ()
    turns: tuple[Any, ...] = ()
    draw, exact = _draw(1), [parameter.detach().clone() for parameter in given.parameters()]
    width, _, condition = sizes(given)
    for trial in _tries(own):
        for parameter, value in zip(given.parameters(), exact, strict=True):
            if parameter.dtype != trial.dtype:
                parameter.data = value.to(trial.dtype)
        samples, tokens = trial.size
        shapes = ((samples, tokens, width), (samples, condition), (samples, tokens, width))
        x, c, d_out = ((draw(s) * m).to(trial.dtype) for s, m in zip(shapes, trial.magnitudes, strict=True))
        if rope is not None:
            angles = draw((tokens, tables(rope)[0].shape[1]))
            positions = ((angles.cos().to(trial.dtype), angles.sin().to(trial.dtype)),)
            turns = (with_tables(rope, *positions[0]),)
        try:
            expected = _results(published, trial, x, c, d_out, *positions)
        except RuntimeError:
            if trial.dtype in (torch.float64, torch.float32):
                raise
            continue  # this CPU does not compute in that dtype
        given.train(trial.training)
        before, ops = [_Marks(module) for module in (given, *turns)], _Ops()
        with ops:
            found = _results(given, trial, x, c, d_out, *turns)
        if (generator := drawn()) is not None:
            raise _DifferenceError(f"it draws random numbers from {generator} {trial}")
        _compare(found, expected, trial)
        if ops.odd is not None and not doubts:
            doubts.append(f"it runs {ops.odd}, which the published block has no use for {trial}")
        marked = zip(before, (given, *turns), strict=True)
        if (changed := [name for marks, module in marked for name in marks.changed(module)]) and not doubts:
            doubts.append(f"its forward sets {', '.join(changed)}, which the fused block would not")
    return doubts


def _results(block: nn.Module, trial: _Try, x: Tensor, c: Tensor, d_out: Tensor, *rope: Any) -> dict[str, Tensor]:
    """The output and, with grad, gradients."""
    block.train(trial.training)
    leaves = [tensor.requires_grad_(trial.grad) for tensor in (x, c)]
    with torch.set_grad_enabled(trial.grad):
        inputs = [leaf.clone() for leaf in leaves]  # what is no leaf can be changed in place
        with torch.autocast("cpu", torch.bfloat16, enabled=trial.autocast):
            out = block(*inputs, *rope)
    if not isinstance(out, Tensor):
        raise _DifferenceError(f"it returns a {type(out).__name__}, not a tensor")
    if out.shape != d_out.shape:
        raise _DifferenceError(f"its output has the shape {tuple(out.shape)}, not {tuple(d_out.shape)}")
    if any(tensor._version for tensor in inputs):
        raise _DifferenceError("it changes its inputs in place")
    results = {"output": out.detach()}
    if trial.grad:
        parameters = dict(block.named_parameters()) if trial.parameters else {}
        names = [f"gradient of {name}" for name in ("x", "c", *parameters)]
        wanted = [*leaves, *parameters.values()]
        gradients = torch.autograd.grad(out, wanted, d_out.to(out.dtype), allow_unused=True)
        zeros = (torch.zeros_like(t) if g is None else g for t, g in zip(wanted, gradients, strict=True))
        results |= dict(zip(names, zeros, strict=True))
    return results


def _compare(found: dict[str, Tensor], expected: dict[str, Tensor], trial: _Try) -> None:
    logits = max(1.0, trial.magnitudes[1]) ** 2  # they grow with the square of the condition
    tolerance = _TOLERANCES[torch.bfloat16 if trial.autocast else trial.dtype] * logits
    for name, b in expected.items():
        a = found[name]
        if a.dtype != b.dtype:
            raise _DifferenceError(f"its {name} is {a.dtype}, the published block's {b.dtype} {trial}")
        error = float((a - b).abs().max() / b.abs().max())
        if not error <= tolerance:
            raise _DifferenceError(
                f"its {name} differs from the published block's by {error:.1e} of the largest {trial}"
            )


# ---- what the values do not tell


def _overrides(block: Any) -> Iterator[str]:
    """Forwards that override another one, whose author may not know of the parts below."""
    for where, module in (("it", block), ("attn", block.attn), ("mlp", block.mlp)):
        mro = type(module).__mro__
        classes: list[Any] = [cls for cls in mro[: mro.index(nn.Module)] if {"forward", "__call__"} & vars(cls).keys()]
        if len(classes) > 1 and not ("forward" in vars(classes[0]) and _is_published(classes[0].forward)):
            yield f"{where} is a {classes[0].__qualname__}, which overrides the forward of {classes[1].__qualname__}"


def _is_published(forward: Callable[..., Any]) -> bool:
    try:
        return _canonical(inspect.getsource(forward)) in map(
            _canonical, (_PUBLISHED, _PUBLISHED.replace("dim=1", "dim=-1"))
        )
    except (OSError, TypeError, SyntaxError):
        return False


@cache
def _canonical(source: str) -> str:
    """A function's source but for its docstring, annotations and the names of its variables."""
    function: Any = ast.parse(textwrap.dedent(source)).body[0]
    if ast.get_docstring(function) is not None:
        function.body.pop(0)
    function.returns = None
    bound = {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}
    bound |= {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    names: dict[str, str] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.arg):
            node.arg, node.annotation = names.setdefault(node.arg, f"v{len(names)}"), None
        elif isinstance(node, ast.Name) and node.id in bound:
            node.id = names.setdefault(node.id, f"v{len(names)}")
    return ast.dump(function)


def _decides_by_size(given: nn.Module, rope: nn.Module | None) -> Iterator[str]:
    """What the block's Python code asks of the number of samples and tokens, traced without values."""
    from torch._dynamo.source import ConstantSource
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

    dtype, (width, _, condition) = next(given.parameters()).dtype, sizes(given)
    for training in (True, False):
        shapes = ShapeEnv()

        def count(name: str, example: int, shapes: ShapeEnv = shapes) -> Any:
            source = ConstantSource(name)
            symbol = shapes.create_symbol(example, source, DimDynamic.DYNAMIC)
            return shapes.create_symintnode(symbol, hint=example, source=source)

        samples, tokens = count("samples", 5), count("tokens", 23)
        given.train(training)
        try:
            with FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True), torch.set_grad_enabled(training):
                x = torch.empty(samples, tokens, width, dtype=dtype, device="cpu", requires_grad=training)
                c = torch.empty(samples, condition, dtype=dtype, device="cpu", requires_grad=training)
                if rope is None:
                    out = given(x, c)
                else:
                    table = torch.empty(tokens, tables(rope)[0].shape[1], dtype=dtype, device="cpu")
                    out = given(x, c, with_tables(rope, table, table.clone()))
                if training:
                    out.sum().backward()
        except Exception as error:
            yield f"tracing it for any number of tokens failed: {type(error).__name__}: {error}"
            return
        if shapes.guards:
            asked = str(shapes.guards[0].expr).replace(str(samples), "samples").replace(str(tokens), "tokens")
            yield f"what it computes depends on the number of samples or tokens: {asked}"

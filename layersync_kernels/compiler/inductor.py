"""An optional pass for torch.compile: it finds the alignment formula in any compiled graph and puts the fused op there.

    from layersync_kernels import inductor

    inductor.enable()  # before the first call of what is compiled
    transport.training_losses = torch.compile(transport.training_losses)

Off by default; `disable()` undoes it, and so does the end of a `with inductor.enable():` block. What is found, forward
and backward, for any leading dimensions, in fp32, bf16, fp16 or a mix, under autocast and inside of checkpoints:

    (F.normalize(a, dim=-1) * F.normalize(b, dim=-1)).sum(dim=-1)  # as LayerSync, REPA and their kin write it
    F.cosine_similarity(a, b, dim=-1)

Sign, weights, mean and whatever else follows stay as they are written. Copies in front, `clone()` and `float()`, are
not made. A side that the formula differentiates keeps its gradient; one that is detached, or normalised under
`no_grad`, gets none. What does not match is left alone: another dimension or norm, shapes that broadcast, an eps above
1e-6, normalised tokens with further uses, tensors that are modified in place, functorch transforms, fp64, devices
without a fused backend.

Two differences remain. Rows whose norm is below eps (1e-12 for `normalize`, 1e-8 for `cosine_similarity`) have cosine
and gradient 0, where the gradient of `normalize` at a row of zeros is of the order of 1e12. And in half precision the
fused op rounds once, PyTorch after every step.

The formula must lie in one compiled graph with the way to the loss: compile the step, or the function that computes the
loss, not the model alone. Backends other than Inductor do not run the pass. What is compiled already keeps its code
until `torch._dynamo.reset()`. Inductor's caches on disk know by the pass's `uuid` whether a graph was rewritten and for
which backend; where torch runs the pass before it looks there (2.11), a rewritten graph's kernels are cached, its
tracing is not. Each rewritten graph is logged, at level INFO, by the logger of this module's name; one that comes
rewritten from the cache is not.

Why on the graph before autograd (`pre_grad_custom_pass`): a normalisation is still one call there, which shows its
dimension and eps, and the gradient follows by itself. In the joint graph a pattern would have to hold the decomposed
forward and backward passes, for every combination of dtypes, autocast and differentiated sides, in every version of
torch. In return the early graph may contain in-place operations and changes of the gradient mode; the fake tensors that
Dynamo leaves at its nodes show both.
"""

from __future__ import annotations

import contextlib
import logging
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

from ..functional import cosine as alignment
from ..ops import dispatch, tuning
from ..ops.cosine_alignment import op

_logger = logging.getLogger(__name__)
_MAX_EPS = 1e-6  # rows below a larger one are no longer practically zero, and PyTorch gives them another cosine

# Functions as a graph calls them, methods by name.
_COSINE_SIMILARITY = (F.cosine_similarity,)
_NORMALIZE = (F.normalize,)
_MULTIPLY = (operator.mul, torch.mul, "mul")
_SUM = (torch.sum, "sum")
_COPY = (torch.clone, torch.detach, "clone", "detach", "float", "to", "type")


def enable() -> contextlib.AbstractContextManager[Any]:
    """Register the pass for every later compilation by Inductor, behind a custom pass that is registered already.

    Calling it again changes nothing.

    Returns:
        a context manager for those who want the end of a `with` block to undo this call.
    """
    undo = contextlib.ExitStack()
    if not isinstance(config.pre_grad_custom_pass, _FuseAlignment):
        config.pre_grad_custom_pass = _FuseAlignment(config.pre_grad_custom_pass)
        undo.callback(disable)
    return undo


def disable() -> None:
    """Restore what was registered before `enable`; no effect where the pass is off or something else replaced it."""
    if isinstance(config.pre_grad_custom_pass, _FuseAlignment):
        config.pre_grad_custom_pass = config.pre_grad_custom_pass.previous


class _FuseAlignment(CustomGraphPass):
    """The pass. `previous` is what the configuration held: nothing, a pass, or (torch 2.14) several."""

    def __init__(self, previous: Any) -> None:
        self.previous = previous

    def _earlier(self) -> tuple[Callable[[Graph], None], ...]:
        if isinstance(self.previous, (list, tuple)):
            return tuple(self.previous)
        return () if self.previous is None else (self.previous,)

    def __call__(self, graph: Graph) -> None:
        for earlier in self._earlier():
            earlier(graph)
        fused = []
        for node in list(graph.nodes):
            formula = _match(node)
            if formula is not None:
                formula.replace()
                fused.append(str(formula))
        if fused:
            _logger.info("fused in a compiled graph: %s", "; ".join(fused))

    def uuid(self) -> Any:
        """What the rewritten graph depends on: the sources here, and the backend that runs on each device."""
        earlier = [each.uuid() if isinstance(each, CustomGraphPass) else None for each in self._earlier()]
        if None in earlier:  # a pass without identity prevents caching, here as by itself
            return None
        sources = get_hash_for_files((__file__, alignment.__file__, op.__file__))
        backends = (_fused_backend(device, torch.float32) for device in ("cpu", "cuda"))
        return sources, *backends, *tuning.digest(), *earlier


def _fused_backend(device: str, dtype: torch.dtype, tokens: Tensor | None = None) -> str | None:
    try:
        backend = dispatch.resolve("layersync_loss", "auto", device, dtype, tokens=tokens)
    except RuntimeError:  # LAYERSYNC_BACKEND names one that cannot run on this device
        return None
    return None if backend in dispatch.PLAIN else backend


def _cosine(
    first: Tensor, second: Tensor, first_grad: bool, second_grad: bool, eps: float, keepdim: bool, dtype: torch.dtype
) -> Tensor:
    """The cosine of each row: what a graph calls in place of the formula."""
    student, teacher = (first, second) if first_grad else (second, first)
    if not (first_grad or second_grad):
        student = student.detach()
    both = first_grad and second_grad
    cosine = -alignment.layersync_loss(student, teacher, reduction="none", teacher_grad=both, eps=eps)
    return (cosine.unsqueeze(-1) if keepdim else cosine).to(dtype)


class _Formula(NamedTuple):
    """The cosine of two tensors' rows, as a graph computes it."""

    result: Node
    inner: tuple[Node, ...]  # what is computed on the way, from the result back to the sides
    sides: tuple[Any, Any]
    scaled: tuple[Any, Any]  # the sides as they enter the product: these show which of them is differentiated
    eps: Any
    keepdim: bool = False

    def __str__(self) -> str:
        first, second = map(_value, self.sides)
        name = "normalize, multiply, sum" if self.inner else "cosine_similarity"
        return f"{name} of {first.dtype} and {second.dtype} {tuple(first.shape)}"

    def fits(self) -> bool:
        """Whether the fused op gives what the formula gives."""
        values = [_value(node) for node in (*self.sides, *self.scaled, self.result)]
        if any(value is None for value in values) or any(len(node.users) > 1 for node in self.inner):
            return False
        first, second, *_, result = values
        # The fused op reads the sides later than the formula did. A version counts every change in place that the graph
        # makes, so some formulas are left alone without need.
        return (
            statically_known_true(sym_eq(first.shape, second.shape))
            and first._version == second._version == 0
            and result.dtype in dispatch.FUSED_DTYPES
            and all(_fused_backend(first.device.type, value.dtype, value) for value in (first, second))
            and isinstance(self.eps, float)
            and 0 < self.eps <= _MAX_EPS
        )

    def replace(self) -> None:
        graph = self.result.graph
        sides = [_source(side) for side in self.sides]
        grads = [_value(self.result).requires_grad and _value(side).requires_grad for side in self.scaled]
        with graph.inserting_before(self.result):
            arguments = (*sides, *grads, self.eps, self.keepdim, _value(self.result).dtype)
            fused = graph.call_function(_cosine, arguments)
        fused.meta = self.result.meta.copy()
        self.result.replace_all_uses_with(fused)
        for node in (self.result, *self.inner):
            graph.erase_node(node)


def _match(node: Node) -> _Formula | None:
    """The formula that ends at a node, if the fused op can take its place."""
    formula = _cosine_similarity(node) or _normalised_product(node)
    return formula if formula is not None and formula.fits() else None


def _cosine_similarity(node: Node) -> _Formula | None:
    if not _calls(node, _COSINE_SIMILARITY):
        return None
    call = _arguments(node, x1=None, x2=None, dim=1, eps=1e-8)
    sides = call["x1"], call["x2"]
    return _Formula(node, (), sides, sides, call["eps"]) if _is_last(call["dim"], sides[0]) else None


def _normalised_product(node: Node) -> _Formula | None:
    if not _calls(node, _SUM):
        return None
    total = _arguments(node, input=None, dim=None, keepdim=False, out=None)
    product = total["input"]
    if not _calls(product, _MULTIPLY) or total["out"] is not None or not _is_last(total["dim"], product):
        return None
    units = product.args
    if len(units) != 2 or units[0] is units[1] or not all(_calls(unit, _NORMALIZE) for unit in units):
        return None
    calls = [_arguments(unit, input=None, p=2.0, dim=1, eps=1e-12, out=None) for unit in units]
    if any(call["p"] != 2 or call["out"] is not None or not _is_last(call["dim"], call["input"]) for call in calls):
        return None
    first, second = calls
    if first["eps"] != second["eps"]:
        return None
    return _Formula(node, (product, *units), (first["input"], second["input"]), units, first["eps"], total["keepdim"])


def _calls(node: Any, targets: tuple[Any, ...]) -> bool:
    return isinstance(node, Node) and node.op in ("call_function", "call_method") and node.target in targets


def _arguments(node: Node, **defaults: Any) -> dict[str, Any]:
    """The arguments of a call by name; `defaults` are in the order of the signature."""
    return {**defaults, **dict(zip(defaults, node.args, strict=False)), **node.kwargs}


def _value(node: Any) -> Any:
    """The fake tensor of a node; None for other types, which subclasses and functorch's wrappers are."""
    value = node.meta.get("example_value") if isinstance(node, Node) else None
    return value if type(value) is FakeTensor else None


def _is_last(dim: Any, node: Any) -> bool:
    value = _value(node)
    dims = tuple(dim) if isinstance(dim, (list, tuple)) else (dim,)
    return value is not None and value.dim() > 0 and dims in ((-1,), (value.dim() - 1,))


def _source(node: Node) -> Node:
    """What a node is a copy of: the fused op reads halves as they are, and needs no copy as a guard against changes."""
    while _calls(node, _COPY) and len(node.users) == 1:  # another user may be a hook, which has to see the gradient
        copy, source = _value(node), _value(node.args[0])
        if source is None or source._version or source.device != copy.device:
            break
        if copy.dtype != source.dtype and not (copy.dtype == torch.float32 and source.dtype in dispatch.FUSED_DTYPES):
            break
        node = cast(Node, node.args[0])
    return node

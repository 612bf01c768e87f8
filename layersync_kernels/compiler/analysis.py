"""Exact counts of a training step, the same on every machine: bytes moved, kernels launched, bytes kept for backward.

A dispatch mode sees every op of the forward and backward pass and counts what an ideal kernel for it would move: the
distinct elements of its tensor inputs are read once, its outputs are written once, views move nothing. The memory held
between the passes is what is alive there of all that the forward pass made, which is right for checkpointed models too.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ..ops import registry

KINDS = {
    "products": "matrix products and convolutions",
    "attention": "scaled dot-product attention",
    "rows": "norms, elementwise arithmetic, sums and all else: in a block, the adaLN boundaries",
    "gelu": "GELU and its derivative",
    "alignment": "the fused alignment loss",
    "bias": "sums over the rows of a matrix: gradients of biases",
    "layout": "copies, concatenations and fills",
    "casts": "changes of dtype",
    "weights": "casts and copies of parameters and of their gradients, whatever the batch",
}
"""What an op is counted as, by its name and by what it is given."""
_INSIDE = ("products", "attention")

PRODUCTS = {
    "addbmm", "addmm", "addmv", "baddbmm", "bmm", "convolution", "convolution_backward", "dot", "linear", "matmul",
    "mm", "mv",
}  # fmt: skip
"""Ops that multiply matrices, by their names."""

_GELU = {"gelu", "gelu_backward"}

_LAYOUT = {
    "cat", "clone", "constant_pad_nd", "copy_", "fill", "fill_", "full", "full_like", "new_full", "new_ones",
    "new_zeros", "ones", "ones_like", "select_backward", "slice_backward", "stack", "zero_", "zeros", "zeros_like",
}  # fmt: skip

# In-place ops that do not read what they overwrite.
_OVERWRITES = {"bernoulli_", "copy_", "fill_", "normal_", "random_", "uniform_", "zero_"}

# They read the rows that they return, not the whole table.
_GATHERS = {"embedding", "gather", "index", "index_select"}


class Op(NamedTuple):
    """An op as it is counted.

    Attributes:
        kind: one of `KINDS`.
        name: e.g. "aten::native_layer_norm".
    """

    kind: str
    name: str


class Moved(NamedTuple):
    """What the calls of an op moved.

    Attributes:
        kernels: calls that moved anything; each is one kernel at least.
        read, written: bytes.
    """

    kernels: int = 0
    read: int = 0
    written: int = 0

    @property
    def total(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


def _added(a: Moved, b: Moved, sign: int = 1) -> Moved:
    return Moved(*(x + sign * y for x, y in zip(a, b, strict=True)))


@dataclass(frozen=True)
class StepCount:
    """The counts of one training step, or the difference of two.

    Attributes:
        ops: everything that moved memory, by op.
        saved_bytes: alive between forward and backward pass, without parameters, inputs, the loss and `weight_bytes`.
        weight_bytes: alive there too, but of parameters alone: their copies, as autocast makes them.
    """

    ops: dict[Op, Moved] = field(default_factory=dict)
    saved_bytes: int = 0
    weight_bytes: int = 0

    def __sub__(self, other: StepCount) -> StepCount:
        differences = {
            op: _added(self.ops.get(op, Moved()), other.ops.get(op, Moved()), -1) for op in {**self.ops, **other.ops}
        }
        return StepCount(
            {op: moved for op, moved in differences.items() if any(moved)},
            self.saved_bytes - other.saved_bytes,
            self.weight_bytes - other.weight_bytes,
        )

    def kind(self, *kinds: str) -> Moved:
        """The sum over all ops of some kinds."""
        total = Moved()
        for op, moved in self.ops.items():
            if op.kind in kinds:
                total = _added(total, moved)
        return total

    @property
    def outside(self) -> Moved:
        """The sum over all ops outside of matrix products and attention."""
        return self.kind(*(kind for kind in KINDS if kind not in _INSIDE))

    @property
    def inside(self) -> Moved:
        """The sum over matrix products and attention."""
        return self.kind(*_INSIDE)


def count_step(forward: Callable[[], Tensor]) -> StepCount:
    """Run a training step, forward and backward, and count it.

    Works on any device; the counts depend on the ops that run there. An op that the library splits into several kernels
    counts as one, and one of this package that multiplies matrices counts as the ops that it calls. Gradients go to
    `.grad` as always: where there are some already, adding to them is counted too.

    Args:
        forward: runs the model and returns the loss, a 0-d tensor that requires grad, and keeps no other tensor.

    Raises:
        ValueError: the result is not such a tensor.
    """
    counter = OpCounter()
    with counter:
        loss = forward()
        if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.requires_grad:
            raise ValueError("count_step: forward() must return the loss, a 0-d tensor that requires grad")
        counter.end_forward(loss)
        loss.backward()
    return StepCount(counter.ops, counter.saved_bytes, counter.weight_bytes)


def block_count(forward_of: Callable[[int], Callable[[], Tensor]], depth: int = 2) -> StepCount:
    """What one block adds to a training step: the difference between two models that differ by a block.

    Args:
        forward_of: makes the `forward` of `count_step` for a model of so many blocks.
        depth: of the smaller model. With two or more blocks, what is peculiar to the first and the last cancels.
    """
    return count_step(forward_of(depth + 1)) - count_step(forward_of(depth))


def ideal_block(elements: int, stream: torch.dtype = torch.float32, branch: torch.dtype = torch.float32) -> StepCount:
    """What ideal kernels do in an adaLN-Zero block outside of matrix products and attention.

    Two `gated_residual_norm`, which read x and branch and write the residual and its norm, and backward read the
    gradients of both, residual and branch and write the gradients of x and branch: 4 + 6 tensors. Between the matrix
    products of the MLP a GELU over four times the width that is a pass of its own: 2 + 3 tensors. Sums over rows ride
    along. Saved are the inputs of the four matrix products (with GELU's in place of its output), of the attention, and
    of the two gates: 14 tensors.

    Args:
        elements: batch · tokens · width.
        stream: dtype of the residual stream.
        branch: dtype of what matrix products take and give: under autocast, that of autocast.
    """
    wide, half = elements * stream.itemsize, elements * branch.itemsize
    return StepCount(
        {
            Op("rows", "gated_residual_norm"): Moved(4, 2 * (3 * wide + 3 * half), 2 * (2 * wide + 2 * half)),
            Op("gelu", "gelu"): Moved(2, 12 * half, 8 * half),
        },
        saved_bytes=2 * wide + 12 * half,
    )


class OpCounter(TorchDispatchMode):
    """Counts the ops that run under it: around the forward pass, `end_forward`, around the backward pass.

    Attributes:
        ops, saved_bytes, weight_bytes: as those of `StepCount`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: dict[Op, Moved] = {}
        self.saved_bytes = self.weight_bytes = 0
        # A weak reference keeps the address of a storage from being given away, but not its memory.
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self._weights: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        raw = registry.find_raw(func.name())
        if raw is not None and raw.kind == registry.COMPOSITE:
            (backend,) = (name for name, overload in raw.overloads.items() if overload is func)
            return self.count_inside(raw.implementation(backend), func, args, kwargs)
        output = func(*args, **kwargs)
        counted = self._count(func._schema, args, kwargs, list(tensors_in(output)))
        if counted is not None:
            self.counted(*counted, func, args, kwargs, output)
        return output

    def count_inside(
        self, implementation: Callable[..., Any], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a composite op by its implementation, once more under the counter, for the ops inside."""
        with self:
            return implementation(*args, **kwargs)

    def counted(
        self, op: Op, moved: Moved, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """An op was called and moved something. What an epilogue moves beside its product is of a kind of its own."""
        raw = registry.find_raw(op.name)
        if raw is not None and raw.beside is not None:
            beside = moved_beside(raw, func, args, kwargs, output)
            extra = Op(raw.beside.kind, op.name)
            self.ops[extra] = _added(self.ops.get(extra, Moved()), beside)
            moved = _added(moved, beside, -1)
        self.ops[op] = _added(self.ops.get(op, Moved()), moved)

    def _count(
        self, schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Tensor]
    ) -> tuple[Op, Moved] | None:
        name = schema.name.rpartition("::")[2]
        inputs: list[Tensor] = []
        read: list[Tensor] = []
        written: list[Tensor] = []
        for index, argument in enumerate(schema.arguments):
            tensors = list(tensors_in(args[index] if index < len(args) else kwargs.get(argument.name)))
            inputs += tensors
            if argument.alias_info is None or not argument.alias_info.is_write:
                read += tensors
                continue
            written += tensors
            if not argument.is_out and name not in _OVERWRITES:
                read += tensors
        given = {_storage(tensor) for tensor in inputs}
        fresh = [tensor for tensor in outputs if _storage(tensor) not in given]
        of_weights = self._track(inputs, fresh)
        if name.startswith(("empty", "new_empty")):
            return None
        written += fresh
        if name.endswith("_like") or name.startswith("new_"):
            read = []
        bytes_written = _bytes(written)
        if not bytes_written:
            return None
        if name in _GATHERS:
            bytes_read = _bytes(read[1:]) + min(_bytes(read[:1]), bytes_written)
        else:
            bytes_read = _bytes(read)
        kind = "weights" if of_weights or _gradient_of_leaf() else _kind(schema.name, inputs, args, written)
        return Op(kind, schema.name), Moved(1, bytes_read, bytes_written)

    def _track(self, inputs: list[Tensor], fresh: list[Tensor]) -> bool:
        """Note what an op makes; True where it is made of parameters alone."""
        self._weights.update(_storage(tensor) for tensor in inputs if isinstance(tensor, nn.Parameter))
        of_weights = bool(inputs) and all(_storage(tensor) in self._weights for tensor in inputs)
        for tensor in fresh:
            storage = tensor.untyped_storage()
            self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            if of_weights:
                self._weights.add(storage._cdata)
        return of_weights

    def end_forward(self, *outputs: Tensor) -> None:
        """Add up what is alive of all that was made, but for the outputs."""
        gc.collect()
        given = {_storage(output) for output in outputs}
        for address, (reference, nbytes) in self._made.items():
            if reference.expired() or address in given:
                continue
            if address in self._weights:
                self.weight_bytes += nbytes
            else:
                self.saved_bytes += nbytes


def moved_beside(raw: registry.RawOp, func: Any, args: Sequence[Any], kwargs: dict[str, Any], output: Any) -> Moved:
    """What the epilogue of a product moves beside the product, in a call of it."""
    if raw.beside is None:
        return Moved()
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    read = [tensor for name in raw.beside.arguments for tensor in tensors_in(given[name])]
    return Moved(0, _bytes(read), _bytes([output[place] for place in raw.beside.results]))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of an argument or result."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensors: list[Tensor]) -> int:
    """Bytes of the distinct elements of distinct tensors."""
    distinct = {(_storage(t), t.storage_offset(), t.shape, t.stride(), t.dtype): t for t in tensors}
    return sum(_distinct_elements(tensor) * tensor.itemsize for tensor in distinct.values())


def _distinct_elements(tensor: Tensor) -> int:
    if tensor.numel() == 0:
        return 0
    count = span = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if stride != 0:
            count *= size
            span += (size - 1) * stride
    return min(count, span)  # overlapping windows span less than they count


def _kind(qualified: str, inputs: list[Tensor], args: tuple[Any, ...], written: list[Tensor]) -> str:
    raw = registry.find_raw(qualified)
    if raw is not None:
        return raw.kind
    name = qualified.rpartition("::")[2]
    if name.removesuffix("_") in PRODUCTS:
        return "products"
    if "dot_product" in name:
        return "attention"
    if name in _GELU:
        return "gelu"
    if name == "sum" and inputs[0].dim() == 2 and len(args) > 1 and list(args[1]) == [0]:
        return "bias"
    if name in ("_to_copy", "copy_") and inputs[-1].dtype != written[0].dtype:
        return "casts"
    return "layout" if name in _LAYOUT or name == "_to_copy" else "rows"


def _gradient_of_leaf() -> bool:
    """Whether the op belongs to a node of the backward pass that casts or stores the gradient of a leaf."""
    node: Any = torch._C._current_autograd_node()
    if node is not None and node.name() == "ToCopyBackward0":
        ((node, _),) = node.next_functions
    return node is not None and node.name() == "torch::autograd::AccumulateGrad"

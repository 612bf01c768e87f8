"""How tokens lie in what a block returns, and which of them are aligned."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import sys
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..modules.block import BlockOutput

Pick = int | str | Callable[[Any], Tensor] | None
Select = slice | str | Callable[[Tensor], Tensor] | None

_HIDDEN = ("hidden_states", "img", "image", "x", "last_hidden_state", "sample")


@functools.cache
def _returned_names(forward: Callable[..., Any]) -> tuple[str, ...] | None:
    """The names in `return a, b` of a function, where all such statements in it agree."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return None
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef) or definition.name != forward.__name__:
        return None  # the file has changed since it was imported
    found = set()
    for node in ast.walk(definition):
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
            found.add(tuple(element.id if isinstance(element, ast.Name) else "" for element in node.value.elts))
    return found.pop() if len(found) == 1 else None


class Layout(NamedTuple):
    """Where the tokens of a block are: `pick` finds the tensor in its output, `select` the tokens in the tensor."""

    pick: Pick = None
    select: Select = None
    token_dim: int = 1

    def check(self) -> None:
        """Raise TypeError or ValueError for what is none of the forms described in `LayerSync`."""
        if not (self.pick is None or isinstance(self.pick, int | str) or callable(self.pick)):
            raise TypeError(f"LayerSync: output={self.pick!r}; expected an index, a key, a callable or None")
        if not (isinstance(self.select, slice) or callable(self.select) or self.select in (None, "head", "tail")):
            raise TypeError(
                f"LayerSync: tokens={self.select!r}; expected a slice, 'head', 'tail', a callable or None. To drop a "
                "leading class token: tokens=slice(1, None)"
            )
        if not isinstance(self.token_dim, int):
            raise TypeError(
                f"LayerSync: token_dim={self.token_dim!r}; expected an int: 1 for (B, N, D), 0 for (N, B, D)"
            )

    def find(self, output: Any, block: str, module: nn.Module) -> Tensor:
        """The tensor of hidden tokens in a block's output, as the block laid it out.

        Raises:
            TypeError: no floating-point tensor there.
            ValueError: several that could be it; a DTensor.
        """
        key = self._key(output, block, module)
        if key is None:
            tensor = self.pick(output) if callable(self.pick) else output
        else:
            try:
                tensor = getattr(output, key) if isinstance(key, str) and hasattr(output, key) else output[key]
            except (IndexError, KeyError, TypeError) as error:
                raise ValueError(
                    f"LayerSync: {block} returns {_describe(output)}; there is no output={key!r}"
                ) from error
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dim() < 2:
            raise TypeError(
                f"LayerSync: {block} returns {_describe(output)}; expected hidden tokens (B, N, D), got "
                f"{_describe(tensor)}. Say with output= where they are, or align another block"
            )
        tensors = sys.modules.get("torch.distributed.tensor")  # importing it costs more than all of ours
        if tensors is not None and isinstance(tensor, tensors.DTensor):
            raise ValueError(
                f"LayerSync: {block} returns a DTensor {tuple(tensor.shape)} with placements {tensor.placements}; give "
                "output=lambda hidden: hidden.to_local() where every rank may align its own tokens, else .full_tensor()"
            )
        return tensor

    def _key(self, output: Any, block: str, module: nn.Module) -> int | str | None:
        """The index or name of the hidden tokens in a block's output; None: the output itself, or a callable's."""
        if callable(self.pick):
            return None
        if self.pick is not None:
            return self.pick
        if isinstance(output, Tensor):
            return None
        if isinstance(output, BlockOutput):
            raise ValueError(
                f"LayerSync: {block} leaves its output to the next block's first pass; this model hands back hidden "
                "states itself: prediction, states = model(..., capture=loss.captures) with loss = LayerSyncLoss(...)"
            )
        items: dict[Any, Any] = {}
        if isinstance(output, Mapping):
            items = dict(output)
        elif isinstance(output, tuple | list):
            items = dict(enumerate(output))
        elif dataclasses.is_dataclass(output):
            items = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
        tensors = {k: v for k, v in items.items() if isinstance(v, Tensor) and v.is_floating_point() and v.dim() >= 2}
        if len(tensors) > 1:
            tensors = {k: v for k, v in tensors.items() if v.dim() == 3} or tensors
        if len(tensors) == 1:
            return next(iter(tensors))
        if not tensors:
            raise TypeError(
                f"LayerSync: {block} returns {_describe(output)}, with no hidden tokens (B, N, D) in it; align another "
                "block, or say with output= where they are"
            )
        names: tuple[Any, ...] | None = tuple(items)
        if isinstance(output, tuple):
            names = getattr(output, "_fields", None) or _returned_names(type(module).forward)
        for name in _HIDDEN:
            if names is not None and names.count(name) == 1 and len(names) == len(items):
                return list(items)[names.index(name)]
        example = next(iter(tensors)) if isinstance(output, Mapping) or not isinstance(output, tuple | list) else 1
        raise ValueError(
            f"LayerSync: {block} returns {_describe(output)}, several that could be the hidden tokens; say which, as "
            f"in output={example!r} (diffusers' dual-stream blocks mostly return (text, image), Flux's (image, text))"
        )

    def put(self, output: Any, tensor: Tensor, block: str, module: nn.Module) -> Any:
        """The output with its hidden tokens replaced.

        Raises:
            TypeError: the output is found by a callable, or of a type that cannot be rebuilt.
        """
        if isinstance(output, Tensor):
            return tensor
        key = self._key(output, block, module)
        if isinstance(output, tuple) and isinstance(key, int):
            items = [tensor if index == key % len(output) else item for index, item in enumerate(output)]
            return type(output)(*items) if hasattr(output, "_fields") else tuple(items)
        if isinstance(output, list | dict) and key is not None:
            copied: Any = output.copy()
            copied[key] = tensor
            return copied
        raise TypeError(
            f"LayerSync: {block} returns {_describe(output)}; mode='reentrant' and projector= need a "
            "tensor, tuple, list or dict"
        )

    def arrange(self, tensor: Tensor, block: str) -> Tensor:
        """The tensor as (B, N, ..., D), a view; (N, D) for packed tokens without a batch.

        Raises:
            ValueError: it does not have so many dimensions.
        """
        if tensor.dim() == 2:
            return tensor
        if not -tensor.dim() <= self.token_dim < tensor.dim() - 1:
            raise ValueError(
                f"LayerSync: {block} returns {tuple(tensor.shape)}; token_dim={self.token_dim} is not there"
            )
        return tensor.movedim(self.token_dim, 1)


def both_layouts(
    output: Pick | tuple[Pick, Pick], tokens: Select | tuple[Select, Select], token_dim: int | tuple[int, int]
) -> tuple[Layout, Layout]:
    """The student's and the teacher's layout from arguments of `LayerSync`, for both or for each.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a tuple of other than two; "head" or "tail" for one side alone.
    """
    sides: list[list[Any]] = []
    for name, value in (("output", output), ("tokens", tokens), ("token_dim", token_dim)):
        if isinstance(value, tuple) and len(value) != 2:
            raise ValueError(f"LayerSync: {name}={value!r}; a tuple holds the student's and the teacher's, two values")
        sides.append(list(value) if isinstance(value, tuple) else [value, value])
    student, teacher = (Layout(*side) for side in zip(*sides, strict=True))
    for layout in (student, teacher):
        layout.check()
    if student.select != teacher.select and any(layout.select in ("head", "tail") for layout in (student, teacher)):
        raise ValueError(f"LayerSync: tokens={tokens!r}; 'head' and 'tail' are for both sides")
    return student, teacher


class Aligned(NamedTuple):
    """Student and teacher tokens of a pair, of equal shape, and the weights that belong to them."""

    student: Tensor
    teacher: Tensor
    mask: Tensor | None
    token_weight: Tensor | None


def align_tokens(
    pair: str,
    student: Tensor,
    teacher: Tensor,
    layouts: tuple[Layout, Layout],
    mask: Tensor | None = None,
    token_weight: Tensor | None = None,
) -> Aligned:
    """Bring the tokens of a pair together; a mask or weight of all tokens of a side is cut like that side.

    Raises:
        ValueError: token counts or widths that differ.
    """
    sides = [layout.arrange(tensor, pair) for layout, tensor in zip(layouts, (student, teacher), strict=True)]
    counts = [_count(side) for side in sides]
    common = min(counts)
    weights = [mask, token_weight]
    for index, (layout, count) in enumerate(zip(layouts, counts, strict=True)):
        select = layout.select
        if select == "head":
            select = slice(common)
        elif select == "tail":
            select = slice(count - common, None)
        if isinstance(select, slice):
            axis = 0 if sides[index].dim() == 2 else 1
            sides[index] = _cut(sides[index], axis, select)
            if _count(sides[index]) < count:
                weights = [w if w is None or _extent(w, axis) != count else _cut(w, axis, select) for w in weights]
        elif callable(select):
            sides[index] = select(sides[index])
    student, teacher = sides
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"LayerSync {pair}: the student has {student.shape[-1]} channels and the teacher {teacher.shape[-1]}; give "
            "a projector (a submodule of the model) that maps one width to the other"
        )
    if student.shape != teacher.shape:
        raise ValueError(
            f"LayerSync {pair}: the student's tokens are {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}; "
            "drop extra tokens with tokens=slice(n, None), or a tuple of two slices, or align the last or first ones "
            "that both have with tokens='tail' or 'head'"
        )
    if teacher.device != student.device:  # blocks on several devices, or activations offloaded
        teacher = teacher.to(student.device, non_blocking=True)
    return Aligned(student, teacher, *weights)


def _count(tokens: Tensor) -> int:
    return tokens.shape[0 if tokens.dim() == 2 else 1]


def _extent(weight: Tensor, axis: int) -> int | None:
    return weight.shape[axis] if weight.dim() > axis else None


def _cut(tensor: Tensor, axis: int, select: slice) -> Tensor:
    return tensor[select] if axis == 0 else tensor[:, select]


def _describe(output: Any) -> str:
    """What a block returned, in words."""
    if isinstance(output, Tensor):
        return f"a {output.dtype} tensor {tuple(output.shape)}"
    if isinstance(output, tuple | list):
        return f"{type(output).__name__} ({', '.join(_describe(item) for item in output)})"
    if isinstance(output, Mapping):
        return f"{type(output).__name__} {{{', '.join(f'{k}: {_describe(v)}' for k, v in output.items())}}}"
    return type(output).__name__

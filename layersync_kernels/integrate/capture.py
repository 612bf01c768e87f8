"""What the hooks of a pair keep: the outputs of its two blocks in the last forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import reentrant
from .blocks import Block, unwrapped
from .tokens import Layout

# Tensor's id → its version, while the output that holds the tensors is kept. None: new tensors of a compiled graph.
Versions = dict[int, int] | None


class Captured(NamedTuple):
    """What the hooks of a pair have seen since it was forgotten last.

    Attributes:
        hidden: what the student returned; its tokens, projected or detached, where the hook had to look at them.
        target: what the teacher returned after that.
        hidden_versions: of the tensors in `hidden`, see `_versions`.
        target_versions: of those in `target`.
        repeated: another forward pass began before this one's loss.
        without_grad: a pass came by without grad, as in validation.
        reentrant: a pass came by in which a reentrant checkpoint switched grad off.
    """

    hidden: Any = None
    target: Any = None
    hidden_versions: Versions = None
    target_versions: Versions = None
    repeated: bool = False
    without_grad: bool = False
    reentrant: bool = False


class CapturedPair:
    """A pair of blocks with what they returned in the last forward pass. Its methods are the hooks.

    The hooks only keep references, so that they may run any number of times, in graphs and in recomputations. Every
    attribute that they read is a guard of a compiled graph, hence flags and no counters.
    """

    def __init__(
        self,
        student: Block,
        teacher: Block,
        layouts: tuple[Layout, Layout],
        projector: nn.Module | None,
        entry_key: int | None,
    ) -> None:
        self.active = True
        self.student, self.teacher, self.layouts = student, teacher, layouts
        self.projector, self.entry_key = projector, entry_key
        self.forget()

    def forget(self) -> None:
        """Drop what was captured."""
        self.restore(Captured())

    def captured(self) -> Captured:
        """What was captured, for `restore`."""
        return Captured(
            self.hidden,
            self.target,
            self.hidden_versions,
            self.target_versions,
            self.repeated,
            self.without_grad,
            self.reentrant,
        )

    def restore(self, captured: Captured) -> None:
        """Go back to what was captured then."""
        self.hidden, self.target = captured.hidden, captured.target
        self.hidden_versions, self.target_versions = captured.hidden_versions, captured.target_versions
        self.repeated, self.without_grad, self.reentrant = (
            captured.repeated,
            captured.without_grad,
            captured.reentrant,
        )

    def check_unwritten(self, student: Tensor, teacher: Tensor) -> None:
        """Check that the tensors found in what was captured still hold what their blocks returned.

        Raises:
            RuntimeError: one was changed in place since.
        """
        for role, block, tokens, output, before in (
            ("student", self.student, student, self.hidden, self.hidden_versions),
            ("teacher", self.teacher, teacher, self.target, self.target_versions),
        ):
            if _written(tokens, output, before):
                raise RuntimeError(
                    f"LayerSync: what {role} {block} returned was changed in place after the block (x += y, relu_), "
                    "itself or through a tensor that shares its memory, and the loss would be that of the changed "
                    "values. Write that op out of place (x = x + y), or have the block return x.clone()"
                )

    def __getstate__(self) -> dict[str, Any]:
        # Copies of the model (EMA) and pickles of it carry hooks that do nothing, and none of the activations.
        return {"active": False}

    def on_student(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook of the student block."""
        if not self.active or not self._counts(args):
            return None
        again = recomputing()
        hidden = output
        if self.projector is not None or self.entry_key is not None:
            hidden = self.layouts[0].find(output, self.student.path, unwrapped(module))
        if self.projector is not None:
            hidden = self.projector(hidden)
        elif self.entry_key is not None:
            if torch.is_grad_enabled():
                entered = reentrant.entry(hidden, self.entry_key)
                output = self.layouts[0].put(output, entered, self.student.path, unwrapped(module))
            hidden = hidden.detach()
        if not again:
            if self.target is not None:
                self.repeated = True
            self.hidden, self.target = hidden, None  # never one pass's student with another one's teacher
            self.hidden_versions = _versions(hidden, args)
        return output if self.entry_key is not None else None

    def on_teacher(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook of the teacher block."""
        if not self.active or not self._counts(args):
            return None
        if self.projector is None and self.entry_key is None:
            if not recomputing():
                self.target, self.target_versions = output, _versions(output, args)
            return None
        target = self.layouts[1].find(output, self.teacher.path, unwrapped(module))
        if not recomputing():
            self.target = target.detach() if self.entry_key is not None else target
            self.target_versions = _versions(self.target, args)
        if self.projector is None or self.hidden is None:
            return None
        # DDP looks for used parameters from the model's output, where the projector is not; this puts it there.
        linked = Linked.apply(target, self.hidden)
        return self.layouts[1].put(output, linked, self.teacher.path, unwrapped(module))

    def _counts(self, args: tuple[Any, ...]) -> bool:
        """Whether a forward pass is one that trains."""
        if torch.is_grad_enabled():
            return True
        if any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            self.reentrant = True
            return self.entry_key is not None
        self.without_grad = True
        return False


def _versions(output: Any, args: tuple[Any, ...]) -> Versions:
    """How often each tensor of a block's output was written to.

    In a compiled graph that means nothing: None, as it returns new tensors; {}, where it returns an input changed.
    """
    if torch.compiler.is_compiling():
        return {} if any(output is arg for arg in args) else None
    return {id(tensor): tensor._version for tensor in _tensors(output)}


def _tensors(output: Any, depth: int = 3) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if not output.is_inference():  # such a tensor counts nothing
            yield output
        return
    items: Any = output
    if isinstance(output, Mapping):
        items = output.values()
    elif not isinstance(output, tuple | list):
        items = vars(output).values() if hasattr(output, "__dict__") else ()
    for item in items if depth else ():
        yield from _tensors(item, depth - 1)


def _written(tensor: Tensor, output: Any, before: Versions) -> bool:
    """Whether a tensor that was found in a block's output has been written to since the hook saw the output.

    A tensor that was made of the output, by `output=`, is taken for the one that it is a view of, or for the only one
    that there is.
    """
    if before is None:
        return _written_after_graph(tensor)
    kept = {id(t): t for t in _tensors(output)}
    source = kept.get(id(tensor))
    if source is None:
        base = tensor if tensor._base is None else tensor._base
        views = [t for t in kept.values() if t is base or t._base is base]
        source = next(iter(views or (kept.values() if len(kept) == 1 else ())), None)
    return source is not None and before.get(id(source), source._version) != source._version


def _written_after_graph(tensor: Tensor) -> bool:
    """Whether ops in place stand between a tensor and the compiled graph that returned it, with version 0."""
    node = tensor.grad_fn
    for _ in range(0 if tensor.is_inference() else tensor._version):
        if node is None or "CompiledFunction" in node.name():
            return False
        node = node.next_functions[0][0]
    return node is not None and tensor._version > 0 and "CompiledFunction" in node.name()


def recomputing() -> bool:
    """Whether a backward pass is under way: a checkpoint runs its block again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class Linked(torch.autograd.Function):
    """The first tensor, in a graph that also leads to the second, with no gradient for that."""

    @staticmethod
    def forward(tensor: Tensor, other: Tensor) -> Tensor:
        """The first tensor."""
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing to keep."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The gradient goes to the first tensor alone."""
        return grad, None

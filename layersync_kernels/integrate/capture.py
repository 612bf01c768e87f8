"""What the hooks of a pair keep: the outputs of its two blocks in the last forward pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import reentrant
from .blocks import Block, unwrapped
from .tokens import Layout


class Captured(NamedTuple):
    """What the hooks of a pair have seen since it was forgotten last.

    Attributes:
        hidden: what the student returned; its tokens, projected or detached, where the hook had to look at them.
        target: what the teacher returned after that.
        repeated: another forward pass began before this one's loss.
        without_grad: a pass came by without grad, as in validation.
        reentrant: a pass came by in which a reentrant checkpoint switched grad off.
    """

    hidden: Any = None
    target: Any = None
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
        return Captured(self.hidden, self.target, self.repeated, self.without_grad, self.reentrant)

    def restore(self, captured: Captured) -> None:
        """Go back to what was captured then."""
        self.hidden, self.target, self.repeated, self.without_grad, self.reentrant = captured

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
        return output if self.entry_key is not None else None

    def on_teacher(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook of the teacher block."""
        if not self.active or not self._counts(args):
            return None
        if self.projector is None and self.entry_key is None:
            if not recomputing():
                self.target = output
            return None
        target = self.layouts[1].find(output, self.teacher.path, unwrapped(module))
        if not recomputing():
            self.target = target.detach() if self.entry_key is not None else target
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

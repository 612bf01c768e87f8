"""`LayerSync`: binds the alignment loss to the blocks of a model that somebody else wrote."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from ..losses.layersync import LayerSyncLoss
from ..losses.pairs import default_pair
from . import reentrant
from .blocks import Blocks, unwrapped
from .capture import CapturedPair
from .tokens import Pick, Select, align_tokens, both_layouts

logger = logging.getLogger(__name__)

End = int | str | nn.Module


class LayerSync(nn.Module):
    """LayerSync on a model that stays as it is: hooks keep two blocks' outputs, `loss()` aligns them.

    Make it after wrapping the model (DDP, FSDP2, torch.compile, checkpoints) and before its first forward pass; then

        sync = LayerSync(model, student=8, teacher=16, weight=0.2)
        loss = task_loss + sync.loss()   # in every step, between forward and backward

    Nothing is computed in the hooks, no forward is patched, no parameter added and no state_dict key changed. Copies of
    the model (EMA) and files of it hold hooks that do nothing.

    Args:
        model: the network, wrapped or not. It holds the hooks and is not a submodule of this module.
        student: the shallow block: its depth, counted from 1; its module path ("blocks.7", counted from 0 as Python
            does); or the module. Default: `default_pair` for the model's depth.
        teacher: the deep block, given as the student is.
        weight: λ, one for all pairs or one each.
        pairs: (student, teacher) tuples instead of one student and teacher.
        mode: "hooks"; or "reentrant" (once called "tap", which is still taken), for models under reentrant checkpoints
            alone: the alignment's gradient, computed in `loss()`, joins that of the student in its backward pass (one
            more hidden state in memory; `loss()` must be backpropagated together with the task's loss; no projector,
            no reduction="none", no teacher_grad).
        blocks: path, or paths in order, of what holds the blocks, where it is not found by itself.
        output: which part of a block's output holds the hidden tokens: None finds it in a tensor, a tuple, a mapping or
            a dataclass with one candidate, and in pairs of streams whose names say so; else an index, a key or
            attribute, or a callable. A 2-tuple gives the student's and the teacher's.
        tokens: None for all tokens; a slice, as slice(1, None) without a leading class token; "head" or "tail" for as
            many first or last tokens as both blocks have; a callable (B, N, D) → (B, n, D). A 2-tuple as above.
        token_dim: dimension of the tokens in (B, N, D), (N, B, D) or (B, T, P, D), where T serves. A 2-tuple as above.
            Tokens (N, D) without a batch, as packed sequences are, need none.
        projector: a module applied to the student's tokens (last dimension), part of the model so that the optimiser,
            DDP, FSDP, EMA and checkpoints see it; or its path. Where steps are skipped, DDP needs
            find_unused_parameters=True.
        schedule: "constant"; or "linear" or "cosine" from 1 at `start_step` to 0 at `stop_step`. Set `step` before each
            forward pass where anything depends on it.
        start_step: where a decay begins.
        stop_step: from this step on the loss is off; None: never, for "constant" alone.
        every: align in every n-th step only (those divisible by n), with unchanged weight.
        teacher_grad: whether the gradient flows into the teacher too.
        eps: a row whose norm is under it has cosine 0 and gradient 0.
        backend: of the loss: "auto", "reference", "cpp", "triton", "cuda" or "compile".

    Attributes:
        value: what `loss()` returned last, detached, without a host synchronisation; None before.
        cosine: mean cosine of each pair, detached 0-d tensors keyed "student:teacher"; NaN before the first `loss()`.
        enabled: False: hooks keep nothing, `loss()` is 0.
        weight: λ; may be changed at any time.
        step: the trainer's step, from 0, for schedules.

    Raises:
        ValueError: blocks that are not there or ambiguous, a student at or behind its teacher, a projector outside of
            the model, settings that exclude each other.
        TypeError: arguments of the wrong kind.

    Source: the LayerSync paper, arXiv:2510.12581.
    """

    value: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        student: End | None = None,
        teacher: End | None = None,
        weight: float | Sequence[float] = 0.2,
        *,
        pairs: Sequence[tuple[End, End]] | None = None,
        mode: str = "hooks",
        blocks: str | Sequence[str] | None = None,
        output: Pick | tuple[Pick, Pick] = None,
        tokens: Select | tuple[Select, Select] = None,
        token_dim: int | tuple[int, int] = 1,
        projector: nn.Module | str | None = None,
        schedule: str = "constant",
        start_step: int = 0,
        stop_step: int | None = None,
        every: int = 1,
        teacher_grad: bool = False,
        eps: float = 1e-6,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        mode = "reentrant" if mode == "tap" else mode
        if mode not in ("hooks", "reentrant"):
            raise ValueError(f"LayerSync: unknown mode={mode!r}; expected 'hooks' or 'reentrant'")
        if mode == "reentrant" and (projector is not None or teacher_grad):
            raise ValueError("LayerSync: mode='reentrant' has no projector and no teacher_grad; use mode='hooks'")
        self.mode = mode
        found = Blocks(model, blocks)
        ends = [(found.find(s), found.find(t)) for s, t in self._ends(found, student, teacher, pairs)]
        self.alignment = LayerSyncLoss(
            [(s.key, t.key) for s, t in ends],
            weight,
            schedule=schedule,
            start_step=start_step,
            stop_step=stop_step,
            every=every,
            teacher_grad=teacher_grad,
            eps=eps,
            backend=backend,
        )
        layouts = both_layouts(output, tokens, token_dim)
        head = None if projector is None else _projector(model, found, projector)
        self._pairs = [
            CapturedPair(s, t, layouts, head, reentrant.new_key() if mode == "reentrant" else None) for s, t in ends
        ]
        self._handles = [
            handle
            for pair in self._pairs
            for handle in (
                pair.student.module.register_forward_hook(pair.on_student),
                pair.teacher.module.register_forward_hook(pair.on_teacher),
            )
        ]
        parameter = next(model.parameters(), None)
        self._device = torch.device("cpu") if parameter is None else parameter.device
        self._said: set[str] = set()
        # A flag beside the handles, which Dynamo cannot look at where a whole training step is compiled.
        self._attached, self._enabled, self._copied = True, True, False
        self._step: int | None = None
        self.value = None
        for pair in self._pairs:
            number, depth = pair.teacher.number, pair.teacher.depth
            if number is not None and depth is not None and number > 0.8 * depth:
                self._say(
                    f"LayerSync: teacher {pair.teacher} is among the last fifth of the blocks, which are busy with the "
                    f"output; the method's advice is a teacher up to block {int(0.8 * depth)}",
                    stacklevel=3,
                )
        if tokens is None and (token := found.class_token(ends[0][0])) is not None:
            self._say(
                f"LayerSync: {token} is aligned too; tokens=slice(1, None) leaves it out, slice(None) asks for it",
                stacklevel=3,
            )
        logger.info("%s", self.extra_repr())

    @staticmethod
    def _ends(
        found: Blocks, student: End | None, teacher: End | None, pairs: Sequence[tuple[End, End]] | None
    ) -> Sequence[tuple[End, End]]:
        if pairs is not None:
            if student is not None or teacher is not None:
                raise ValueError("LayerSync: give student and teacher, or pairs, not both")
            if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
                raise TypeError(f"LayerSync: pairs={pairs!r}; expected (student, teacher) tuples, as in [(8, 16)]")
            return pairs
        if student is None and teacher is None:
            found.find(1)  # says why there is none
            return [default_pair(found.depth)]
        if student is None or teacher is None:
            raise ValueError("LayerSync: give both student and teacher, or none for the default of the model's depth")
        return [(student, teacher)]

    @property
    def weight(self) -> float | tuple[float, ...]:
        """λ of the pair, or of each."""
        weights = self.alignment.weights
        return weights[0] if len(set(weights)) == 1 else weights

    @weight.setter
    def weight(self, weight: float | Sequence[float]) -> None:
        self.alignment.set_weights(weight)

    @property
    def enabled(self) -> bool:
        """Whether hidden states are captured and aligned."""
        return self._enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self._enabled = bool(enabled)
        self._activate()

    @property
    def step(self) -> int | None:
        """The trainer's step, from 0; set it before the forward pass, so that skipped steps capture nothing."""
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        self._step = step
        self._activate()

    @property
    def cosine(self) -> dict[str, Tensor]:
        """Mean cosine of each pair in the last `loss()` that was not skipped; NaN before."""
        return self.alignment.cosine

    @property
    def active(self) -> bool:
        """Whether this step is aligned."""
        return self._attached and self._enabled and (self._step is None or self.alignment.active(self._step))

    def _activate(self) -> None:
        active = self.active
        for pair in self._pairs:
            pair.active = active
            if not active:
                pair.forget()

    def remove(self) -> None:
        """Take the hooks off; the model is as it was. `loss()` is 0 from now on."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._attached = [], False
        self._activate()

    def __getstate__(self) -> dict[str, Any]:
        # A copy would read the hidden states of the model that it was not made for.
        return self.__dict__ | {"_pairs": [], "_handles": [], "_copied": True}

    def forward(
        self, mask: Tensor | None = None, reduction: str = "mean", *, token_weight: Tensor | None = None
    ) -> Tensor:
        """See `loss`."""
        return self.loss(mask, reduction, token_weight=token_weight)

    def loss(
        self, mask: Tensor | None = None, reduction: str = "mean", *, token_weight: Tensor | None = None
    ) -> Tensor:
        """λ times the alignment loss of the last forward pass, summed over pairs; forgets the hidden states.

        Args:
            mask: bool, True for tokens that count: (B, N), (N,) or (B, 1), whatever `token_dim` is; for the selected
                tokens, or for all before the selection. Packed sequences: (N,). The other tokens may hold NaN: they are
                not read, and their gradient is 0. Layers that have computed with a NaN, the projector too, make NaN of
                that 0 in the gradient of their weights: they run before the mask is known.
            reduction: "mean" over the tokens; "sum" where the trainer divides by a count of its own (a mean over the
                tokens of all ranks); "none" for one value per token.
            token_weight: float, like `mask`: per sample (B, 1) for a weight by noise level; for packed sequences,
                1 / length of a token's sequence makes every sequence count alike.

        Returns:
            fp32, a 0-d tensor, or (B, N) for "none". 0 after a forward pass without grad (validation), in steps that
            the schedule skips, and where `enabled` is False.

        Raises:
            RuntimeError: no forward pass was captured; the message says why that can be. A block's output was changed
                in place after the block, which inside of one compiled graph cannot be seen.
            ValueError: tokens of student and teacher that do not fit.
            TypeError: a block returns no hidden tokens.
        """
        if self._copied:
            raise RuntimeError("LayerSync: this is a copy, without hooks; make a new LayerSync for the copied model")
        self.value = None
        try:
            loss = self._loss(mask, reduction, token_weight)
        finally:
            for pair in self._pairs:
                pair.forget()
        self.value = loss.detach()
        return loss

    def _loss(self, mask: Tensor | None, reduction: str, token_weight: Tensor | None) -> Tensor:
        if not self.active:
            return torch.zeros((), device=self._device)
        if self._step is None and self.alignment.needs_step:
            raise ValueError("LayerSync: the schedule needs to know the step: sync.step = step before the forward pass")
        if any(pair.hidden is None or pair.target is None for pair in self._pairs):
            if all(pair.hidden is None and pair.without_grad and not pair.reentrant for pair in self._pairs):
                return torch.zeros((), device=self._device)
            raise RuntimeError(self._why_nothing())
        if any(pair.repeated for pair in self._pairs):
            self._say("LayerSync: two forward passes before one loss(); the last one counts")
        hidden = [self._tokens_of(pair) for pair in self._pairs]
        for pair, (student, _) in zip(self._pairs, hidden, strict=True):
            if self.mode == "hooks" and torch.is_grad_enabled() and not student.requires_grad:
                self._say(
                    f"LayerSync: nothing up to student {pair.student} is trained, so the loss is a constant; choose a "
                    "later student, or train (LoRA) earlier blocks too"
                )
        compute = self._reentrant_loss if self.mode == "reentrant" else self._aligned
        loss = compute(hidden, mask, reduction, token_weight)
        if loss.requires_grad and not torch.compiler.is_compiling():
            loss.register_hook(self._keep_recomputations_out)
        return loss

    def _tokens_of(self, pair: CapturedPair) -> tuple[Tensor, Tensor]:
        """The tensors that hold a pair's tokens, as the blocks laid them out."""
        student, teacher = pair.hidden, pair.target
        if pair.entry_key is None and pair.projector is None:  # else the hooks had to look already
            student = pair.layouts[0].find(student, pair.student.path, unwrapped(pair.student.module))
            teacher = pair.layouts[1].find(teacher, pair.teacher.path, unwrapped(pair.teacher.module))
        if not torch.compiler.is_compiling():
            pair.check_unwritten(student, teacher)
        return student, teacher

    def _aligned(
        self, hidden: list[tuple[Tensor, Tensor]], mask: Tensor | None, reduction: str, token_weight: Tensor | None
    ) -> Tensor:
        states = {}
        for pair, (student, teacher) in zip(self._pairs, hidden, strict=True):
            name = f"{pair.student.path} <- {pair.teacher.path}"
            aligned = align_tokens(name, student, teacher, pair.layouts, mask, token_weight)
            states[pair.student.key, pair.teacher.key] = (aligned.student, aligned.teacher)
            mask, token_weight = aligned.mask, aligned.token_weight
        return self.alignment(states, step=self._step, mask=mask, token_weight=token_weight, reduction=reduction)

    def _reentrant_loss(
        self, hidden: list[tuple[Tensor, Tensor]], mask: Tensor | None, reduction: str, token_weight: Tensor | None
    ) -> Tensor:
        if not torch.is_grad_enabled():
            return self._aligned(hidden, mask, reduction, token_weight)
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "LayerSync: with mode='reentrant' call loss() outside of what torch.compile sees in one graph"
            )
        if reduction == "none":
            raise ValueError("LayerSync: mode='reentrant' gives a scalar; reduction must be 'mean' or 'sum'")
        students = {
            pair.entry_key: student.requires_grad_()  # a leaf: the hook detached it
            for pair, (student, _) in zip(self._pairs, hidden, strict=True)
            if pair.entry_key is not None
        }
        loss = self._aligned(hidden, mask, reduction, token_weight)
        return reentrant.carrier(loss, students, mean=reduction == "mean")

    def _keep_recomputations_out(self, _grad: Tensor) -> None:
        """At the end of this backward pass, forget what the hooks kept when checkpoints ran the blocks again.

        Eagerly the hooks see for themselves that a backward pass is under way; in compiled blocks they cannot.
        """
        before = [pair.captured() for pair in self._pairs]

        def restore() -> None:
            for pair, captured in zip(self._pairs, before, strict=True):
                pair.restore(captured)

        Variable._execution_engine.queue_callback(restore)

    def _why_nothing(self) -> str:
        if any(pair.reentrant for pair in self._pairs):
            return (
                "LayerSync: the blocks ran under a reentrant checkpoint, whose first pass records no graph; use "
                "checkpoint(..., use_reentrant=False), or LayerSync(..., mode='reentrant')"
            )
        for pair in self._pairs:
            if pair.hidden is not None:
                return (
                    f"LayerSync: student {pair.student} ran in the last forward pass, and teacher {pair.teacher} did "
                    "not run after it: either the pass stopped early, or the teacher comes before the student"
                )
        pair = self._pairs[0]
        return (
            f"LayerSync: nothing was captured at {pair.student} and {pair.teacher} since the last loss(). Call loss() "
            "once after each forward pass of the model that LayerSync was made for (a copy of it has no hooks), with "
            "grad enabled; and make LayerSync before the first forward pass of a compiled model, which ignores later "
            "hooks, or call torch.compiler.reset() after making it"
        )

    def _say(self, message: str, stacklevel: int = 4) -> None:
        """Warn, once; by default at the line that called `loss()`."""
        if message not in self._said:
            self._said.add(message)
            warnings.warn(message, stacklevel=stacklevel)

    def extra_repr(self) -> str:
        """What was resolved, for `print(sync)`."""
        weights = self.alignment.weights
        pairs = [f"{p.student} <- {p.teacher} x {w:g}" for p, w in zip(self._pairs, weights, strict=True)]
        return ", ".join([*pairs, f"mode={self.mode}"])


def _projector(model: nn.Module, found: Blocks, projector: nn.Module | str) -> nn.Module:
    """The projector, which has to be part of the model."""
    if isinstance(projector, str):
        return found.find(projector).module
    if not isinstance(projector, nn.Module):
        raise TypeError(f"LayerSync: projector must be a module or its path, got {type(projector).__name__}")
    if not any(module is projector for module in model.modules()):
        raise ValueError(
            "LayerSync: the projector is not part of the model, so that the optimiser, DDP and checkpoints would miss "
            "it; do model.projector = projector before all of them, then pass projector=model.projector"
        )
    return projector

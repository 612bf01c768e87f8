"""`RepresentationAlignment`: REPA's own term on a model that projects its hidden tokens by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..losses.projectors import is_mlp
from ..losses.representation import RepresentationAlignmentLoss
from .blocks import unwrapped


class RepresentationAlignment(nn.Module):
    """REPA's term on REPA's model, which stays as it is: its projectors are spared, `loss()` projects and aligns.

    Make it after wrapping the model (DDP, accelerate); then

        repa = RepresentationAlignment(model, weight=0.5)
        loss = task_loss + repa.loss(zs)   # in every step, between forward and backward

    Hooks on the projectors keep what these are given and let them run on no tokens; the model hands on zeros in the
    place of projected tokens, of which the trainer's own term is 0. No forward is patched, no parameter added and no
    state_dict key changed. Passes without grad run as before, and copies of the model (EMA) hold hooks that do nothing.

    Args:
        model: the network, wrapped or not, with a list of projectors in it. It holds the hooks and is not a submodule.
        weight: λ, of the mean over the teachers.
        projectors: the attribute of the model that lists its projectors, `nn.Sequential` of linear layers and SiLU.
        options: further keywords of `RepresentationAlignmentLoss`, as `interpolate` or `backend`.

    Attributes:
        value: what `loss()` returned last, detached; None before.
        cosine: mean cosine of each projector's tokens with its teacher's, by "projectors.0" and so on; NaN before.
        weight: λ; may be changed at any time.

    Raises:
        ValueError: no such list, or one of other modules: projectors that are sharded by themselves, or have hooks.

    Source: REPA (Yu et al. 2024, arXiv:2410.06940).
    """

    value: Tensor | None

    def __init__(
        self, model: nn.Module, weight: float = 0.5, *, projectors: str = "projectors", **options: Any
    ) -> None:
        super().__init__()
        found: list[Any] = list(getattr(unwrapped(model), projectors, ()))
        if not found or not all(map(is_mlp, found)):
            raise ValueError(
                f"RepresentationAlignment: {type(unwrapped(model)).__name__}.{projectors} is no list of nn.Sequential "
                "of linear layers with SiLU in between, without hooks; say projectors= where REPA's are, or take "
                "RepresentationAlignmentLoss on hidden tokens that the model returns"
            )
        self.weight, self.value = weight, None
        self._names: list[int | str] = [f"{projectors}.{number}" for number in range(len(found))]
        self._taps = [_Tap(projector[-1].out_features) for projector in found]
        sizes: dict[int | str, int] = {
            name: projector[-1].out_features for name, projector in zip(self._names, found, strict=True)
        }
        loss = RepresentationAlignmentLoss(
            found[0][0].in_features,
            sizes,
            self._names,
            projector=[nn.Sequential(*projector) for projector in found],  # the same layers, past the hooks
            weights=1.0,
            **options,
        )
        self._loss = (loss,)  # no submodule: its parameters are the model's
        for projector, tap in zip(found, self._taps, strict=True):
            projector.register_forward_pre_hook(tap.before)
            projector.register_forward_hook(tap.after)

    @property
    def cosine(self) -> dict[str, Tensor]:
        """Mean cosine of each projector's tokens with its teacher's in the last `loss()` of a pass with grad."""
        return self._loss[0].cosine

    def loss(self, zs: Tensor | Sequence[Tensor], *, mask: Tensor | None = None) -> Tensor:
        """λ times the mean over the teachers of REPA's term; forgets the hidden tokens.

        Args:
            zs: (B, N, T) tokens of each teacher, in the order of the projectors; or of the one there is.
            mask: bool (B, N), True for tokens that count.

        Returns:
            fp32, a 0-d tensor; 0 after a forward pass without grad.

        Raises:
            RuntimeError: no forward pass since the last `loss()`.
            ValueError: another number of teachers than of projectors; otherwise as `RepresentationAlignmentLoss`.
        """
        teachers = [zs] if isinstance(zs, Tensor) else list(zs)
        if len(teachers) != len(self._taps):
            raise ValueError(
                f"RepresentationAlignment: {len(teachers)} teachers for {len(self._taps)} projectors; give one each"
            )
        hidden = [tap.take() for tap in self._taps]
        self.value = None
        if all(own is None and tap.without_grad for own, tap in zip(hidden, self._taps, strict=True)):
            loss = torch.zeros((), device=teachers[0].device)
        else:
            states = {}
            for name, own, teacher in zip(self._names, hidden, teachers, strict=True):
                if own is None:
                    raise RuntimeError(
                        f"RepresentationAlignment: {name} was given nothing since the last loss(). Call loss() once "
                        "after each forward pass of the model that this was made for (a copy of it has no hooks)"
                    )
                states[name] = own.unflatten(0, (len(teacher), -1)) if own.dim() == 2 else own
            dtype = self._taps[0].autocast
            with torch.autocast(teachers[0].device.type, dtype, enabled=dtype is not None):
                loss = self._loss[0](states, dict(zip(self._names, teachers, strict=True)), mask=mask)
            loss = (self.weight / len(teachers)) * loss
        self.value = loss.detach()
        return loss


class _Tap:
    """The hooks of a projector, and what they keep: the tokens that it was given, and the autocast dtype around it."""

    def __init__(self, width: int) -> None:
        self.active, self.width = True, width
        self.hidden: Tensor | None = None
        self.autocast: torch.dtype | None = None
        self.without_grad = False

    def __getstate__(self) -> dict[str, Any]:
        return {"active": False}  # copies of the model carry hooks that do nothing

    def take(self) -> Tensor | None:
        """What was kept, once."""
        hidden, self.hidden = self.hidden, None
        return hidden

    def before(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        """Forward pre-hook: no tokens in the place of all."""
        if not self.active:
            return None
        self.without_grad = not torch.is_grad_enabled()
        if self.without_grad:  # sampling between forward pass and loss does no harm
            return None
        (self.hidden,) = args
        kind = self.hidden.device.type
        self.autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return (self.hidden[:0],)

    def after(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor | None:
        """Forward hook: zeros of the shape that the projected tokens would have had, which take no memory."""
        if not self.active or self.without_grad or self.hidden is None:
            return None
        return output.new_zeros(()).expand(*self.hidden.shape[:-1], self.width)

"""The alignment losses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class LayerSyncConfig:
    """The LayerSync loss: a shallow block (student) learns from a deep one (teacher) of the same pass."""

    layersync: tuple[str, ...] = ("auto",)
    """STUDENT:TEACHER block numbers counted from 1, several allowed; auto: the default pair; off: plain SiT."""
    weight: tuple[float, ...] = (0.2,)
    """One weight for all pairs, or one each."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the weight goes to zero between start_step and stop_step."""
    start_step: int = 0
    """The schedule begins to fall here."""
    stop_step: int | None = None
    """No LayerSync from this step on."""
    every: int = 1
    """Apply the loss every n steps only."""
    teacher_grad: bool = False
    """Let the gradient into the teacher too."""
    loss_backend: Literal["auto", "reference", "cpp", "triton", "cuda"] = "auto"
    """Which implementation computes the loss."""


@dataclass(frozen=True)
class AlignConfig:
    """REPA: a block learns from the features of a pretrained network that sees the clean image. Next to LayerSync, or
    in its place (--layersync off).
    """

    align: Literal["off", "repa", "irepa"] = "off"
    """repa: an MLP from the block to the teacher; irepa: a 3x3 convolution, and the teacher normalised over tokens."""
    teacher: str | None = None
    """efficientnet-lite0 | dinov2-vits14, -vitb14, -vitl14 | timm/NAME | hub/REPO:NAME | hub/FOLDER:NAME."""
    teacher_size: int | None = None
    """Side of the teacher's images in pixels; None: one token per patch of the model where that is known."""
    teacher_weights: Path | None = None
    """Read the teacher's weights from this file instead of downloading them."""
    features: Path | None = None
    """Features that `layersync features` computed; the teacher itself is not needed then."""
    align_block: int | None = None
    """The block that learns, counted from 1; None: REPA's relative depth, 8 of 28."""
    align_weight: float = 0.5
    """Weight of the loss."""
    align_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the weight goes to zero between --align-start-step and --align-stop-step."""
    align_start_step: int = 0
    """The schedule begins to fall here."""
    align_stop_step: int | None = None
    """No alignment from this step on; the teacher does not run any more either (as in HASTE)."""
    align_every: int = 1
    """Apply the loss every n steps only."""
    projector_dim: int | None = None
    """Inner width of the MLP; None: 2048, or four times the model's width where that is less."""

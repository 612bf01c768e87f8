"""The alignment losses, and when they are on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from . import at_least, positive, require

Decay = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class ScheduleConfig:
    """When the loss is on."""  # names as the keywords of the losses

    schedule: Decay = "constant"
    """How the weight goes to zero between start-step and stop-step."""
    start_step: int = 0
    """The schedule begins to fall here."""
    stop_step: int | None = None
    """The loss is off from this step on."""
    every: int = 1
    """Apply the loss every n steps only."""


@dataclass(frozen=True)
class AlignScheduleConfig(ScheduleConfig):
    """When REPA is on; where it is not, the teacher does not run either (as in HASTE)."""

    schedule: Annotated[Decay, tyro.conf.arg(name="align-schedule")] = "constant"
    start_step: Annotated[int, tyro.conf.arg(name="align-start-step")] = 0
    stop_step: Annotated[int | None, tyro.conf.arg(name="align-stop-step")] = None
    every: Annotated[int, tyro.conf.arg(name="align-every")] = 1


@dataclass(frozen=True)
class DispersiveScheduleConfig(ScheduleConfig):
    """When the dispersive loss is on."""

    schedule: Annotated[Decay, tyro.conf.arg(name="dispersive-schedule")] = "constant"
    start_step: Annotated[int, tyro.conf.arg(name="dispersive-start-step")] = 0
    stop_step: Annotated[int | None, tyro.conf.arg(name="dispersive-stop-step")] = None
    every: Annotated[int, tyro.conf.arg(name="dispersive-every")] = 1


@dataclass(frozen=True)
class LayerSyncConfig:
    """The LayerSync loss: a shallow block (student) learns from a deep one (teacher) of the same pass."""

    layersync: tuple[str, ...] = ("auto",)
    """STUDENT:TEACHER block numbers counted from 1, several allowed; auto: the default pair; off: plain SiT."""
    weight: tuple[float, ...] = (0.2,)
    """One weight for all pairs, or one each."""
    when: ScheduleConfig = field(default_factory=ScheduleConfig)
    teacher_grad: bool = False
    """Let the gradient into the teacher too."""
    loss_backend: Literal["auto", "reference", "cpp", "triton", "cuda", "compile"] = "auto"
    """Which implementation computes the loss."""


@dataclass(frozen=True)
class AlignConfig:
    """REPA: a block learns from the features of a pretrained network that sees the clean image; or SRA: from a later
    block of the moving average of the weights, which sees less noise. Next to LayerSync, or in its place (--layersync
    off).
    """

    align: Literal["off", "repa", "irepa", "sra"] = "off"
    """repa: an MLP from the block to the teacher; irepa: a 3x3 convolution, and the teacher normalised over tokens;
    sra: an MLP to the moving average, no --teacher."""
    teacher: str | None = None
    """efficientnet-lite0 | dinov2-vits14, -vitb14, -vitl14 | timm/NAME | hub/REPO:NAME | hub/FOLDER:NAME, of images
    and of films frame by frame; resemblyzer of sounds; MODULE:FUNCTION of anything."""
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
    align_when: AlignScheduleConfig = field(default_factory=AlignScheduleConfig)
    projector_dim: int | None = None
    """Inner width of REPA's MLP; None: 2048, or four times the model's width where that is less."""
    align_teacher_block: int | None = None
    """Of sra: the block of the moving average; None: 20 of 28."""
    align_gap: float = 0.2
    """Of sra: the moving average sees each sample up to so much later on the way from noise (0) to data (1)."""
    align_rows: Literal["cosine", "smooth_l1"] = "cosine"
    """What tokens are compared by. SRA publishes both: cosine with weight 0.5, smooth_l1 with 0.2."""

    def validate(self) -> None:
        """Checks ranges.

        Raises:
            ConfigError: naming the flag, its value and what it may be.
        """
        at_least(1, teacher_size=self.teacher_size, projector_dim=self.projector_dim)
        given = self.teacher is not None or self.features is not None
        require(
            self.align in ("off", "sra") or given,
            f"--align {self.align} needs --teacher, for instance efficientnet-lite0, or --features",
        )
        require(
            self.align in ("repa", "irepa") or not given,
            f"--teacher and --features are used by --align repa or irepa only, which is {self.align}",
        )
        require(0 <= self.align_gap <= 1, f"--align-gap {self.align_gap}: expected a time in [0, 1]")


@dataclass(frozen=True)
class DispersiveConfig:
    """Dispersive loss (Wang & He 2025): the samples of a batch drive each other apart in a block, without a teacher."""

    dispersive: Literal["off", "auto"] | int = "off"
    """The block, counted from 1; auto: in a quarter of the depth, as in the paper."""
    dispersive_weight: float = 0.5
    """Weight of the loss; 0.5 in the paper, 0.25 in its PyTorch code."""
    dispersive_temperature: float = 0.5
    """What squared distances, means over the elements of a sample, are divided by; 0.5 in the paper, 1 in its PyTorch
    code."""
    dispersive_when: DispersiveScheduleConfig = field(default_factory=DispersiveScheduleConfig)

    def validate(self) -> None:
        """Checks ranges.

        Raises:
            ConfigError: naming the flag, its value and what it may be.
        """
        positive(dispersive_temperature=self.dispersive_temperature)

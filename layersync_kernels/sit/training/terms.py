"""The terms of the loss beside the flow's own."""

from __future__ import annotations

from ...errors import ConfigError
from ...losses.layersync import LayerSyncLoss
from ...losses.pairs import default_pair
from ...losses.representation import RepresentationAlignmentLoss
from ..config.loss import AlignConfig, LayerSyncConfig
from ..models.sit import SiT


def build_alignment(config: LayerSyncConfig, depth: int) -> LayerSyncLoss | None:
    """The LayerSync loss for a model of `depth` blocks; None for "off".

    Raises:
        ConfigError: a pair that is not STUDENT:TEACHER with 1 <= STUDENT < TEACHER <= depth, or settings that clash.
    """
    wanted = config.layersync
    if wanted == ("off",):
        return None
    pairs = []
    for pair in wanted:
        student, _, teacher = pair.partition(":")
        if wanted == ("auto",):
            try:
                pairs.append(default_pair(depth))
            except ValueError as error:
                raise ConfigError(f"--layersync auto: {error}; use --layersync off") from error
        elif student.isdecimal() and teacher.isdecimal():
            pairs.append((int(student), int(teacher)))
            if int(teacher) > depth:
                raise ConfigError(f"--layersync {pair}: the model has blocks 1 to {depth}")
        else:
            raise ConfigError(f"--layersync {pair}: expected STUDENT:TEACHER such as 8:16, or auto or off alone")
    weights: float | tuple[float, ...] = config.weight[0] if len(config.weight) == 1 else config.weight
    try:
        return LayerSyncLoss(
            pairs,
            weights,
            schedule=config.schedule,
            start_step=config.start_step,
            stop_step=config.stop_step,
            every=config.every,
            teacher_grad=config.teacher_grad,
            backend=config.loss_backend,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def build_repa(config: AlignConfig, model: SiT, teacher: str, teacher_size: int) -> RepresentationAlignmentLoss:
    """The loss that aligns a block of `model` with the tokens, `teacher_size` wide, of the teacher of that name.

    Raises:
        ConfigError: a block that the model does not have, or settings that clash.
    """
    depth, width = len(model.blocks), model.hidden_size
    block = max(1, round(depth * 8 / 28)) if config.align_block is None else config.align_block
    if not 1 <= block <= depth:
        raise ConfigError(f"--align-block {block}: the model has blocks 1 to {depth}")
    try:
        return RepresentationAlignmentLoss(
            width,
            teacher_size,
            [(block, teacher)],
            method=config.align,
            projector_dim=min(2048, 4 * width) if config.projector_dim is None else config.projector_dim,
            weights=config.align_weight,
            interpolate=True,
            schedule=config.align_schedule,
            start_step=config.align_start_step,
            stop_step=config.align_stop_step,
            every=config.align_every,
        )
    except ValueError as error:
        raise ConfigError(f"--align {config.align}: {error}") from error

"""From settings to objects: device, precision, model, loss, transport."""

from __future__ import annotations

import dataclasses

import torch

from ..errors import ConfigError
from ..losses import LayerSyncLoss, RepresentationAlignmentLoss, default_pair
from .config import AlignConfig, LayerSyncConfig, ModelConfig, TransportConfig
from .model import SiT, sit_models
from .transport import Transport, create_transport


def resolve_device(name: str) -> torch.device:
    """`name` as a device that is there; "auto" is cuda if there is one, else cpu.

    Raises:
        ConfigError: unknown or absent device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # a build without CUDA asserts
        raise ConfigError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def resolve_precision(name: str, device: torch.device) -> torch.dtype | None:
    """The autocast type of `--precision`, or None for fp32.

    "auto" is bf16 on GPUs that have it, and on CPUs with AMX or AVX512_BF16: on a 2-core Zen 4 it trains SiT-S/2 (width
    384, batch 16, 14x14) at 25 against 17 images/s in fp32, is 1.1 times faster at width 192 and even at width 128.
    """
    if name == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        elif device.type == "cpu":
            fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        else:
            fast = False
        name = "bf16" if fast else "fp32"
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def build_model(config: ModelConfig, shape: tuple[int, int, int], num_classes: int) -> SiT:
    """The SiT that `config` names, for samples of `shape` (C, H, W).

    Raises:
        ConfigError: unknown name (the message lists the known ones), or sizes that do not go together.
    """
    if config.model not in sit_models:
        raise ConfigError(f"no model is named {config.model!r}; known: {', '.join(sit_models)}")
    channels, height, width = shape
    if height != width:
        raise ConfigError(f"samples are {height}x{width}; SiT takes squares")
    overrides = {
        name: value
        for name in ("patch_size", "hidden_size", "depth", "num_heads")
        if (value := getattr(config, name)) is not None
    }
    try:
        return sit_models[config.model](
            input_size=height,
            in_channels=channels,
            num_classes=num_classes,
            class_dropout_prob=config.class_dropout,
            kernels=config.kernels,
            recompute=config.recompute,
            **overrides,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


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


def build_transport(config: TransportConfig) -> Transport:
    """The transport that `config` describes.

    Raises:
        ConfigError: a combination that does not exist.
    """
    try:
        return create_transport(**dataclasses.asdict(config))
    except ValueError as error:
        raise ConfigError(str(error)) from error

"""What a pretrained network knows of the samples that a model is probed with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ....errors import DataError, TeacherError
from ...data.base import SampleSet
from ...models.sit import SiT
from ...teachers.base import Teacher, not_finite
from ...teachers.features import Features, latent_message
from ...teachers.grids import GridTeacher, load_any
from .config import ProbeCommand
from .measure import first_batches, mean_tokens, tokens_there


@dataclass(frozen=True)
class TeacherFeatures:
    """What a pretrained network puts out for the samples of `States`.

    Attributes:
        name: of the network.
        features: fp32 (N, W), on the CPU, averaged over the tokens.
    """

    name: str
    features: Tensor


def teacher_of(command: ProbeCommand, data: SampleSet, model: SiT) -> Teacher | GridTeacher | Features | None:
    """The network that a command names, on the CPU, or its precomputed features.

    Raises:
        DataError: latents, of which there are no precomputed features.
        ConfigError, TeacherError, CheckpointError: see `load_any` and `Features`.
    """
    if command.features is not None:
        return Features(command.features, data, teacher=command.teacher, flip=command.data.flip)
    if command.teacher is None:
        return None
    if data.latent:
        raise DataError(latent_message(command.data.data))
    return load_any(
        command.teacher, data.modality, model.grid, size=command.teacher_size, weights=command.teacher_weights
    )


@torch.no_grad()
def teacher_features(
    teacher: Teacher | GridTeacher | Features,
    model: SiT,
    data: SampleSet,
    *,
    samples: int,
    batch_size: int,
    seed: int,
    device: torch.device,
    autocast_dtype: torch.dtype | None = None,
    progress: bool = False,
) -> TeacherFeatures:
    """What the teacher knows of the clean samples that `measure` takes with the same arguments.

    Args:
        teacher: is moved to `device`.
        model: whose tokens say what padding is.
        data: as for `measure`.
        samples: as for `measure`.
        batch_size: as for `measure`.
        seed: as for `measure`.
        device: where it runs.
        autocast_dtype: None for fp32.
        progress: show a bar on a terminal.

    Raises:
        TeacherError: it cannot take the samples, or gives NaN or infinity; says for how many.
    """
    if not isinstance(teacher, Features):
        first = data.take(torch.arange(min(2, len(data)))).to(device)
        teacher.to(device).width(first.samples, first.condition.lengths)
    pieces = []
    count = min(samples, len(data))
    for _, batch in first_batches(data, count, batch_size, seed, what=teacher.name if progress else None):
        if isinstance(teacher, Features):
            tokens = teacher.tokens(batch.index, batch.mirrored)
        else:
            own = batch.to(device)
            with torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None):
                tokens = teacher(own.samples, own.condition.lengths).float().cpu()
        lengths = batch.condition.lengths
        there = tokens_there(model, None if lengths is None else lengths.cpu())
        if there is not None and there.shape != tokens.shape[:2]:
            raise TeacherError(
                f"the teacher {teacher.name} gives {tokens.shape[1]} tokens, the model has {there.shape[1]}: which of "
                "them are padding is not known; compute features with the model's --grid"
            )
        pieces.append(mean_tokens(tokens.float(), there))
    features = torch.cat(pieces)
    if bad := int((~features.isfinite().all(1)).sum()):
        raise TeacherError(
            f"{not_finite(teacher.name)} for {bad} of {count} samples; check its weights, or use another"
        )
    return TeacherFeatures(teacher.name, features)

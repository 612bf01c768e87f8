"""Features of a teacher, computed before."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...errors import DataError, TeacherError
from ..checkpoints.weights import FLOATS, is_finite
from ..config.io import build
from ..console import console
from ..data.augment import mirror
from ..data.base import SampleSet
from ..data.memory import first_not_finite
from ..files import atomic_path
from ..modality.images import unit_to_pixels
from .base import Teacher, not_finite
from .grids import GridTeacher

PRINTED_SAMPLES = 256


@dataclass(frozen=True)
class FeatureFacts:
    """What the metadata of a file of features say.

    Attributes:
        teacher: its name.
        teacher_size: side of its images in pixels, or the grid of its tokens.
        source: what the data was called.
        data: `fingerprint` of the data.
    """

    teacher: str | None = None
    teacher_size: str | None = None
    source: str = "another data set"
    data: str | None = None


class Features:
    """Tokens that `compute_features` has written, looked up by the number of the sample.

    With `flip` the tokens of the mirrored images are looked up too: a network's tokens of a mirrored image are not the
    mirrored tokens.

    Args:
        path: of the file. It is mapped into memory and read page by page as training asks for it, so that it may be
            larger than the memory, and no limit is set to it: what gets copied is the tokens of a batch.
        data: what is trained on.
        teacher: the name that the file has to carry; None takes any.
        flip: whether samples get mirrored.

    Attributes:
        name: of the teacher.
        width: channels of the tokens.

    Raises:
        TeacherError: not readable, or of other data, another teacher, or without mirrored images; names the file.
    """

    def __init__(self, path: Path, data: SampleSet, *, teacher: str | None = None, flip: bool = False) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                known = build(FeatureFacts, file.metadata() or {}, others=str)
                self._sets = [file.get_tensor(key) for key in ("features", "mirrored") if key in file.keys()]  # noqa: SIM118
                named = "features" in file.keys()  # noqa: SIM118
        except (OSError, ValueError, SafetensorError) as error:
            raise TeacherError(f"cannot read the features {path}: {error}") from error
        if not named or any(tokens.ndim != 3 or tokens.dtype not in FLOATS for tokens in self._sets):
            raise TeacherError(f"{path} holds no features: expected 'features' (N, tokens, channels) in fp16")
        kinds = [(tuple(tokens.shape), tokens.dtype) for tokens in self._sets]
        if 0 in kinds[0][0] or kinds[0] != kinds[-1]:
            raise TeacherError(f"{path} holds features of {kinds}; expected one shape without zeros, and one type")
        self._path = path
        self.name = known.teacher or path.name
        self.width = self._sets[0].shape[2]
        count = len(self._sets[0])
        again = "compute them with: layersync features"
        if count != len(data):
            raise TeacherError(f"{path} has features of {count} samples, the data has {len(data)}; {again}")
        if teacher not in (None, self.name):
            raise TeacherError(f"{path} has features of the teacher {self.name}, --teacher is {teacher}; {again}")
        # Latents have no pixels to compare: their number has to do.
        if not data.latent and known.data is not None and known.data != fingerprint(data):
            raise TeacherError(
                f"{path} has features of other data (it was made from {known.source}, and samples differ); {again}"
            )
        if flip and len(self._sets) < 2:
            raise TeacherError(f"{path} has no features of mirrored images, which --flip needs; {again} --flip")

    def tokens(self, index: Tensor, mirrored: Tensor | None = None) -> Tensor:
        """Those of the samples `index` (B,), mirrored where `mirrored` (B, ...) says so: fp16 (B, N, W), on the CPU.

        Raises:
            TeacherError: they are not finite; names the first sample.
        """
        index = index.cpu()
        tokens = self._sets[0][index]
        if mirrored is not None:
            rows = mirrored.flatten().cpu().nonzero().flatten()
            tokens[rows] = self._sets[1][index[rows]]
        if not is_finite(tokens):  # read only now, as they are asked for
            bad = int(index[first_not_finite(tokens)])
            raise TeacherError(f"{self._path}: the features of sample {bad} are not finite; compute them anew")
        return tokens


def fingerprint(data: SampleSet) -> str:
    """A hash of the shape, the number of samples, and some of the samples."""
    index = torch.linspace(0, len(data) - 1, min(PRINTED_SAMPLES, len(data)), dtype=torch.float64).round().long()
    pixels = unit_to_pixels(data.take(index).samples).cpu().contiguous()
    return hashlib.sha256(json.dumps([*data.spec.shape, len(data)]).encode() + pixels.numpy().tobytes()).hexdigest()


def compute_features(
    teacher: Teacher | GridTeacher,
    data: SampleSet,
    path: Path,
    *,
    source: str,
    flip: bool,
    batch_size: int,
    autocast_dtype: torch.dtype | None,
) -> tuple[int, ...]:
    """Runs the teacher over all samples once and writes its tokens as fp16 safetensors.

    Args:
        teacher: on the device that it shall run on.
        data: what the teacher looks at; the file holds them in this order.
        path: of the file; it replaces one that is there. All of it is in memory before it is written.
        source: what the data is called.
        flip: also the tokens of the mirrored images.
        batch_size: samples at a time.
        autocast_dtype: of the teacher's arithmetic; None: fp32.

    Returns:
        the shape of the features.

    Raises:
        DataError: latents, which have no pixels.
        TeacherError: NaN, infinity or a number beyond fp16; the file cannot be written.
    """
    if data.latent:
        raise DataError(latent_message(source))
    device = teacher.device
    first = data.take(torch.arange(1)).to(device)
    width = teacher.width(first.samples, first.condition.lengths)
    names = ("features", "mirrored") if flip else ("features",)
    tensors: dict[str, Tensor] = {}
    for start in track(range(0, len(data), batch_size), "features", console=console, disable=not console.is_terminal):
        index = torch.arange(start, min(start + batch_size, len(data)))
        batch = data.take(index).to(device)
        for name in names:
            with torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None):
                samples = batch.samples if name == "features" else mirror(batch.samples)
                tokens = teacher(samples, batch.condition.lengths).half().cpu()
            if not tokens.isfinite().all():
                raise TeacherError(f"{not_finite(teacher.name)} in fp16 for samples from {start} on")
            if name not in tensors:
                tensors[name] = tokens.new_empty(len(data), tokens.shape[1], width)
            tensors[name][index] = tokens
    about = dataclasses.asdict(FeatureFacts(teacher.name, str(teacher.size), source, fingerprint(data)))
    try:
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata=about)
    except (OSError, SafetensorError) as error:
        raise TeacherError(f"cannot write {path}: {error}") from error
    return tuple(tensors["features"].shape)


def latent_message(source: str) -> str:
    """Why a teacher cannot look at latents."""
    return (
        f"{source} holds latents, and a teacher needs pixels: compute the features of the images that they were made "
        "from, in the same order (layersync features --data IMAGES), and give them with --features FILE"
    )

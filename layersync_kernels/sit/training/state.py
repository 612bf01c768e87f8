"""Everything that training changes, and that a checkpoint holds and restores."""

from __future__ import annotations

import itertools
import logging
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from ..checkpoints.local import check_checkpoint, checkpoint_path, read_tensors, stems, tensors_path
from ..checkpoints.optimizer import load_optimizer, moments_like, optimizer_tensors
from ..checkpoints.state import RunState, read_run_state
from ..checkpoints.weights import Weights, fill_model
from ..config.optim import OptimConfig
from ..config.run import LogConfig
from ..distributed.parallel import Parallel
from ..distributed.shards import own_part
from ..models.sit import SiT
from .passes import Pass
from .saver import Saver, Snapshot
from .terms.base import LossTerm

logger = logging.getLogger(__name__)


class TrainState:
    """Weights, their average, optimiser, scaler of fp16 gradients, generators and counters.

    Args:
        model: initialised, on its device, divided where `parallel` divides weights, in training mode.
        terms: of the loss; their modules, which are on the device, are trained with the model.
        config: of the optimiser and the average.
        seed: of the noise.
        scaled: scale the loss, as fp16 gradients need.
        parallel: how processes share the work; it has built the model.

    Attributes:
        model, ema: the network, and the copy that holds the averaged weights (fp32, evaluation mode).
        network: what is called for the losses of a part of a batch, see `Pass`; it contains the model.
        divided: modules that may be divided among processes.
        emas: all such copies, by the stem of their file: "ema", and "ema-DECAY" of further decays.
        terms: of the loss.
        weights, averages: the trained tensors of `model`, and those of each of `emas` that follow them.
        trained: what the optimiser trains: `weights`, then the parameters of the terms; `names`: those of them.
        saver: writes checkpoints; what it is still copying must not be changed.
        generator: draws mirroring, noise and times; on the model's device.
        steps_done: optimiser steps so far.
        samples_seen: position in the shuffled stream of samples.
        seconds: time spent in training, up to where it last stopped.
        run: what the checkpoints of the run are marked with.
    """

    def __init__(
        self,
        model: SiT,
        terms: Sequence[LossTerm],
        config: OptimConfig,
        *,
        seed: int,
        scaled: bool = False,
        parallel: Parallel,
    ) -> None:
        self.config = config
        self.processes = parallel.processes
        self.device = next(model.parameters()).device
        self.model = model
        self.terms = list(terms)
        modules = [term.module for term in self.terms if term.module is not None]
        self.divided = [self.model, *map(parallel.divide, modules)]
        self.emas = {stem: parallel.copy(self.model) for stem in config.averages}
        self.ema = self.emas["ema"]
        for term in self.terms:
            term.ema = self.ema
        unused = any(parameter.requires_grad for module in modules for parameter in module.parameters())
        self.network = parallel.replicate(Pass(self.model, self.terms), unused=unused)
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.weights: list[Tensor] = list(trained.values())
        self.averages: list[list[Tensor]] = []
        for ema in self.emas.values():
            averaged = dict(ema.named_parameters())
            self.averages.append([averaged[name] for name in trained])
        self._parts: tuple[list[Tensor], list[list[Tensor]]] | None = None
        for term in self.terms:
            if term.module is not None:
                trained.update(term.module.named_parameters(prefix=term.file or term.name))
        self.names = list(trained)
        self.trained: list[Tensor] = list(trained.values())
        self.optimizer = self.build_optimizer()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        self.saver = Saver(self.processes, self.device)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.steps_done = 0
        self.samples_seen = 0
        self.seconds = 0.0
        self.run = self.processes.text(uuid.uuid4().hex)

    def build_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser of `trained`."""
        return torch.optim.AdamW(
            self.trained,
            lr=self.config.lr,
            betas=self.config.betas,
            weight_decay=self.config.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )

    @torch.no_grad()
    def move_average(self) -> None:
        """The average: ema ← decay · ema + (1 - decay) · weights."""
        if self._parts is None:  # after the first step: before it FSDP2 may still exchange what it holds
            self._parts = [*map(own_part, self.weights)], [[*map(own_part, own)] for own in self.averages]
        weights, averages = self._parts
        for own, decay in zip(averages, self.config.ema_decays, strict=True):
            if self.config.ema_warmup:
                decay = min(decay, (1 + self.steps_done) / (10 + self.steps_done))
            torch._foreach_lerp_(own, weights, 1 - decay)

    def is_finite(self) -> bool:
        """Whether all weights and averages are, of this process; waits for the device."""
        tensors = map(own_part, [*self.trained, *itertools.chain(*self.averages)])
        return bool(torch.stack(torch._foreach_norm([*tensors])).isfinite().all())

    def save(self, run_dir: Path, facts: dict[str, Any], log: LogConfig, *, background: bool = False) -> Path:
        """Writes a checkpoint; all processes call it.

        Args:
            run_dir: folder of the run.
            facts: what else the file of counters holds, as JSON.
            log: says which checkpoints stay.
            background: only begins to; see `saver`.

        Returns:
            where it is, or will be.

        Raises:
            CheckpointError: it cannot be written; the older ones are intact.
        """
        tensors = {
            "model": self.model.state_dict(),
            **{stem: ema.state_dict() for stem, ema in self.emas.items()},
            "optimizer": optimizer_tensors(self.optimizer, self.names),
            "rng": self._random_states(),
        }
        for term in self.terms:
            if term.module is not None and term.file is not None:
                tensors[term.file] = term.module.state_dict()
        state = {
            "run": self.run,
            "samples_seen": self.samples_seen,
            "seconds": self.seconds,
            "scaler": self.scaler.state_dict(),
            **facts,
        }
        snapshot = Snapshot(run_dir, self.steps_done, tensors, state, log.keep, log.keep_every)
        if background:
            self.saver.begin(snapshot)
        else:
            self.saver.save(snapshot)
        return checkpoint_path(run_dir, self.steps_done)

    def load(self, checkpoint: Path) -> RunState:
        """Takes the place of what a checkpoint folder holds: weights, average, optimiser, random numbers, counters.

        Any number of processes may have written it, and any number may read it.

        Returns:
            what else the checkpoint's file of counters holds.

        Raises:
            CheckpointError: it is damaged or belongs to another model; names the file.
        """

        def check() -> str:
            check_checkpoint(checkpoint)
            return ""

        self.processes.by_first(check)
        state = read_run_state(checkpoint)
        fill_model(self.model, _read(checkpoint, "model", self.model.state_dict()), exact=True)
        there = {stem for stem in stems(checkpoint) if stem.startswith("ema")}
        if (there > {"ema"} or len(self.emas) > 1) and there != set(self.emas):
            raise CheckpointError(
                f"{checkpoint} has the averages {', '.join(sorted(there))}; --ema-decay asks for "
                f"{', '.join(self.emas)}: resume with the decays of the run"
            )
        for stem, ema in self.emas.items():
            fill_model(ema, _read(checkpoint, stem, ema.state_dict()), exact=True)
        for term in self.terms:
            if term.module is not None and term.file is not None:
                if term.file not in stems(checkpoint):
                    raise CheckpointError(term.missing(checkpoint))
                fill_model(term.module, _read(checkpoint, term.file, term.module.state_dict()), exact=True)
        of_model = {name for name, _ in self.model.named_parameters()}
        optimizer = _read(checkpoint, "optimizer", moments_like(self.optimizer, self.names))
        try:
            load_optimizer(
                self.optimizer,
                self.names,
                optimizer.tensors,
                step=state.step,
                optional=set(self.names) - of_model,
                overflows=bool(state.scaler),
            )
        except CheckpointError as error:
            raise CheckpointError(f"{optimizer.path}: {error}") from error
        rng = _read(checkpoint, "rng", {})
        try:
            self._restore_random(rng.tensors)
        except (ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{rng.path} does not fit this run: {error}") from error
        if state.scaler:
            self.scaler.load_state_dict(state.scaler)
        elif self.scaler.is_enabled():
            logger.warning("%s is of a run without --precision fp16: its scale of the loss begins anew", checkpoint)
        self.steps_done, self.samples_seen, self.seconds = state.step, state.samples_seen, state.seconds
        self.run = state.run or self.run
        return state

    def _random_states(self) -> dict[str, Tensor]:
        """The states of all generators, as `rng.safetensors` holds them."""
        states = {"cpu": torch.get_rng_state(), "noise": self.generator.get_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def _restore_random(self, states: Mapping[str, Tensor]) -> None:
        """Puts back `_random_states`; that of CUDA is missing in a run that began on the CPU."""
        for name, now in self._random_states().items():
            if name == "cuda" and name not in states:
                continue
            if name not in states:
                raise ValueError(f"it has no {name!r}")
            if (states[name].shape, states[name].dtype) != (now.shape, now.dtype):
                found = f"{states[name].dtype} {tuple(states[name].shape)}"
                raise ValueError(
                    f"{name!r} is {found}; on this {self.device.type} it is {now.dtype} {tuple(now.shape)}"
                )
        torch.set_rng_state(states["cpu"])
        self.generator.set_state(states["noise"])
        if self.device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self.device)


def _read(checkpoint: Path, stem: str, like: Mapping[str, Tensor]) -> Weights:
    """Tensors of a checkpoint that has been checked; divided as `like` is, where they were written so."""
    path = tensors_path(checkpoint, stem)
    return Weights(read_tensors(path, like, checked=True), path)

"""Everything that training changes, and that a checkpoint holds and restores."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...errors import CheckpointError
from ..checkpoints.local import load_optimizer, optimizer_tensors, read_state, read_tensors, save_checkpoint
from ..checkpoints.weights import Weights, fill_model
from ..config.optim import OptimConfig
from ..models.sit import SiT
from .terms.base import LossTerm

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)


def parallelise(module: M) -> M:
    """Where sharding enters: everything that is built after it copies or holds what this returns.

    On one device, the only kind of run there is, that is the module itself.
    """
    return module


class TrainState:
    """Weights, their average, optimiser, scaler of fp16 gradients, generators and counters.

    Built in one order: model, `parallelise`, average, optimiser.

    Args:
        model: initialised, on its device, in training mode.
        terms: of the loss; their modules are trained with the model.
        config: of the optimiser and the average.
        seed: of the noise.
        scaled: scale the loss, as fp16 gradients need.

    Attributes:
        model, ema: the network, and the copy that holds the averaged weights (fp32, evaluation mode).
        terms: of the loss.
        weights, averages: the trained tensors of `model`, and those of `ema` that follow them.
        trained: what the optimiser trains: `weights`, then the parameters of the terms; `names`: those of them.
        generator: draws mirroring, noise and times; on the model's device.
        steps_done: optimiser steps so far.
        samples_seen: position in the shuffled stream of samples.
        seconds: time spent in training, up to where it last stopped.
    """

    def __init__(
        self, model: SiT, terms: Sequence[LossTerm], config: OptimConfig, *, seed: int, scaled: bool = False
    ) -> None:
        self.config = config
        self.device = next(model.parameters()).device
        self.model = parallelise(model)
        self.terms = list(terms)
        for term in self.terms:
            if term.module is not None:
                term.module = parallelise(term.module)
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        averaged = dict(self.ema.named_parameters())
        self.weights: list[Tensor] = list(trained.values())
        self.averages: list[Tensor] = [averaged[name] for name in trained]
        for term in self.terms:
            if term.module is not None:
                trained.update(term.module.named_parameters(prefix=term.file or term.name))
        self.names = list(trained)
        self.trained: list[Tensor] = list(trained.values())
        self.optimizer = self.build_optimizer()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.steps_done = 0
        self.samples_seen = 0
        self.seconds = 0.0

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
        decay = self.config.ema_decay
        if self.config.ema_warmup:
            decay = min(decay, (1 + self.steps_done) / (10 + self.steps_done))
        torch._foreach_lerp_(self.averages, self.weights, 1 - decay)

    def is_finite(self) -> bool:
        """Whether all weights and averages are; waits for the device."""
        return bool(torch.stack(torch._foreach_norm([*self.trained, *self.averages])).isfinite().all())

    def save(self, run_dir: Path, facts: dict[str, Any], *, keep: int) -> Path:
        """Writes a checkpoint.

        Args:
            run_dir: folder of the run.
            facts: what else the file of counters holds, as JSON.
            keep: how many checkpoints stay.

        Raises:
            CheckpointError: it cannot be written; the older ones are intact.
        """
        rng = {"cpu": torch.get_rng_state(), "noise": self.generator.get_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        tensors = {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": optimizer_tensors(self.optimizer, self.names),
            "rng": rng,
        }
        for term in self.terms:
            if term.module is not None and term.file is not None:
                tensors[term.file] = term.module.state_dict()
        state = {
            "step": self.steps_done,
            "samples_seen": self.samples_seen,
            "seconds": self.seconds,
            "scaler": self.scaler.state_dict(),
            **facts,
        }
        return save_checkpoint(run_dir, self.steps_done, tensors, state, keep=keep)

    def load(self, checkpoint: Path) -> None:
        """Takes the place of what a checkpoint folder holds: weights, average, optimiser, random numbers, counters.

        Raises:
            CheckpointError: it is damaged or belongs to another model; names the file.
        """
        state = read_state(checkpoint)
        files = {
            stem: read_tensors(checkpoint / f"{stem}.safetensors") for stem in ("model", "ema", "optimizer", "rng")
        }
        fill_model(self.model, Weights(files["model"], checkpoint / "model.safetensors"))
        fill_model(self.ema, Weights(files["ema"], checkpoint / "ema.safetensors"))
        for term in self.terms:
            if term.module is not None and term.file is not None:
                path = checkpoint / f"{term.file}.safetensors"
                if not path.is_file():
                    raise CheckpointError(term.missing(checkpoint))
                fill_model(term.module, Weights(read_tensors(path), path))
        try:
            load_optimizer(self.optimizer, self.names, files["optimizer"])
            if state["scaler"] or not self.scaler.is_enabled():
                self.scaler.load_state_dict(state["scaler"])
            else:
                logger.warning("%s is of a run without --precision fp16: its scale of the loss begins anew", checkpoint)
            torch.set_rng_state(files["rng"]["cpu"])
            self.generator.set_state(files["rng"]["noise"])
            if self.device.type == "cuda" and "cuda" in files["rng"]:
                torch.cuda.set_rng_state(files["rng"]["cuda"], self.device)
            self.steps_done, self.samples_seen = int(state["step"]), int(state["samples_seen"])
            self.seconds = float(state["seconds"])
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{checkpoint} does not fit this run: {type(error).__name__}: {error}") from error

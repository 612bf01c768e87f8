"""How several processes share the work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from . import at_least, positive, require


@dataclass(frozen=True)
class ParallelConfig:
    """How the processes that torchrun starts share the work. One process needs none of it."""

    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """ddp: each has all weights. fsdp: weights, average and optimiser are divided among all (FSDP2). hsdp: among the
    processes of a machine, and machines have the same."""
    shard_size: int | None = None
    """Of hsdp: how many processes share a copy of the weights; None: those of a machine."""
    reshard: bool = True
    """Of fsdp and hsdp: drop a block's whole weights after its forward pass, and gather them again for its backward
    pass."""
    timeout: float = 600.0
    """Seconds that a process waits for the others; shortly before that each writes where it hangs or waits."""

    def validate(self) -> None:
        """Checks ranges.

        Raises:
            ConfigError: naming the flag, its value and what it may be.
        """
        at_least(1, shard_size=self.shard_size)
        positive(timeout=self.timeout)
        require(
            self.shard_size is None or self.parallel == "hsdp",
            f"--shard-size {self.shard_size} is for --parallel hsdp; --parallel is {self.parallel}",
        )

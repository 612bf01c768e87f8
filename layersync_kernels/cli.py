"""The command `layersync`. Each subcommand's module is imported only when that subcommand runs."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .errors import UserError


class Command(NamedTuple):
    """A subcommand: "module:function" taking its arguments and giving an exit code, and a line of help.

    `several`: the arguments with which it is the work of all processes that torchrun starts; None: it never is.
    """

    target: str
    help: str
    several: frozenset[str] | None = None

    def load(self) -> Callable[[Sequence[str]], int | None]:
        """Imports the function."""
        module, _, function = self.target.partition(":")
        loaded: Callable[[Sequence[str]], int | None] = getattr(importlib.import_module(module), function)
        return loaded


COMMANDS = {
    "train": Command(
        "layersync_kernels.sit.commands.train:train_main", "train a SiT, with LayerSync or without", frozenset()
    ),
    "sample": Command(
        "layersync_kernels.sit.commands.sample:sample_main",
        "draw a grid of samples from a run or checkpoint",
        frozenset(),
    ),
    "evaluate": Command(
        "layersync_kernels.sit.commands.evaluate:evaluate_main",
        "measure how far samples of a run are from real ones, beside controls",
    ),
    "export": Command(
        "layersync_kernels.sit.commands.export:export_main", "write the weights of a run for others, with a model card"
    ),
    "probe": Command(
        "layersync_kernels.sit.commands.probe:probe_main",
        "measure the blocks of a run or checkpoint and propose a pair",
    ),
    "features": Command(
        "layersync_kernels.sit.commands.features:features_main",
        "run a pretrained teacher over a data set once",
    ),
    "latents": Command(
        "layersync_kernels.sit.commands.latents:latents_main", "encode a data set with an autoencoder once"
    ),
    "compare": Command(
        "layersync_kernels.sit.commands.compare:compare_main",
        "train vanilla, LayerSync, REPA and both in turns, and report",
    ),
    "demo": Command(
        "layersync_kernels.bench.demo:demo_main", "train on digits for a few minutes, sample, compare speeds"
    ),
    "bench": Command(  # of a step that several processes share, each has its own part of the time
        "layersync_kernels.bench.cli:main", "time the ops and the trainer on this machine", frozenset({"--breakdown"})
    ),
    "scale": Command("layersync_kernels.bench.scale.command:main", "model a training step on many GPUs, on paper"),
    "tune": Command(
        "layersync_kernels.bench.tune:main", 'measure the backends on this machine, for backend="auto" to follow'
    ),
    "doctor": Command("layersync_kernels.doctor:main", "what is installed, which backend runs where, and why"),
}


def usage() -> str:
    """The text of `layersync --help`."""
    lines = ["usage: layersync COMMAND [OPTIONS]", "", "commands:"]
    lines += [f"  {name:<8} {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [*lines, "", "layersync COMMAND --help lists the options of a command, layersync --version says which."]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Returns:
        0: done. 1: it failed, for a reason the message names. 2: wrong arguments. 130: interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from . import __version__

        print(__version__)
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"layersync: no command {name!r}\n\n{usage()}", file=sys.stderr)
        return 2
    if (processes := os.environ.get("WORLD_SIZE") or "1") != "1" and not (
        (several := COMMANDS[name].several) is not None and several <= set(rest)
    ):
        print(
            f"layersync {name}: this is the work of one process, and WORLD_SIZE is {processes}; start it without "
            "torchrun, or with WORLD_SIZE unset",
            file=sys.stderr,
        )
        return 1
    try:
        return COMMANDS[name].load()(rest) or 0
    except UserError as error:
        print(f"layersync {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"layersync {name}: aborted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

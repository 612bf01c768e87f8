"""The report of an evaluation: a table, and JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from ..config.sampling import SamplingConfig
from ..console import console
from .measure import Measured
from .metrics import LEVEL

BETTER = {
    "FID": "lower", "sFID": "lower", "FD": "lower", "sFD": "lower", "FAD": "lower", "FVD": "lower", "KID": "lower",
    "FD of changes": "lower", "KL of posteriors": "lower", "IS": "higher", "precision": "higher", "recall": "higher",
    "recognised": "higher",
}  # fmt: skip
"""Which way is better; of the others, what is near the real samples."""
_WIDTH = 110
_ARROWS = {"lower": " ↓", "higher": " ↑"}


@dataclass(frozen=True)
class Evaluation:
    """Numbers, and all that they depend on.

    Attributes:
        settings: JSON values: what was measured, of how many samples, by which network, drawn how.
        found: of the samples.
        controls: of each control, without intervals, with how many samples it has.
        notes: what a reader has to know.
    """

    settings: dict[str, Any]
    found: Measured
    controls: Mapping[str, tuple[int, Measured]]
    notes: tuple[str, ...] = ()

    def content(self) -> dict[str, Any]:
        """As JSON values."""
        metrics: dict[str, Any] = {}
        for name, own in self.found.items():
            shown: dict[str, Any] = {"refused": own} if isinstance(own, str) else {"value": own.value}
            if not isinstance(own, str) and not math.isnan(own.low):
                shown["interval"] = [own.low, own.high]
            values = {control: (found.get(name), count) for control, (count, found) in self.controls.items()}
            shown["controls"] = {
                control: {"value": None if estimate is None or isinstance(estimate, str) else estimate.value,
                          "samples": count}
                for control, (estimate, count) in values.items()
            }  # fmt: skip
            metrics[name] = shown | {"better": BETTER.get(name, "as the real")}
        return self.settings | {"level": LEVEL, "metrics": metrics, "notes": list(self.notes)}

    def show(self) -> None:
        """Prints the table, and under it what its numbers are of."""
        table = Table(title="controls with how many samples they have", title_justify="left")
        for header in ("", "value", f"{LEVEL:.0%} interval"):
            table.add_column(header, no_wrap=True)
        for control, (count, _) in self.controls.items():
            table.add_column(f"{control} {count}", no_wrap=True)
        for name, own in self.found.items():
            controls = [_shown(found.get(name)) for _, found in self.controls.values()]
            interval = (
                "-" if isinstance(own, str) or math.isnan(own.low) else f"{_number(own.low)} to {_number(own.high)}"
            )
            table.add_row(name + _ARROWS.get(BETTER.get(name, ""), ""), _shown(own), interval, *controls)
        Console(stderr=True, width=max(console.width, _WIDTH)).print(table)  # a number that is cut is none
        for line in self.lines():
            console.print(line, soft_wrap=True, highlight=False)

    def lines(self) -> list[str]:
        """What the numbers are of, in lines."""
        s = self.settings
        real, given = s["real"], s["samples"]
        lines = [
            f"{given['count']} samples {_drawn(given)}",
            f"against {real['count']} real ones of {real['data']} ({real['split']}), by features of {s['features']}; "
            f"Fréchet distances in {' and '.join(map(str, dict.fromkeys(s['dimensions'].values())))} dimensions",
        ]
        refused = [f"{name} is refused: {own}" for name, own in self.found.items() if isinstance(own, str)]
        return lines + refused + [f"note: {note}" for note in self.notes]


def sampling_facts(config: SamplingConfig) -> dict[str, Any]:
    """How samples are drawn, as JSON values."""
    return {
        "sampler": config.sampler,
        "solver": config.solver,
        "steps": None if config.solver == "dopri5" else config.sampling_steps,
        "guidance": config.cfg_scale,
        "guidance_interval": list(config.guidance_interval),
        "diffusion": [config.diffusion_form, config.diffusion_norm] if config.sampler == "sde" else None,
    }


def sampling_text(facts: Mapping[str, Any]) -> str:
    """`sampling_facts` in words."""
    how = f"{facts['sampler']}, {facts['solver']}"
    if facts["steps"] is not None:
        how += f", {facts['steps']} steps"
    low, high = facts["guidance_interval"]
    within = "" if (low, high) == (0.0, 1.0) else f" within times {low:g} to {high:g}"
    return f"{how}, guidance {facts['guidance']:g}{within}"


def _drawn(given: Mapping[str, Any]) -> str:
    if "file" in given:
        return f"of {given['file']}, drawn one does not know how"
    return f"of {given['checkpoint']} ({given['weights']}), drawn by {sampling_text(given)}, seed {given['seed']}"


def _shown(own: Any) -> str:
    if own is None:
        return "-"
    return "refused" if isinstance(own, str) else _number(own.value)


def _number(value: float) -> str:
    return f"{value:#.3g}".rstrip(".") if abs(value) < 1000 else f"{value:.0f}"

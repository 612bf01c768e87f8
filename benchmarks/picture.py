"""The picture at the top of README.md: `python benchmarks/picture.py`, from the rows of results/ and docs/images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from layersync_kernels.sit.files import new_figure, save_figure

HERE = Path(__file__).parent
IMAGES = HERE.parent / "docs" / "images"
CARD = HERE / "results" / "NVIDIA-H100-80GB-HBM3" / "results.jsonl"
CPU = HERE / "results" / "cpu-amd-epyc-2-threads.jsonl"
NAMES = {"eager": "eager", "compile": "torch.compile", "fused": "this library"}


def rows(path: Path, **wanted: str) -> dict[str, dict[str, Any]]:
    """The last row of each provider with these values."""
    found = map(json.loads, path.read_text().splitlines())
    return {row["provider"]: row for row in found if all(row.get(key) == value for key, value in wanted.items())}


def loss_ms(path: Path, case: str, kernel: str) -> list[float]:
    """Milliseconds of the loss, forward and backward, by `NAMES`."""
    found = rows(path, op="cosine_alignment", case=case, mode="both")
    return [found[kernel if name == "fused" else name]["p50_ms"] for name in NAMES]


def main() -> None:
    """Draws it."""
    steps = rows(CARD, op="trainer", case="SiT-XL/2 batch 64")
    panels = [
        ("A training step of SiT-XL/2\non an H100, images/s", [steps[name]["images_per_s"] for name in NAMES], ".0f"),
        ("The loss on an H100, ms\n65,536 x 1152 tokens, bf16", loss_ms(CARD, "65536x1152 bfloat16", "cuda"), ".2f"),
        ("The loss on two CPU cores, ms\n8192 x 1152 tokens, bf16", loss_ms(CPU, "8192x1152 bfloat16", "cpp"), ".1f"),
    ]
    figure = new_figure(11, 3.2)
    *bars, digits, motion = figure.subplots(1, 5, width_ratios=[1, 1, 1, 0.75, 0.9])
    for axes, (title, values, digits_shown) in zip(bars, panels, strict=True):
        drawn = axes.bar(list(NAMES.values()), values, color=["0.75", "0.55", "tab:blue"])
        axes.bar_label(drawn, [format(value, digits_shown) for value in values])
        axes.set_title(title, fontsize=9)
        axes.set_yticks([])
        axes.tick_params(axis="x", labelsize=8, length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.margins(y=0.12)
    motions = Image.open(IMAGES / "motion.png")
    walk = motions.crop((0, 0, motions.width // 4, motions.height))
    for axes, image, title in (
        (digits, Image.open(IMAGES / "images.png"), "Digits that a SiT drew\nafter 8 minutes of a core"),
        (motion, walk, "Motions that one drew\nafter 3,036 steps"),
    ):
        axes.imshow(image, cmap="gray")
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
    save_figure(figure, IMAGES / "results.png")


if __name__ == "__main__":
    main()

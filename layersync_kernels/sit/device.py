"""Device and precision that a run asks for."""

from __future__ import annotations

import torch

from ..errors import ConfigError, first_line


def resolve_device(name: str) -> torch.device:
    """`name` as a device that is there; "auto" is cuda if there is one, else cpu.

    Raises:
        ConfigError: unknown or absent device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # a build without CUDA asserts
        raise ConfigError(f"--device {name}: {first_line(error)}") from error
    return device


def resolve_precision(name: str, device: torch.device) -> torch.dtype | None:
    """The autocast type of `--precision`, or None for fp32.

    "auto" is bf16 on GPUs that have it, and on CPUs with AMX or AVX512_BF16: on a 2-core Zen 4 it trains SiT-S/2 (width
    384, batch 16, 14x14) at 25 against 17 images/s in fp32, is 1.1 times faster at width 192 and even at width 128.
    """
    if name == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        elif device.type == "cpu":
            fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        else:
            fast = False
        name = "bf16" if fast else "fp32"
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]

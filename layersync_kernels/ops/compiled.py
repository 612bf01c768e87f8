"""The backend "compile": an op's reference under torch.compile.

Each op, width and grad mode has a compiled function of its own. The width is therefore a constant of the generated
code, which a GPU's reductions want, and none of these functions comes near torch's limit of recompilations: the other
sizes become symbolic with the second value that torch sees, after which they cost no compilation any more.
"""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .autograd import runs_eagerly

_SWITCHES = ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")


def obstacle(device: str, triton: bool) -> str | None:
    """Why torch.compile cannot work on tensors of a type of device, or None.

    Args:
        device: type of the tensors' device.
        triton: whether Triton is installed.
    """
    for name in _SWITCHES:
        if os.environ.get(name) == "1":
            return f"torch.compile is switched off by {name}=1"
    if device == "cuda":
        return None if triton else "torch.compile needs Triton on a GPU, and triton is not installed"
    if device != "cpu":
        return f"torch.compile is used on the CPU and on GPUs, the tensors are on {device}"
    compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    found = shutil.which(shlex.split(compiler)[0])
    return None if found else f"torch.compile needs a C++ compiler on the CPU, and there is no {compiler}"


def plain(op: str, backend: str, reference: Callable[..., Any], width: int) -> Callable[..., Any]:
    """The reference as it stands, or compiled for the backend "compile".

    Where something traces the call already, torch.compile itself or another transform, it is as it stands, and becomes
    part of what is traced.

    Args:
        op: the public function that is called.
        backend: that the call resolved to.
        reference: a function of a module.
        width: channels of a row.
    """
    if backend != "compile" or not runs_eagerly() or _get_current_dispatch_mode_stack():
        return reference
    return _compiled(op, reference, int(width), torch.is_grad_enabled())


@functools.cache
def _compiled(op: str, reference: Any, width: int, grad: bool) -> Callable[..., Any]:
    # Dynamo counts recompilations, and remembers which sizes vary, by the code object and its name.
    name = f"{reference.__name__}_of_{op}_{width}_{'grad' if grad else 'no_grad'}"
    code = reference.__code__.replace(co_name=name)
    own = FunctionType(code, reference.__globals__, name, reference.__defaults__)
    own.__kwdefaults__ = reference.__kwdefaults__
    return torch.compile(own)

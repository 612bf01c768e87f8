"""A pytest plugin that counts what tests would compile on a card: `python -O -m pytest -p tests.bench.pretended_card`.

Every tensor is on the CPU, launches are recorded in place of being run, and so nothing comes out right: -O takes the
asserts away, which lets each test go on to its last launch. One that still fails may have launched less than it would.
"""

import contextlib
import json
import os
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch._inductor import compile_fx
from torch.overrides import TorchFunctionMode

from layersync_kernels.bench.card import launches

RECORDED = launches.record()  # before tests/conftest.py sees that there is no card, and asks Triton to interpret


class OnTheCpu(TorchFunctionMode):
    """What asks for a card gets the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        args = tuple("cpu" if isinstance(a, (str, torch.device)) and str(a).startswith("cuda") else a for a in args)
        if func is torch.Tensor.cuda:
            return args[0]
        return func(*args, **kwargs)


@contextlib.contextmanager
def nothing(*args, **kwargs):
    yield mock.MagicMock()


class Pretence:
    def __init__(self):
        self.failed = []
        self.ran = 0

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        with contextlib.ExitStack() as stack:
            for name in ("stream", "graph", "device"):
                stack.enter_context(mock.patch.object(torch.cuda, name, nothing))
            for name in ("Stream", "CUDAGraph", "current_stream", "synchronize", "_sleep", "Event"):
                stack.enter_context(mock.patch.object(torch.cuda, name, mock.MagicMock()))
            for name in ("memory_allocated", "max_memory_allocated", "reset_peak_memory_stats", "empty_cache"):
                stack.enter_context(mock.patch.object(torch.cuda, name, return_value=0))
            stack.enter_context(mock.patch.object(torch.testing, "assert_close"))
            stack.enter_context(mock.patch.object(compile_fx, "compile_fx", self.compile))
            stack.enter_context(OnTheCpu())
            return (yield)

    def compile(self, graph, inputs, *args, **kwargs):
        """Inductor's part, which would take the CPU minutes and is of another device."""
        return graph

    def pytest_runtest_logreport(self, report):
        if report.when == "call":
            self.ran += 1
            if report.failed:
                self.failed.append(report.nodeid)

    def pytest_sessionfinish(self):
        found = {"tests": self.ran, "failed": self.failed, "triton": RECORDED.counts()}
        Path(os.environ["PRETENDED_CARD_OUT"]).write_text(json.dumps(found))


def pytest_configure(config):
    from tests.support import backends

    backends.HAS_GPU = True
    backends.device_of = lambda backend: "cpu"
    config.pluginmanager.register(Pretence(), "pretence")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    for item in items:
        item.own_markers = [mark for mark in item.own_markers if "no NVIDIA GPU" not in str(mark.kwargs.get("reason"))]

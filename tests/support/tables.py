"""Tuning tables for tests: one that fits this machine, and a way to put it in force."""

import json

from layersync_kernels.ops import dispatch, tuning
from layersync_kernels.runtime import environment


def entry(op="layersync_loss", dtype="float32", widths="up to 256", choice="reference", **more):
    return {"op": op, "dtype": dtype, "class": widths, "choice": choice, "base": "cpp", "margin": 1.5, **more}


def table(*entries, device="cpu", **changes):
    """What `layersync tune` would write; `changes` are to its own fields, those of `machine` by name."""
    machine = tuning.identity(device)
    machine |= {name: changes.pop(name) for name in list(changes) if name in machine}
    date = "2026-01-02T03:04:05+00:00"
    return {"format": tuning.FORMAT, "date": date, "machine": machine, "entries": list(entries), **changes}


def put(monkeypatch, path, content):
    """Write a table (JSON values, or what a file is to hold as bytes) and have it read at the next choice."""
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    read(monkeypatch, path)


def read(monkeypatch, path):
    monkeypatch.setenv(environment.TUNING.name, str(path))
    dispatch.reset()

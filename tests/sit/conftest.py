from __future__ import annotations

import importlib

import pytest
import torch
from PIL import Image
from torch import nn


@pytest.fixture(autouse=True)
def _cache_of_the_test(tmp_path_factory, monkeypatch):
    """What a command keeps for later ones: neither read from the user's cache nor left there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def image_folder(tmp_path):
    """Two classes, three good files each: class a is black, class b is white."""
    for name, grey in (("a", 0), ("b", 255)):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("RGB", (10, 8), (grey, grey, grey)).save(tmp_path / name / f"{i}.png")
    return tmp_path


@pytest.fixture
def speech(tmp_path, monkeypatch):
    """A package of that name with random weights, in the layout of the real one."""
    package = tmp_path / "packages" / "resemblyzer"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('is found, and need not be imported')")
    lstm = nn.LSTM(40, 256, 3, batch_first=True)
    state = {f"lstm.{name}": value for name, value in lstm.state_dict().items()} | {"linear.bias": torch.zeros(256)}
    torch.save({"model_state": state}, package / "pretrained.pt")
    monkeypatch.syspath_prepend(str(package.parent))
    importlib.invalidate_caches()
    pytest.importorskip("librosa")

from __future__ import annotations

import pytest
from PIL import Image


@pytest.fixture
def image_folder(tmp_path):
    """Two classes, three good files each: class a is black, class b is white."""
    for name, grey in (("a", 0), ("b", 255)):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("RGB", (10, 8), (grey, grey, grey)).save(tmp_path / name / f"{i}.png")
    return tmp_path

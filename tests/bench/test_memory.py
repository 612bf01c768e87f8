"""`layersync bench memory`: exact peaks, and a provider that cannot run is named."""

import json

import torch

from layersync_kernels.bench import cli, memory


def test_the_peak_is_counted_to_the_byte():
    x = torch.randn(256, 256, requires_grad=True)

    def function(x):
        return x.exp().sum()  # the exponential is kept for the backward pass, which makes the gradient beside it

    assert memory.peak_bytes(function, [x]) == 2 * x.nbytes + 2 * 4  # and the loss with the gradient of it


def test_rows_and_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(memory, "CASES", (("gram_alignment", 64, 32, ("eager", "cpp", "triton")),))
    path = tmp_path / "rows.jsonl"
    assert cli.main(["memory", "--json", str(path)]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["case"], row["provider"]) for row in rows] == [
        (f"gram_alignment 64x32 {dtype}", name)
        for dtype in ("float32", "bfloat16")
        for name in ("eager", "cpp", "triton")
    ]
    for row in rows:
        assert row["op"] == "memory"
        assert row["machine"]["torch"] == torch.__version__
        if row["provider"] == "triton":
            assert row["peak_bytes"] is None
            assert "needs a GPU" in row["problem"]
        else:
            gradient = 64 * 32 * (4 if "float32" in row["case"] else 2)
            assert row["beyond_gradients_bytes"] == row["peak_bytes"] - gradient > 0
    out = capsys.readouterr().out
    assert f"{rows[0]['peak_bytes'] / 1e6:.1f}" in out
    assert "gram_alignment 64x32 float32: triton not measured: Triton needs a GPU" in out

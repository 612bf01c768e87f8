"""`layersync bench traffic --device h100`: rows that add up, predictions that say so, and what is skipped where."""

import json

import pytest

from layersync_kernels.bench import cli, gpu_traffic
from layersync_kernels.compiler import gpu_code, pretended_gpu
from layersync_kernels.errors import UserError

ARGUMENTS = ["traffic", "--device", "h100", "--model", "SiT-P/8", "--batch", "2"]


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.skipif(pretended_gpu.obstacle() is not None, reason=f"{pretended_gpu.obstacle()}")
def test_a_quick_run_counts_every_provider(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    path = tmp_path / "rows.jsonl"
    assert cli.main([*ARGUMENTS, "--quick", "--json", str(path)]) == 0
    *counted, registers, facts = rows_of(path)
    assert [(row["provider"], row["part"]) for row in counted] == [
        (name, "block alone") for name in gpu_traffic.GPU_PROVIDERS
    ]
    for row in counted:
        assert row["bytes"] == sum(kernel["bytes"] * kernel["times"] for kernel in row["kernels"])
        assert row["bytes"] == sum(row["bytes_by_group"].values())
        assert row["bytes_outside"] == row["bytes_by_group"]["ours"] + row["bytes_by_group"]["other"]
        assert (row["bytes_by_group"]["ours"] > 0) == row["provider"].startswith("fused")
        assert row["predicted_ms"] == pytest.approx(row["predicted_memory_ms"] + row["predicted_matmul_ms"])
    assert registers["kernels"] == []
    assert facts["prediction"] is True
    assert any("not a measurement" in assumption for assumption in facts["assumptions"])
    assert facts["mix_order_reduction"] in (True, False)
    out = capsys.readouterr().out
    assert "Prediction for 3 TB/s and 798 TFLOP/s (read from a card" in out
    assert "predicted" in out
    assert all(assumption[:40] in out for assumption in facts["assumptions"])
    assert max(map(len, out.splitlines())) <= 100


@pytest.fixture
def no_triton(monkeypatch):
    monkeypatch.setattr(gpu_traffic, "obstacle", lambda: "Triton is not installed")


def test_without_triton_what_runs_op_by_op_is_counted_and_the_rest_named(no_triton, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(gpu_code, "obstacle", lambda: "there is no cuobjdump")
    path = tmp_path / "rows.jsonl"
    assert cli.main([*ARGUMENTS, "--bandwidth", "1.5", "--matmul", "100", "--json", str(path)]) == 0
    *counted, _, facts = rows_of(path)
    rows = {(row["provider"], row["part"]): row for row in counted}
    parts = ("block alone", "block", "step", "LayerSync", "REPA")
    assert set(rows) == {(name, part) for name in ("eager", "fused") for part in parts}
    for name in ("eager", "fused"):
        step, block = rows[name, "step"], rows[name, "block"]
        assert step["predicted_images_per_s"] == pytest.approx(2e3 / step["predicted_ms"])
        assert 6 * block["bytes"] < step["bytes"] < 9 * block["bytes"]  # six blocks, and what is around them
        assert rows[name, "LayerSync"]["flops"] == 0
        assert rows[name, "REPA"]["flops"] > 0
    md = facts["md_bytes"]
    assert rows["fused", "LayerSync"]["bytes"] < 3 * md < rows["eager", "LayerSync"]["bytes"] / 10
    assert facts["skipped"] == [
        "torch.compile is not counted: Triton is not installed",
        "registers and spills are not read: there is no cuobjdump",
    ]
    assert facts["rates_from"] == "bandwidth and matmul rate as given"
    out = capsys.readouterr().out
    assert "skipped: torch.compile is not counted: Triton is not installed" in out
    assert "ms, images/s and the share of the time that memory holds up are predicted" in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 100


def test_what_cannot_be_counted_is_refused_by_name():
    for arguments, message in (
        (["traffic", "--device", "h900"], "--device h900: expected one of auto, cpu, cuda, h100, a100, h200, b200"),
        (["ops", "--device", "h100"], "--device h100: nothing runs on a card by name"),
        (["traffic", "--device", "h100", "--model", "SiT-Q/2"], "SiT-Q/2: expected one of SiT-XL/2"),
        (["traffic", "--device", "h100", "--batch", "0"], "--batch 0"),
        (["traffic", "--device", "h100", "--bandwidth", "0"], "--bandwidth=0.0: expected a rate above 0"),
    ):
        with pytest.raises(UserError, match=message):
            cli.main(arguments)

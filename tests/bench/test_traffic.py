"""`layersync bench traffic`: its rows carry exact counts, and its tables show them."""

import json

import pytest

from layersync_kernels.bench import cli
from layersync_kernels.errors import UserError


def test_rows_and_tables(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    path = tmp_path / "rows.jsonl"
    arguments = ["traffic", "--model", "SiT-P/8", "--batch", "2", "--precision", "fp32", "--json", str(path)]
    assert cli.main(arguments) == 0
    rows = {row["provider"]: row for row in map(json.loads, path.read_text().splitlines())}
    plain = {"eager", "fused", "fused, recompute"}
    aligned = {"eager + LayerSync", "fused + LayerSync"}
    assert set(rows) == {*plain, *aligned, "ideal"}
    md = rows["ideal"]["md_bytes"]
    assert md == 2 * 16 * 128 * 4  # batch, tokens, width, bytes
    assert rows["ideal"]["block_bytes"] == 40 * md
    for name in plain | aligned:
        row = rows[name]
        assert row["step_bytes"] == row["step_bytes_read"] + row["step_bytes_written"]
        assert row["step_bytes"] == sum(row["step_bytes_by_kind"].values())
        assert row["traffic_vs_eager"] == pytest.approx(row["step_bytes"] / rows["eager"]["step_bytes"])
        assert ("alignment_bytes" in row) == (name in aligned)
        assert ("block_bytes" in row) == (name in plain)
    assert rows["eager + LayerSync"]["alignment_bytes"] > 40 * md  # twenty tensors forward, twenty backward
    out = capsys.readouterr().out
    assert "SiT-P/8 batch 2, fp32" in out
    assert all(name in out for name in rows)


def test_what_cannot_be_counted_is_refused_by_name():
    for arguments, message in (
        (["--model", "SiT-Q/2"], "SiT-Q/2: expected one of SiT-XL/2"),
        (["--batch", "0"], "--batch 0"),
    ):
        with pytest.raises(UserError, match=message):
            cli.main(["traffic", *arguments])

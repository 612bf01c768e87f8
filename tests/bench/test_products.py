"""`layersync bench products`: every way beside the bare products, in each dtype."""

import json

from layersync_kernels.bench import cli, products


def test_rows_and_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    for name, value in {"TOKENS": 256, "WIDTH": 32, "ROUNDS": 2, "PROVIDERS": ("eager", "cpp", "triton")}.items():
        monkeypatch.setattr(products, name, value)
    path = tmp_path / "rows.jsonl"
    assert cli.main(["products", "--json", str(path)]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["case"], row["provider"]) for row in rows] == [
        (f"256x32 {dtype}", name)
        for dtype in ("float32", "bfloat16")
        for name in ("products", "eager", "cpp", "triton")
    ]
    for row in rows:
        if row["provider"] == "triton":
            assert row["p50_ms"] is row["over_products"] is row["over_eager"] is None
            assert "needs a GPU" in row["problem"]
        else:
            assert row["p50_ms"] > 0
            assert row["over_products"] > 0
        assert row["over_products"] == 1 or row["provider"] != "products"
        assert row["over_eager"] == 1 or row["provider"] != "eager"
    out = capsys.readouterr().out
    assert all(word in out for word in ("256x32 bfloat16", "products", "triton not measured"))

"""The benchmark engine: it refuses to time what is wrong, and its numbers are what they say."""

import json

import pytest
import torch

from layersync_kernels import layersync_loss
from layersync_kernels.bench import cli, engine
from layersync_kernels.bench.cases import OPS, Case, cases, eager_loss, provider

SMALL = Case("cosine_alignment", 64, 32, torch.float32, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
def test_a_right_provider_passes_the_gate(op, dtype):
    case = Case(op, 512, 64, dtype, "cpu")
    assert engine.check(case, provider("cpp", case)) is None


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (lambda s, t: layersync_loss(s, t) * (1 + 1e-5), "output 1"),
        (lambda s, t: layersync_loss(s, t) + 1e-4 * (s - s.detach()).sum(), "gradient 1"),
        (lambda s, t: layersync_loss(s, t) * float("nan"), "output 1"),
    ],
)
def test_a_wrong_provider_is_named_and_not_timed(wrong, what, monkeypatch):
    assert f"wrong {what}" in engine.check(SMALL, wrong)
    monkeypatch.setattr(engine, "provider", lambda name, case: wrong if name == "cpp" else eager_loss)
    rows = {row.provider: row for row in engine.measure(SMALL, ["eager", "cpp"], modes=["both"], rounds=2, warmup=0)}
    assert rows["cpp"].p50_ms is None
    assert rows["cpp"].vs_eager is None
    assert f"wrong {what}" in rows["cpp"].problem
    assert rows["eager"].p50_ms > 0


class CompilationError(Exception):
    """No RuntimeError, as Triton's is none."""


def fails_when_made():
    raise CompilationError("no such instruction")


def fails_when_called():
    def run(student, teacher):
        raise CompilationError("no such instruction")

    return run


def fails_when_timed():
    """It gets through the check and the count of saved bytes, which call it once each."""
    calls = iter(range(2))

    def run(student, teacher):
        if next(calls, None) is None:
            raise CompilationError("no such instruction")
        return layersync_loss(student, teacher)

    return run


@pytest.mark.parametrize("make", [fails_when_made, fails_when_called, fails_when_timed])
def test_a_provider_that_fails_is_a_row_and_the_others_go_on(make, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(engine, "provider", lambda name, case: make() if name == "triton" else provider(name, case))
    path = tmp_path / "rows.jsonl"
    arguments = ["ops", "--device", "cpu", "--ops", "cosine_alignment", "--size", "64", "32", "--rounds", "1"]
    assert cli.main([*arguments, "--providers", "triton", "eager", "--json", str(path)]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    failed = [row for row in rows if row["provider"] == "triton"]
    assert {row["mode"] for row in failed} == {"forward", "backward", "both"}
    assert {row["problem"] for row in failed} == {"CompilationError: no such instruction"}
    assert {row["p50_ms"] for row in failed} == {None}
    assert all(row["p50_ms"] > 0 for row in rows if row["provider"] == "eager")
    assert capsys.readouterr().out.count("64x32 float32: triton not timed: CompilationError") == 1


def test_an_interrupt_and_an_unknown_provider_end_the_run(monkeypatch):
    with pytest.raises(ValueError, match="unknown provider"):
        list(engine.measure(SMALL, ["jax"]))

    def interrupted(name, case):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "provider", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(engine.measure(SMALL, ["eager"]))


def test_rows_carry_bytes_bandwidth_and_ratios():
    rows = list(engine.measure(SMALL, ["eager", "cpp"], rounds=5, warmup=1))
    assert [(row.mode, row.provider) for row in rows if row.problem is None] == [
        (mode, name) for mode in ("forward", "backward", "both") for name in ("copy", "eager", "cpp")
    ]
    for row in rows:
        tensors = 2 if row.provider == "copy" else {"forward": 2, "backward": 3, "both": 5}[row.mode]
        assert row.bytes_moved == tensors * 64 * 32 * 4
        assert row.p20_ms <= row.p50_ms <= row.p80_ms
        assert row.gb_per_s == pytest.approx(row.bytes_moved / row.p50_ms / 1e6)
        if row.provider == "eager":
            assert row.vs_eager == 1
        assert row.machine["torch"] == torch.__version__
    saved = {row.provider: row.saved_bytes for row in rows}
    assert saved["cpp"] == 64 * 12 + 4
    assert saved["eager"] > SMALL.tensor_bytes


def test_a_provider_that_cannot_run_says_so():
    (row,) = [row for row in engine.measure(SMALL, ["triton"], modes=["forward"], rounds=1) if row.provider == "triton"]
    assert "needs a GPU" in row.problem
    with pytest.raises(ValueError, match="unknown provider 'jax'"):
        provider("jax", SMALL)


def test_the_suites_cover_the_sizes_of_the_claims():
    names = {case.name for case in cases("cpu")}
    assert {"8192x1152 float32", "8192x1152 bfloat16", "32768x1152 float32"} <= names
    assert {case.op for case in cases("cpu", quick=True)} == set(OPS)
    assert {(case.rows, case.width) for case in cases("cpu", ops=("gated_residual_norm",))} >= {(4096, 1152)}
    assert cases("cuda")[0].name == "65536x1152 bfloat16"


def test_the_command_writes_json_lines_and_fails_on_a_wrong_result(tmp_path, monkeypatch, capsys):
    arguments = ["ops", "--device", "cpu", "--ops", "cosine_alignment", "--size", "64", "32"]
    arguments += ["--providers", "eager", "cpp", "--modes", "both"]
    path = tmp_path / "results" / "rows.jsonl"
    assert cli.main([*arguments, "--rounds", "2", "--json", str(path)]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["provider"] for row in rows} == {"copy", "eager", "cpp"}
    assert "64x32 float32" in capsys.readouterr().out
    monkeypatch.setattr(engine, "provider", lambda name, case: lambda s, t: 2 * layersync_loss(s, t))
    assert cli.main([*arguments, "--rounds", "2"]) == 1
    assert "wrong output 1" in capsys.readouterr().out


def test_the_trainer_rows_have_every_provider_and_ratio():
    from layersync_kernels.bench import throughput as trainer

    rows = {row["provider"]: row for row in trainer.measure("cpu", quick=True)}
    assert set(rows) == {
        "fused",
        "off",
        "applied",
        "eager",
        "compile",
        "published",
        "light",
        "fused fp32",
        "eager fp32",
    }
    assert rows["off"]["vs_off"] == rows["eager"]["vs_eager"] == rows["eager fp32"]["vs_eager"] == 1
    for row in rows.values():
        assert row["low"] <= row["images_per_s"] <= row["high"]

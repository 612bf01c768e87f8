"""The benchmark engine: it refuses to time what is wrong, and its numbers are what they say."""

import dataclasses
import functools
import json

import pytest
import torch
from torch._inductor import compile_fx

from layersync_kernels import layersync_loss
from layersync_kernels.bench import cli, engine, journal, machine, report
from layersync_kernels.bench.cases import MODES, OPS, Case, cases, eager_loss, provider
from layersync_kernels.errors import UserError

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
    out = capsys.readouterr().out
    assert "64x32 float32: triton not timed: CompilationError" in out
    assert out.count("triton not timed") == 1  # of three modes of two cases


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


class OutOfResources(Exception):
    """Neither a RuntimeError nor torch's, as Triton's."""


@pytest.mark.parametrize("error", [OutOfResources("shared memory"), torch.OutOfMemoryError("20 GiB")])
def test_a_case_that_does_not_fit_is_rows_and_the_next_one_goes_on(error, monkeypatch, tmp_path):
    draw = Case.inputs

    def inputs(self, seed):
        if self.dtype == torch.float32:
            raise error
        return draw(self, seed)

    monkeypatch.setattr(Case, "inputs", inputs)
    path = tmp_path / "rows.jsonl"
    arguments = ["ops", "--device", "cpu", "--ops", "cosine_alignment", "--size", "64", "32", "--rounds", "1"]
    assert cli.main([*arguments, "--modes", "both", "--providers", "eager", "cpp", "--json", str(path)]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    problem = f"the case itself fails: {type(error).__name__}: {error}"
    assert [(r["provider"], r["problem"]) for r in rows if "float32" in r["case"]] == [
        ("eager", problem), ("cpp", problem),
    ]  # fmt: skip
    assert [r["provider"] for r in rows if "bfloat16" in r["case"] and r["p50_ms"] > 0] == ["copy", "eager", "cpp"]


LOSING = ["ops", "--device", "cpu", "--ops", "cosine_alignment", "--size", "64", "32", "--rounds", "1"]
LOSING += ["--providers", "eager", "triton", "cpp"]


@pytest.mark.parametrize("make", [fails_when_made, fails_when_called, fails_when_timed])
def test_a_lost_device_ends_the_case_and_a_new_process_goes_on(make, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(engine, "provider", lambda name, case: make() if name == "triton" else provider(name, case))
    monkeypatch.setattr(engine, "device_lost", lambda device: True)
    path = tmp_path / "rows.jsonl"
    assert cli.main([*LOSING, "--json", str(path), "--resume"]) == engine.DEVICE_LOST
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["case"] for row in rows} == {"64x32 float32"}
    due = {(mode, name) for mode in MODES for name in ("eager", "triton", "cpp")}
    assert {(row["mode"], row["provider"]) for row in rows} == due
    assert {row["problem"] for row in rows if row["provider"] == "triton"} == {"CompilationError: no such instruction"}
    assert {row["problem"] for row in rows if row["provider"] != "triton"} == {
        "triton has left the device unusable before its turn"
    }
    monkeypatch.setattr(engine, "device_lost", lambda device: False)  # the next process
    assert cli.main([*LOSING, "--json", str(path), "--resume"]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()][len(rows) :]
    assert {row["case"] for row in rows} == {"64x32 bfloat16"}
    assert {row["provider"] for row in rows if row["problem"] is None} == {"copy", "eager", "cpp"}


def test_resume_measures_what_is_missing_and_what_is_of_another_machine(tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.jsonl"
    arguments = [*LOSING[:-3], "eager", "cpp", "--json", str(path), "--resume"]
    assert cli.main(arguments) == 0
    whole = path.read_text().splitlines()
    assert cli.main(arguments) == 0
    assert path.read_text().splitlines() == whole
    path.write_text("\n".join([*whole[:4], whole[4][:20]]))  # forward, one of backward, and one that was cut short
    assert cli.main(arguments) == 0
    rows = report.read_json(path)[4:]
    assert [(r["case"], r["mode"], r["provider"]) for r in rows] == [
        (r["case"], r["mode"], r["provider"]) for r in map(json.loads, whole[3:])
    ]
    monkeypatch.setattr(machine, "source_digest", lambda: "another")
    before = len(path.read_text().splitlines())
    assert cli.main(arguments) == 0
    assert len(path.read_text().splitlines()) == before + len(whole)
    with pytest.raises(UserError, match="name the file that holds the rows by --json"):
        cli.main([*LOSING, "--resume"])


def test_a_case_that_has_killed_its_process_is_passed_over(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    journal.now_path(path).write_text(json.dumps(["cosine_alignment", "64x32 float32", "cpu"]))
    arguments = [*LOSING[:-3], "eager", "--modes", "both", "--json", str(path), "--resume"]
    assert cli.main(arguments) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["case"], r["provider"], r["problem"]) for r in rows] == [
        ("64x32 float32", "eager", "the process that measured this case died"),
        ("64x32 bfloat16", "copy", None),
        ("64x32 bfloat16", "eager", None),
    ]
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_case_is_measured_again(tmp_path, monkeypatch):
    def interrupted(name, case):
        assert json.loads(journal.now_path(path).read_text())[1] == case.name
        raise KeyboardInterrupt

    path = tmp_path / "rows.jsonl"
    monkeypatch.setattr(engine, "provider", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cli.main([*LOSING, "--json", str(path), "--resume"])
    assert list(tmp_path.iterdir()) == []


def test_a_case_is_compiled_once(monkeypatch):
    compiled = []

    def count(graph, inputs, **options):
        compiled.append(tuple(inputs[0].shape))
        return graph

    monkeypatch.setattr(compile_fx, "compile_fx", count)
    case = Case("cosine_alignment", 512, 32, torch.float32, "cpu")
    rows = list(engine.measure(case, ["eager", "compile", "inductor"], rounds=2, warmup=1))
    assert {row.provider for row in rows if row.problem is None} == {"copy", "eager", "compile", "inductor"}
    assert {row.checked_rows for row in rows if row.provider == "compile"} == {512}
    assert compiled == [(512, 32)] * 2  # one for each of the two compilers, for check and all modes together


def test_a_case_too_large_for_fp64_is_checked_on_fewer_rows(monkeypatch):
    case = Case("modulated_layer_norm", 4096, 32, torch.float32, "cpu")
    assert engine.truth_of(case).rows == 4096
    monkeypatch.setattr(engine, "free_bytes", lambda device: 2 * 8 * 16 * (1024 * 32 + 3 * 2 * 4 * 32))
    truth = engine.truth_of(case)
    assert truth.rows == 1024
    assert truth.inputs[0].shape == (4, 256, 32)


def test_inputs_are_drawn_where_they_are_used(monkeypatch):
    drawn, randn, generator = [], torch.randn, torch.Generator

    def on_the_cpu(shape, *, generator, device):
        drawn.append(device)
        return randn(shape, generator=generator)

    monkeypatch.setattr(torch, "randn", on_the_cpu)
    monkeypatch.setattr(torch, "Generator", lambda device: drawn.append(device) or generator())
    inputs = Case("gated_residual_norm", 512, 32, torch.bfloat16, "cuda").inputs(0)
    assert drawn == ["cuda"] * 6
    assert [x.dtype for x in inputs] == [torch.bfloat16] * 5


def test_a_gradient_with_a_kink_may_have_values_beside_it_on_the_other_side(monkeypatch):
    """Rounding moves a pair over the margin: what that does to the gradient is no error."""
    case = Case("gram_alignment", 512, 64, torch.float32, "cpu")
    op = OPS["gram_alignment"]
    wide = functools.partial(op.eager, margin=0.1 * (1 + 2.0**-7))
    plain = engine.truth_of(case)
    monkeypatch.setitem(OPS, "gram_alignment", dataclasses.replace(op, beside=(wide,)))
    allowed = engine.truth_of(case).allowed
    assert allowed[0] == plain.allowed[0] < 1e-5
    assert allowed[1] > 100 * plain.allowed[1]
    assert engine.check(case, op.eager, plain) is None
    assert engine.check(case, wide, plain).startswith("wrong output 1")
    assert len(op.beside) == 2

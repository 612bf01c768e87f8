"""`layersync tune`: what is slow or wrong is not chosen, what fails is a row, and "auto" follows what is written."""

import functools
import json
import time

import pytest
import torch

from layersync_kernels import cli, layersync_loss
from layersync_kernels.bench import candidates, engine, tune
from layersync_kernels.bench.candidates import Candidate, Entry, Shape, decide
from layersync_kernels.bench.cases import OPS, Case, cases
from layersync_kernels.ops import compiled, dispatch, native, tuning
from layersync_kernels.runtime import machine

from ..support.tables import read, table

SMALL = Case("cosine_alignment", 2048, 32, torch.float32, "cpu")
BOTH = {"cpp": None, "compile": None}


@pytest.fixture(autouse=True)
def anew(monkeypatch):
    """No interference by other processes, whose share of the cores is no time of this one."""
    monkeypatch.setattr(time, "perf_counter", time.process_time)
    monkeypatch.setattr(dispatch, "_environment_backend", "auto")
    monkeypatch.setattr(tune, "keep_freed_memory", lambda: False)
    yield
    monkeypatch.undo()
    dispatch.reset()


def slow(student, teacher):
    """Right, after twenty times the work."""
    for _ in range(20):
        loss = layersync_loss(student, teacher, backend="reference")
    return loss


def quick(student, teacher):
    return layersync_loss(student, teacher, backend="reference")


def wrong(student, teacher):
    return quick(student, teacher) * (1 + 1e-4)


class CompilationError(Exception):
    """No RuntimeError, as Triton's is none."""


def failing(student, teacher):
    raise CompilationError("out of resource: shared memory")


def failing_late():
    calls = iter(range(5))

    def run(student, teacher):
        if next(calls, None) is None:
            raise CompilationError("out of resource: shared memory")
        return quick(student, teacher)

    return run


@pytest.fixture
def provided(monkeypatch):
    """Have stand-ins run for the candidates, on one small case with the rules' choice "cpp"."""
    monkeypatch.setattr(dispatch, "rule", lambda *args: dispatch.Choice("cpp", "by rule"))

    def provide(measured=BOTH, suite=(SMALL,), **functions):
        monkeypatch.setattr(candidates, "provider", lambda name, case: functions[name])
        monkeypatch.setattr(tune, "suite", lambda device, quick: list(suite))
        monkeypatch.setattr(tune, "candidates_of", lambda case: dict(measured))

    return provide


def entry_of(measured=BOTH, case=SMALL):
    found = Entry("layersync_loss", "float32", tuning.CLASSES[0], "cpp", [candidates.measure(case, measured, rounds=7)])
    decide(found)
    return found


def test_a_candidate_made_slow_is_not_chosen(provided):
    provided(cpp=quick, compile=slow)
    found = entry_of()
    assert (found.choice, found.base, found.margin) == ("cpp", "cpp", 1.0)
    assert found.shapes[0].candidates["compile"].ratio < 0.5


def test_one_that_is_faster_takes_the_place_of_a_slow_choice_of_the_rules(provided):
    provided(cpp=slow, compile=quick)
    found = entry_of()
    assert (found.choice, found.base) == ("compile", "cpp")
    assert found.margin == found.shapes[0].candidates["compile"].ratio > 2


def test_equal_candidates_change_nothing(provided):
    provided(cpp=quick, compile=quick)
    assert entry_of().choice == "cpp"


def test_a_wrong_candidate_is_reported_and_never_chosen_however_fast(provided):
    provided(cpp=slow, compile=wrong)
    found = entry_of()
    assert found.choice == "cpp"
    assert found.shapes[0].candidates["compile"].problem.startswith("wrong output 1")
    provided(cpp=wrong, compile=slow)
    found = entry_of()
    assert (found.choice, found.base) == ("compile", "compile")


@pytest.mark.parametrize("make", [lambda: failing, failing_late], ids=["at once", "late"])
def test_a_failing_candidate_is_a_row_and_the_others_go_on(provided, make):
    for names in (("cpp", "compile"), ("compile", "cpp")):
        provided(**{names[0]: make(), names[1]: quick})
        found = entry_of()
        assert found.choice == names[1]
        assert "CompilationError: out of resource" in found.shapes[0].candidates[names[0]].problem
        assert found.shapes[0].candidates[names[0]].ratio is None


def test_a_case_that_does_not_fit_is_a_row(provided, monkeypatch):
    def out_of_memory(self, seed):
        raise torch.OutOfMemoryError("tried to allocate")

    provided(cpp=quick, compile=quick)
    monkeypatch.setattr(Case, "inputs", out_of_memory)
    found = entry_of()
    assert found.choice is None
    assert {result.problem for result in found.shapes[0].candidates.values()} == {
        "the case itself fails: OutOfMemoryError: tried to allocate"
    }


def shape(cpp=1.0, other=1.0, spread=0.0, kept=0, problem=None):
    return Shape(
        256, 32, 1600,
        {"cpp": Candidate(1.0, cpp, 0.0, 100), "compile": Candidate(1.0, other, spread, 100 + kept, problem)},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("shapes", "choice", "margin"),
    [
        ([shape(other=1.5)], "compile", 1.5),
        ([shape(other=1.5), shape(other=1.2)], "compile", 1.2),
        ([shape(other=1.5), shape(other=0.9)], "cpp", 1.0),
        ([shape(other=1.02)], "cpp", 1.0),
        ([shape(other=1.04)], "compile", 1.04),
        ([shape(other=1.3, spread=0.4)], "cpp", 1.0),
        ([shape(other=1.3, spread=0.2)], "compile", 1.3),
        ([shape(other=1.5, kept=101)], "cpp", 1.0),
        ([shape(other=1.5, kept=99)], "compile", 1.5),
        ([shape(other=1.5), shape(other=None, problem="wrong")], "cpp", 1.0),
        ([shape(cpp=None)], "compile", 1.0),
        ([shape(cpp=None, other=None)], None, 1.0),
    ],
)
def test_the_choice_is_faster_everywhere_by_more_than_noise_and_keeps_no_more(shapes, choice, margin):
    found = Entry("layersync_loss", "float32", tuning.CLASSES[0], "cpp", shapes)
    decide(found)
    assert (found.choice, found.margin) == (choice, margin)


def test_each_candidate_begins_a_round_as_often_as_the_others(provided, monkeypatch):
    turns = []
    provided(cpp="cpp", compile="compile")
    monkeypatch.setattr(candidates, "check", lambda case, function, truth: None)
    monkeypatch.setattr(candidates, "saved_bytes", lambda function, inputs: 0)
    monkeypatch.setattr(candidates, "timed", lambda timer, function, *rest: turns.append(function) or 1.0)
    candidates.measure(SMALL, BOTH, rounds=4)
    assert turns == 3 * ["cpp", "compile", "compile", "cpp"]


def run(*arguments):
    return cli.main(["tune", "--device", "cpu", *map(str, arguments)])


def test_auto_follows_what_was_measured(provided, monkeypatch, tmp_path, capsys):
    path = tmp_path / "folder" / "table.json"
    provided(cpp=slow, compile=quick)
    monkeypatch.setenv("COLUMNS", "200")
    assert run("--quick", "--out", path) == 0
    out = capsys.readouterr().out
    assert f"written: {path}" in out
    assert f"LAYERSYNC_TUNING={path} has it read" in out
    assert "1 cases, compiled and measured in about 8 s" in out
    content = json.loads(path.read_text())
    assert content["machine"] == tuning.identity("cpu")
    assert content["threads"] == torch.get_num_threads()
    (found,) = content["entries"]
    assert found["shapes"][0]["candidates"]["cpp"].keys() == {"p50_ms", "ratio", "spread", "saved_bytes", "problem"}
    read(monkeypatch, path)
    choice = dispatch.choose("layersync_loss", "auto", "cpu", torch.float32, width=32)
    assert choice.backend == "compile"
    assert f"{found['margin']:.2f} times as fast as cpp ({path})" in choice.reason
    assert dispatch.choose("layersync_loss", "auto", "cpu", torch.float32, width=512).reason == "by rule"


def test_the_table_is_where_auto_looks(provided, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    provided(cpp=slow, compile=quick)
    assert run() == 0
    read(monkeypatch, "auto")
    assert dispatch.choose("layersync_loss", "auto", "cpu", torch.float32, width=32).backend == "compile"


def test_a_wrong_candidate_makes_the_command_fail(provided, tmp_path, capsys):
    provided(cpp=quick, compile=wrong)
    assert run("--out", tmp_path / "table.json") == 1
    assert "layersync_loss 2048x32 float32: compile: wrong output 1" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "table.json").exists()


def test_an_interrupt_leaves_the_old_table_whole(provided, monkeypatch, tmp_path, capsys):
    path = tmp_path / "table.json"
    path.write_text("old")

    def interrupted(student, teacher):
        raise KeyboardInterrupt

    provided(cpp=quick, compile=interrupted)
    assert run("--out", path) == 130
    assert path.read_text() == "old"
    provided(cpp=quick, compile=quick)
    monkeypatch.setattr("os.replace", interrupted)
    assert run("--out", path) == 130
    assert [file.name for file in tmp_path.iterdir()] == ["table.json"]
    assert path.read_text() == "old"


def test_a_place_that_cannot_be_written_is_told(provided, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    provided(cpp=quick, compile=quick)
    assert run("--out", tmp_path / "file" / "table.json") == 1
    err = capsys.readouterr().err
    assert "the table cannot be written" in err
    assert "--out FILE" in err


def test_what_cannot_run_here_is_told_and_nothing_is_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(native, "cpp", lambda: native.Library(False, "not built: no compiler"))
    monkeypatch.setattr(compiled, "obstacle", lambda device, triton: "torch.compile needs a C++ compiler on the CPU")
    monkeypatch.setenv("COLUMNS", "300")
    assert run("--out", tmp_path / "table.json") == 0
    out = capsys.readouterr().out
    assert (
        "layersync_loss has reference alone here; cpp: the C++ extension is not built: no compiler; "
        "compile: torch.compile needs a C++ compiler" in out
    )
    assert "nothing was written" in out
    assert not (tmp_path / "table.json").exists()


def test_without_an_extension_the_reference_is_measured_and_the_reason_is_a_row(monkeypatch):
    monkeypatch.setattr(native, "cpp", lambda: native.Library(False, "not built: no compiler"))
    assert candidates.candidates_of(SMALL) == {
        "reference": None, "cpp": "the C++ extension is not built: no compiler", "compile": None,
    }  # fmt: skip
    measured = candidates.candidates_of(SMALL) | {"compile": "not in this test"}
    found = candidates.measure(SMALL, measured, rounds=5)
    assert found.candidates["reference"].ratio == 1
    assert found.candidates["cpp"].problem == "the C++ extension is not built: no compiler"


def test_a_gpu_that_is_not_there_is_told(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for cuda, message in ((None, "is a build without CUDA"), ("13.0", "sees no GPU")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert cli.main(["tune", "--device", "cuda"]) == 1
        assert f"--device cuda: torch {torch.__version__} {message}" in " ".join(capsys.readouterr().err.split())


def test_on_a_gpu_the_epilogues_are_candidates_of_gelu_in_half_precision(monkeypatch):
    monkeypatch.setattr(native, "cuda", lambda: native.Library(True, "built"))
    monkeypatch.setattr(machine, "version_of", lambda package, missing="none": missing)
    found = candidates.candidates_of(Case("gelu_mlp", 256, 64, torch.bfloat16, "cuda"))
    assert list(found) == ["triton", "cuda", "compile", "cublaslt", "quack"]
    assert found["cuda"] is found["cublaslt"] is None
    if found["triton"] is None:
        assert found["quack"] == "quack-kernels is not installed; pip install 'layersync_kernels[quack]'"
    found = candidates.candidates_of(Case("gelu_mlp", 256, 64, torch.float32, "cuda"))
    assert "half precision" in found["cublaslt"]
    assert "cublaslt" not in candidates.candidates_of(Case("spatial_norm", 256, 64, torch.bfloat16, "cuda"))


@pytest.mark.parametrize("device", tuning.DEVICES)
def test_the_suite_has_every_op_and_class_and_the_quick_one_every_op(device):
    full, fewer = (candidates.suite(device, quick) for quick in (False, True))
    assert (
        {case.op for case in full}
        == {case.op for case in fewer}
        == {case.op for case in cases(device)} - {"padded_attention"} | {"self_attention"}
    )
    assert len(fewer) * 3 <= len(full) + 4
    assert {tuning.width_class(case.width) for case in full} == set(tuning.CLASSES)
    for case in full:
        case.dtype.itemsize  # noqa: B018
        assert candidates.function_of(case) in {name for op in dispatch.registry.ops() for name in op.functions}
        assert case.rows % 256 == 0


@pytest.mark.skipif(not native.cpp().loaded, reason="needs the C++ kernels")
def test_the_real_candidates_are_right_and_measured():
    for op in ("cosine_alignment", "spatial_norm", "self_attention"):
        case = Case(op, 256, 64, torch.float32, "cpu")
        found = candidates.measure(case, {"cpp": None, "reference": None}, rounds=2)
        for result in found.candidates.values():
            assert result.problem is None
            assert result.ratio > 0
        assert found.input_bytes == sum(x.numel() * 4 for x in case.inputs(0))
        provided = candidates.provider("cpp", case)
        assert provided.func is OPS[op].fused if isinstance(provided, functools.partial) else True
        assert engine.check(case, provided) is None


def test_a_table_that_was_written_is_one_that_is_read(provided, monkeypatch, tmp_path):
    path = tmp_path / "table.json"
    provided(cpp=quick, compile=slow)
    assert run("--out", path) == 0
    assert json.loads(path.read_text()).keys() >= table().keys()
    read(monkeypatch, path)
    found = tuning.state("cpu")
    assert found.table.entries[("layersync_loss", "float32", "up to 256")] == ("cpp", "cpp", 1.0)

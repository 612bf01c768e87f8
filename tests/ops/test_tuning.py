"""The tuning table: "auto" follows it, and is never misled by one that is damaged, foreign or outdated."""

import json
import os
import subprocess
import sys
import time
import warnings

import pytest
import torch
from torch._dynamo.testing import EagerAndRecordGraphs

from layersync_kernels import doctor, layersync_loss
from layersync_kernels.functional import cosine, gated_residual_norm
from layersync_kernels.ops import dispatch, native, registry, tuning
from layersync_kernels.runtime import environment
from layersync_kernels.sit import files

from ..support.tables import entry, put, read, table

FP32 = torch.float32


@pytest.fixture(autouse=True)
def anew(monkeypatch):
    monkeypatch.setattr(dispatch, "_environment_backend", "auto")
    yield
    monkeypatch.undo()
    dispatch.reset()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "table.json"


def choice(function="layersync_loss", dtype=FP32, width=64, **more):
    return dispatch.choose(function, "auto", "cpu", dtype, width=width, **more)


@pytest.mark.parametrize(
    ("width", "name"), [(1, 0), (256, 0), (257, 1), (2048, 1), (2049, 2), (1 << 40, 2)]
)  # fmt: skip
def test_a_width_has_a_class(width, name):
    assert tuning.width_class(width) == tuning.CLASSES[name]


def test_a_width_of_a_class_is_in_it():
    assert [tuning.width_class(tuning.width_of(name)) for name in tuning.CLASSES] == list(tuning.CLASSES)


def test_auto_follows_the_table_where_it_says_something(monkeypatch, path):
    put(monkeypatch, path, table(entry()))
    found = choice()
    assert found.backend == "reference"
    assert found.reason == f"measured 2026-01-02T03:04:05+00:00: 1.50 times as fast as cpp ({path})"
    for other in (
        choice(width=257), choice(dtype=torch.bfloat16), choice(dtype=torch.float64), choice(width=None),
        choice("gated_residual_norm"),
    ):  # fmt: skip
        assert "measured" not in other.reason
    assert dispatch.choose("layersync_loss", "compile", "cpu", FP32, width=64).backend == "compile"
    monkeypatch.setattr(dispatch, "_environment_backend", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choice().reason == "asked for by LAYERSYNC_BACKEND=triton"


def test_the_functions_give_their_width(monkeypatch, path):
    """Each public function runs what the table says of its rows, and of no others."""
    ran = []
    for function in [name for op in registry.ops() if op.backends for name in op.functions]:
        monkeypatch.setattr(
            tuning, "find", lambda op, device, dtype, width, function=function: ran.append((op, width)) or None
        )
        monkeypatch.setattr(tuning, "speaks_of", lambda op, *rest, function=function: op == function)
        dispatch.reset()
        CALLS[function](torch.ones(2, 6, 24), backend="auto")
        assert (function, 24) in ran


def _modulated(name, *rows):
    def call(x, backend):
        getattr(dispatch_functions(), name)(x, *(x if row else x[:, 0] for row in rows), backend=backend)

    return call


def dispatch_functions():
    from layersync_kernels import functional

    return functional


CALLS = {
    "layersync_loss": lambda x, backend: layersync_loss(x, x, backend=backend),
    "modulated_layer_norm": _modulated("modulated_layer_norm", False, False),
    "modulated_rms_norm": _modulated("modulated_rms_norm", False, False),
    "gated_residual": _modulated("gated_residual", True, False),
    "gated_residual_norm": _modulated("gated_residual_norm", True, False, False, False),
    "aligned_residual_norm": _modulated("aligned_residual_norm", True, False, False, False),
    "spatial_norm": lambda x, backend: dispatch_functions().spatial_norm(x, backend=backend),
    "gram_alignment_loss": lambda x, backend: dispatch_functions().gram_alignment_loss(x, x, backend=backend),
    "self_attention": lambda x, backend: dispatch_functions().self_attention(x.repeat(1, 1, 3), 2, backend=backend),
    "attention": lambda x, backend: dispatch_functions().attention(
        *3 * [x.unflatten(-1, (2, -1)).transpose(1, 2)], backend=backend
    ),
    "linear_gelu": lambda x, backend: dispatch_functions().linear_gelu(x, torch.ones(8, 24), backend=backend),
    "gelu_mlp": lambda x, backend: dispatch_functions().gelu_mlp(
        x, torch.ones(8, 24), None, torch.ones(24, 8), None, backend=backend
    ),
    "swiglu": lambda x, backend: dispatch_functions().swiglu(x.repeat(1, 1, 2), backend=backend),
    "swiglu_mlp": lambda x, backend: dispatch_functions().swiglu_mlp(
        x, torch.ones(16, 24), None, torch.ones(24, 8), None, backend=backend
    ),
    "qk_norm_rope": lambda x, backend: dispatch_functions().qk_norm_rope(
        x.repeat(1, 1, 3), torch.ones(12), torch.ones(12), None, None, 2, backend=backend
    ),
    "projected_alignment_loss": lambda x, backend: dispatch_functions().projected_alignment_loss(
        x, torch.ones(8, 24), None, x[..., :8], backend=backend
    ),
}


def test_the_chosen_backend_is_what_runs(monkeypatch, path):
    called = []
    monkeypatch.setattr(cosine, "cosine_alignment_reference", lambda *args: called.append(1) or args[0].sum())
    put(monkeypatch, path, table(entry()))
    layersync_loss(torch.ones(2, 8), torch.ones(2, 8))
    layersync_loss(torch.ones(2, 300), torch.ones(2, 300))
    assert len(called) == 1 + (not native.cpp().loaded)


@pytest.mark.parametrize("backend", ["cuda", "triton", "cpp"])
def test_a_choice_that_cannot_run_here_leaves_it_to_the_rules(monkeypatch, path, backend):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    put(monkeypatch, path, table(entry(choice=backend)))
    tuning.state("cpu")  # a table of another extension would not be looked at any further
    monkeypatch.setattr(native, "cpp", lambda: native.Library(False, "not built"))
    found = choice()
    assert found.backend == "reference"
    assert found.reason.startswith(f"{backend}, measured 2026-01-02")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.isfinite(layersync_loss(torch.ones(2, 8), torch.ones(2, 8)))


def test_what_was_measured_on_constants_is_no_choice_for_gradients(monkeypatch, path):
    put(monkeypatch, path, table(entry("spatial_norm", choice="compile")))
    assert choice("spatial_norm").backend == "compile"
    assert "measured" not in choice("spatial_norm", grad=True).reason


def test_no_table_and_none_wanted_are_silent(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for wish in ("auto", "off"):
            read(monkeypatch, wish)
            assert tuning.state("cpu").table is None
    monkeypatch.setenv(environment.TUNING.name, "auto")
    dispatch.reset()
    files.write_json(tuning.default_path("cpu"), table(entry()))
    assert tuning.default_path("cpu") == tmp_path / "layersync_kernels" / "tuning-cpu.json"
    assert choice().backend == "reference"
    for named in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", named)
        assert tuning.default_path("cpu").is_absolute()


def test_a_table_of_a_gpu_is_left_alone_where_there_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv(environment.TUNING.name, "auto")
    dispatch.reset()
    files.write_json(tuning.default_path("cuda"), {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning.digest() == (0, 0)
        assert dispatch.choose("layersync_loss", "auto", "cuda", FP32, width=8).backend != "compile"


def test_a_table_named_for_another_device_is_silent(monkeypatch, path):
    put(monkeypatch, path, table(entry(), device="cpu") | {"machine": {"device": "cuda"}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "is a table for cuda" in tuning.state("cpu").reason


FOREIGN = {
    "name": ("AMD EPYC 9654", "measured with name AMD EPYC 9654, here is name"),
    "torch": ("2.0.0", f"measured with torch 2.0.0, here is torch {torch.__version__}"),
    "triton": ("1.0", "measured with triton 1.0, here is triton"),
    "layersync_kernels": ("0.0.1", "measured with layersync_kernels 0.0.1, here is"),
    "extension": ("crc32 00000000", "measured with extension crc32 00000000, here is extension"),
    "isa": ("sse", "measured with isa sse, here is isa"),
}
DAMAGED = {
    "empty": (b"", "no JSON"),
    "half": (b'{"format": 1, "mach', "no JSON"),
    "binary": (bytes(range(256)), "no JSON"),
    "nested": (b"[" * 200_000, "no JSON"),
    "digits": (b"1" * 10_000, "no JSON"),
    "large": (b" " * ((4 << 20) + 1), "larger than 4 MiB"),
    "a list": ([], "no table of format 1, found list"),
    "null": (None, "no table of format 1, found NoneType"),
    "no format": ({}, "no table of format 1, found None"),
    "a later format": ({"format": 2}, "found 2"),
    "no machine": ({"format": 1}, "machine is None"),
    "machine of a wrong type": ({"format": 1, "machine": [1]}, "machine is [1]"),
    "no entries": (lambda: table(entries=None), "entries is None"),
    "an entry of a wrong type": (lambda: table("cpp"), "an entry is cpp"),
    "no date": (lambda: table(entry(), date="yesterday"), "date is yesterday"),
    "an op that there is not": (lambda: table(entry(op="softmax")), "an entry for op softmax"),
    "an op's name for a function's": (lambda: table(entry(op="cosine_alignment")), "an entry for op cosine_alignment"),
    "a dtype": (lambda: table(entry(dtype="float8")), "dtype float8"),
    "a class": (lambda: table(entry(widths="wide")), "class wide"),
    "a backend": (lambda: table(entry(choice="rm -rf")), "layersync_loss has no backend rm -rf, expected reference"),
    "auto": (lambda: table(entry(choice="auto")), "no backend auto"),
    "a route of another op": (lambda: table(entry(choice="cublaslt")), "no backend cublaslt"),
    "a base": (lambda: table(entry(base="none")), "no backend none"),
    "a choice of a wrong type": (lambda: table(entry(choice=["cpp"])), "choice is ['cpp']"),
    "no margin": (lambda: table(entry(margin=None)), "margin is None"),
    "NaN": (lambda: table(entry(margin=float("nan"))), "margin of layersync_loss is nan"),
    "a margin below 0": (lambda: table(entry(margin=-1)), "margin of layersync_loss is -1"),
    "a huge margin": (lambda: table(entry(margin=10**4000)), "margin of layersync_loss is 1000"),
    "a bool": (lambda: table(entry(margin=True)), "margin of layersync_loss is True"),
    "control characters": (lambda: table(entry(choice="\x1b[2J")), r"no backend '\x1b[2J'"),
    "a long name": (lambda: table(entry(choice="x" * 10_000)), "no backend " + "x" * 80 + "..."),
}


def one_warning(path, what):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for width in (8, 16, 300):
            layersync_loss(torch.ones(2, width), torch.ones(2, width))
    (told,) = [str(warning.message) for warning in caught if "tuning" in str(warning.message)]
    assert what in told
    assert str(path) in told
    assert "layersync tune" in told
    assert len(told) < len(str(path)) + 600
    assert choice().backend == dispatch.rule("layersync_loss", "cpu", FP32).backend


@pytest.mark.parametrize("what", FOREIGN)
def test_a_table_of_elsewhere_is_ignored_with_one_warning(monkeypatch, path, what):
    found, message = FOREIGN[what]
    put(monkeypatch, path, table(entry(), **{what: found}))
    one_warning(path, message)


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_table_is_ignored_with_one_warning(monkeypatch, path, what):
    content, message = DAMAGED[what]
    put(monkeypatch, path, content() if callable(content) else content)
    one_warning(path, message)


@pytest.mark.skipif(os.name == "nt", reason="no pipes in the file system")
def test_what_is_no_file_neither_blocks_nor_fails(monkeypatch, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    for path, message in (
        (tmp_path / "pipe", "it is no file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "loop", "symbolic links"),
        ("/dev/zero", "it is no file"),
        (tmp_path / "missing", "there is no tuning table at"),
    ):
        read(monkeypatch, path)
        one_warning(path, message)


def test_an_extension_that_was_built_anew_outdates_a_table(monkeypatch, path, tmp_path):
    library = tmp_path / "_C.so"
    library.write_bytes(b"one")
    facts = type("Facts", (), {"cpu_isa": staticmethod(lambda: "avx2")})
    monkeypatch.setattr(native, "cpp", lambda: native.Library(True, "built", facts, str(library)))
    put(monkeypatch, path, table(entry()))
    assert choice().backend == "reference"
    library.write_bytes(b"two")
    dispatch.reset()
    with pytest.warns(UserWarning, match="measured with extension crc32 .*, here is extension crc32"):
        assert tuning.state("cpu").table is None


WRITER = """
import importlib.util
import sys
from pathlib import Path

path, who, file = sys.argv[1:]
spec = importlib.util.spec_from_file_location("files", file)  # alone, for torch takes seconds to import
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
for _ in range(40):
    files.write_json(Path(path), {"who": who, "rows": [who] * 20_000})
"""


def test_two_processes_that_write_at_once_leave_a_whole_table(tmp_path):
    path = tmp_path / "layersync_kernels" / "tuning-cpu.json"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), who, files.__file__]) for who in ("one", "two")
    ]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            content = json.loads(path.read_text())
            assert set(content["rows"]) == {content["who"]}
            seen.add(content["who"])
        time.sleep(0.002)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert seen


# ---- Under torch.compile


def compiled_graphs(step, shapes, dynamic=()):
    """How often `step` was compiled for inputs of some shapes, and the text of its graphs."""
    torch._dynamo.reset()
    graphs = EagerAndRecordGraphs()
    compiled = torch.compile(step, backend=graphs, fullgraph=True)
    for shape in shapes:
        given = [torch.randn(shape, requires_grad=True) for _ in range(2)]
        for tensor in given:
            for dim in dynamic:
                torch._dynamo.mark_dynamic(tensor, dim)
        expected = step(*(tensor.detach() for tensor in given))
        torch.testing.assert_close(compiled(*given).detach(), expected, rtol=1e-5, atol=1e-6)
    return [graph.print_readable(print_output=False) for graph in graphs.graphs]


def seams(x, branch):
    rows = x[:, 0]
    residual, normed = gated_residual_norm(x, branch, rows, rows, rows)
    return layersync_loss(residual, normed)


@pytest.mark.skipif(not native.cpp().loaded, reason="needs the C++ kernels")
def test_a_choice_by_width_is_a_constant_that_costs_no_recompilation(monkeypatch, path):
    plain = [entry(), entry("gated_residual_norm")]
    rows = [(2, 4, 32), (3, 4, 32), (5, 4, 32), (7, 4, 32)]
    several = [(2, 4, 32), (2, 4, 300), (2, 4, 40), (2, 4, 600), (2, 4, 48)]
    counts = {}
    for state, entries in (("off", None), ("table", plain)):
        if entries is None:
            read(monkeypatch, "off")
        else:
            put(monkeypatch, path, table(*entries))
        with torch._dynamo.config.patch(error_on_recompile=True):
            (marked,) = compiled_graphs(seams, rows, dynamic=[0])
            (static,) = compiled_graphs(seams, rows[:1])
        assert ("layersync_cpp" in static, "layersync_cpp" in marked) == (entries is None,) * 2
        counts[state] = len(compiled_graphs(seams, rows)), len(compiled_graphs(seams, several))
    assert counts["table"] == counts["off"] == (2, 2)


@pytest.mark.skipif(not native.cpp().loaded, reason="needs the C++ kernels")
def test_a_symbolic_width_takes_the_rules(monkeypatch, path):
    put(monkeypatch, path, table(entry(), entry("gated_residual_norm")))
    with torch._dynamo.config.patch(error_on_recompile=True):
        (graph,) = compiled_graphs(seams, [(2, 4, 32), (2, 4, 300), (3, 4, 3000)], dynamic=[0, 2])
    assert "layersync_cpp" in graph


def test_a_symbolic_width_outside_of_dynamo_takes_the_rules(monkeypatch, path):
    from torch.fx.experimental.proxy_tensor import make_fx

    put(monkeypatch, path, table(entry()))
    names = []

    def step(x):
        names.append(dispatch.resolve("layersync_loss", "auto", "cpu", FP32, tokens=x))
        return x + 1

    make_fx(step, tracing_mode="symbolic")(torch.ones(4, 32))
    make_fx(step, tracing_mode="fake")(torch.ones(4, 32))
    assert names == [dispatch.rule("layersync_loss", "cpu", FP32).backend, "reference"]


def test_a_second_choice_is_a_look_up(monkeypatch, path):
    put(monkeypatch, path, table(entry()))
    assert dispatch.resolve("layersync_loss", "auto", "cpu", FP32, tokens=torch.ones(1, 8)) == "reference"

    def never(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(dispatch, "choose", never)
    monkeypatch.setattr(tuning, "find", never)
    assert dispatch.resolve("layersync_loss", "auto", "cpu", FP32, tokens=torch.ones(1, 8)) == "reference"


# ---- layersync doctor


def report(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "400")
    assert doctor.main([]) == 0
    return capsys.readouterr().out


def test_doctor_tells_what_was_chosen_by_a_table(monkeypatch, path, capsys):
    put(monkeypatch, path, table(entry(), entry("spatial_norm", choice="cuda", widths="over 2048")))
    out = report(monkeypatch, capsys)
    assert f"{path}, measured 2026-01-02T03:04:05+00:00, 2 entries" in out
    assert "1.50 times as fast as cpp" in out
    assert "cuda, measured 2026-01-02T03:04:05+00:00" in out  # which cannot run: the rules' choice stands beside it
    assert [row[3] for row in doctor.tuned()] == ["reference", dispatch.rule("spatial_norm", "cpu", FP32).backend]


def test_doctor_tells_why_a_table_is_ignored(monkeypatch, path, capsys):
    put(monkeypatch, path, table(entry(), torch="[red]2.0"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = report(monkeypatch, capsys)
    assert "it was measured with torch [red]2.0, here is torch" in out
    read(monkeypatch, "off")
    assert "switched off by LAYERSYNC_TUNING=off" in report(monkeypatch, capsys)

import torch

from layersync_kernels import doctor
from layersync_kernels.ops import dispatch
from layersync_kernels.runtime import environment


def test_the_report_names_backends_reasons_and_every_variable(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("LAYERSYNC_CPU_ISA", "generic")
    assert doctor.main([]) == 0
    report = capsys.readouterr().out
    assert torch.__version__ in report
    choice = dispatch.choose("cosine_alignment", "auto", "cpu", torch.float32)
    assert choice.backend in report
    for variable in environment.VARIABLES:
        assert variable.name in report
    assert "generic" in report


def test_a_wish_that_cannot_be_met_is_shown_not_raised(monkeypatch):
    monkeypatch.setattr(dispatch, "_environment_backend", "cuda")
    backends = {(device, backend) for _, device, _, backend, _ in doctor.choices()}
    assert ("cpu", "error") in backends


def test_the_docs_have_the_table_of_variables():
    from pathlib import Path

    page = (Path(__file__).parents[1] / "docs" / "backends.md").read_text()
    for variable in environment.VARIABLES:
        assert f"| `{variable.name}` | {variable.default} | {variable.meaning} |" in page

"""benchmarks/gpu.sh without a card: its dry run as a whole, the computed budget, what it says of bad arguments."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from layersync_kernels.bench.card import __main__ as card
from layersync_kernels.bench.card import budget, facts, packages, stages
from layersync_kernels.bench.cases import Case, cases
from layersync_kernels.errors import UserError

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
FIGURES = budget.load_figures()


def gpu_sh(*arguments, **environment):
    """The script, as a user calls it from anywhere."""
    return subprocess.run(
        ["bash", SCRIPT, *arguments],
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment},
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    return gpu_sh("--dry-run", "--out", str(out)), out


@pytest.mark.slow
def test_the_dry_run_passes_as_a_whole(dry_run):
    done, out = dry_run
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    state = json.loads((out / "state.json").read_text())
    assert {record["status"] for record in state["stages"].values()} == {"passed"}
    for plan in stages.plans(out, FIGURES):
        assert f"  {plan.name}: " in done.stdout  # with its command
        assert (f"{plan.name}, dry" in state["stages"]) == (plan.dry is not None)
    if shutil.which("nvidia-smi") is None:
        assert "no nvidia-smi here; a run with a card needs it" in done.stdout
    assert (out / "environment.txt").read_text().startswith("20")


@pytest.mark.slow
def test_its_rows_have_every_provider_and_ratio(dry_run):
    rows = [json.loads(line) for line in (dry_run[1] / "results.jsonl").read_text().splitlines()]
    timed = {row["provider"] for row in rows if row["op"] == "cosine_alignment" and row["problem"] is None}
    assert timed == {"copy", "eager", "compile", "cpp"}
    trainer = {row["provider"]: row for row in rows if row["op"] == "trainer"}
    names = ("fused", "off", "applied", "eager", "compile", "published", "light", "fused fp32", "eager fp32")
    assert tuple(trainer) == names
    assert trainer["off"]["vs_off"] == trainer["eager"]["vs_eager"] == trainer["eager fp32"]["vs_eager"] == 1
    assert all(row["low"] <= row["images_per_s"] <= row["high"] for row in trainer.values())
    assert {row["provider"] for row in rows if row["op"] == "trainer turn"} == set(names)


@pytest.mark.slow
def test_the_counted_tests_are_those_that_there_are(dry_run):
    """What they compile was counted when benchmarks/card.json was written; many more since then, and it says little."""
    log = (dry_run[1] / "log.txt").read_text()
    for name, stage in (("gpu", "GPU tests, dry"), ("ops", "op tests, dry")):
        section = log.partition(f"== {stage} ")[2].partition("\n== ")[0]
        found = sum(int(line.rpartition(": ")[2]) for line in section.splitlines() if line.startswith("tests/"))
        counted = FIGURES["tests"][name]["tests"]
        assert found <= 1.25 * counted, f"{found} tests, {counted} when counted: --measure-compile counts anew"


def test_all_stages_fit_into_the_budget(tmp_path):
    assert budget.BUDGET <= 540
    made = [plan.stage(FIGURES, 16) for plan in stages.plans(tmp_path, FIGURES) if not plan.extra]
    taken = {stage.name: round(stage.estimate) for stage in made}
    assert sum(stage.estimate for stage in made) <= budget.BUDGET, taken
    assert all(stage.limit > stage.estimate > 0 for stage in made)
    assert [stage.name for stage in made[:5]] == [
        "environment", "build", "GPU tests", "headline benchmark", "trainer benchmark",
    ]  # fmt: skip


def test_the_counts_of_the_cases_are_what_they_launch():
    """Whoever adds a size, an op or a specialisation finds the budget grown."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "layersync_kernels.bench.card.measure", "cases"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["cases"] == FIGURES["cases"], "--measure-compile counts anew"


def test_an_estimate_grows_with_what_is_compiled():
    figures = {"seconds": {"import": 2, "collect": 9, "test": 0.5, "graph": 8, "triton": {"a": 1, "b": 3}, "build": {}}}
    start = 2 + budget.ASSUMED["open_card_s"]

    def estimate(cores=1, **work):
        return budget.estimate(budget.Work(**work), figures, cores) - start

    assert estimate() == 0
    assert estimate(triton={"a": 2, "b": 1}) == 5
    assert estimate(triton={"unknown": 2}) == 6  # as long as the longest
    assert estimate(graphs=3, seconds=4) == 28
    assert estimate(tests=10, collects=True) == 14
    assert estimate(tests=32, triton={"b": 8}, workers=8) == start + 2 + 3
    figures["seconds"]["build"] = {"_C": {"x": 4, "y": 2, "z": 2}, "_cuda": {"x": 5}}
    assert estimate(build=True, cores=1) == 13
    assert estimate(build=True, cores=2) == 9
    assert estimate(build=True, cores=16) == 9


def test_timing_takes_as_long_as_it_moves():
    small, large = (Case("gated_residual_norm", rows, 1152, cases("cuda")[0].dtype, "cuda") for rows in (16384, 65536))
    assert budget.timing_seconds(large) > budget.timing_seconds(small)
    assert budget.timing_seconds(large, rounds=30) > budget.timing_seconds(large)


def test_more_than_the_budget_fails(monkeypatch, capsys):
    figures = json.loads(json.dumps(FIGURES))
    figures["seconds"]["graph"] *= 100
    monkeypatch.setattr(card, "load_figures", lambda: figures)
    console = Console(width=200)
    assert card.run(card.CardConfig(budget=True), console) == card.FAILED
    monkeypatch.setattr(card, "load_figures", lambda: FIGURES)
    assert card.run(card.CardConfig(budget=True), console) == 0
    assert "headline benchmark" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"seconds": {"import": 0}, "tests": {}}'])
def test_figures_that_cannot_be_read_name_the_command_that_writes_them(content, tmp_path):
    path = tmp_path / "card.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"card\.json cannot be read .*--measure-compile"):
        budget.load_figures(path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "{}", "--dry-run"], "gpu.sh: --out {} is a file; expected a folder\n"),
        (["--seconds", "0", "--budget"], "gpu.sh: --seconds 0: expected more than 0\n"),
        ([], "gpu.sh: no card here; name another Python by PYTHON=..., or check the stages by --dry-run\n"),
    ],
    ids=["file", "seconds", "no card"],
)
def test_bad_arguments_are_explained(arguments, said, tmp_path, monkeypatch, capsys):
    place = tmp_path / "file"
    place.touch()
    answer = subprocess.CompletedProcess([], 1, "", "a warning\nno card here\n")
    monkeypatch.setattr(card.subprocess, "run", lambda *args, **options: answer)
    monkeypatch.setattr(card.os, "environ", dict(os.environ))
    monkeypatch.chdir(ROOT)
    assert card.main([argument.format(place) for argument in arguments]) == 2
    assert capsys.readouterr().err == said.format(place)


def test_the_script_names_what_it_lacks(tmp_path):
    done = gpu_sh(str(tmp_path / "nowhere"))
    assert (done.returncode, done.stderr) == (2, f"gpu.sh: {tmp_path}/nowhere is not a folder of wheels (see --help)\n")
    done = gpu_sh("--budget", PYTHON="no-such-python")
    assert (done.returncode, done.stderr) == (2, "gpu.sh: no no-such-python here; name another by PYTHON=...\n")


def test_a_machine_without_a_card_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert facts.main(["--identity"]) == 1
    assert f"torch {torch.__version__} of {sys.executable} sees no NVIDIA card" in capsys.readouterr().err


def test_the_wheels_are_one_command_for_what_a_card_may_lack(tmp_path):
    done = gpu_sh("--wheels")
    assert done.returncode == 0
    assert done.stdout.count("\n") == 1
    words = shlex.split(done.stdout)
    assert words[:4] == ["python3", "-m", "pip", "download"]
    assert set(words) >= {"--only-binary=:all:", "3.12", *packages.PACKAGES.values()}
    assert "torch" not in words
    # A Python without them: the script says what is missing, and how to get it.
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    done = gpu_sh("--budget", PYTHON=str(bare))
    assert done.returncode == 2
    assert (
        f"missing: {' '.join(packages.PACKAGES.values())}; give a folder with their wheels (see --wheels)"
        in done.stderr
    )


def test_the_packages_are_all_that_the_project_needs_beside_torch():
    text = (ROOT / "pyproject.toml").read_text()
    declared = text.partition("\ndependencies = [")[2].partition("]")[0]
    names = {entry.strip().strip('"').partition(">")[0] for entry in declared.split(",")}
    assert names - {"torch"} <= set(packages.PACKAGES.values())

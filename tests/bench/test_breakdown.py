"""Where a step's time goes: the accounting by hand, the real step, and two processes."""

import itertools
import os
import random
import subprocess
import sys

import pytest
from torch.autograd import DeviceType

from layersync_kernels import cli
from layersync_kernels.bench.breakdown import COMMUNICATION, REST, ROWS, breakdown, joined_up, times_of, without
from layersync_kernels.bench.report import read_json
from layersync_kernels.errors import UserError
from layersync_kernels.sit.training.loop import Trainer
from layersync_kernels.sit.training.phases import PHASES, phase

from ..sit.tiny import tiny_config, tiny_data


class Event:
    """As kineto has it; times in nanoseconds."""

    def __init__(self, name, start, end, *, thread=1, gpu=False, correlation=0, linked=0, annotation=False):
        self._values = {
            "name": name, "start_ns": start, "end_ns": end, "start_thread_id": thread, "is_user_annotation": annotation,
            "device_type": DeviceType.CUDA if gpu else DeviceType.CPU, "correlation_id": correlation,
            "linked_correlation_id": linked,
        }  # fmt: skip

    def __getattr__(self, name):
        return lambda: self._values[name]


def step_of(*lengths):
    """The ranges of a step whose phases follow each other, and take so long."""
    ends = list(itertools.accumulate(lengths, initial=100))
    return [Event(f"step:{name}", *span) for name, span in zip(PHASES, itertools.pairwise(ends), strict=True)]


def test_intervals_are_sets_of_moments():
    draw = random.Random(0)
    for _ in range(200):
        a, b = ([tuple(sorted(draw.choices(range(30), k=2))) for _ in range(draw.randrange(6))] for _ in range(2))
        moments = [{at for span in spans for at in range(*span)} for spans in (a, b)]
        for spans, inside in (
            (joined_up(a), moments[0]),
            (without(joined_up(a), joined_up(b)), moments[0] - moments[1]),
        ):
            assert [at for span in spans for at in range(*span)] == sorted(inside)


def test_what_a_collective_makes_a_process_wait_for_is_no_part_of_the_phase():
    events = [
        *step_of(10, 100, 200, 50, 20, 20),  # the backward pass: 210 to 410
        Event("autograd::engine::evaluate_function: X", 210, 400),  # calls others: no computation of its own
        Event("aten::mm", 210, 300),
        Event("gloo:all_reduce", 250, 380, thread=2),
        Event("aten::copy_", 360, 370, thread=2),  # gloo's own
        Event("c10d::allreduce_", 300, 305),
        Event("aten::add", 320, 330),
        Event("gloo:all_reduce", 90, 95, thread=2),  # before the first step
    ]
    times = times_of(events, "cpu")
    assert times.phases == {
        "data": 10, "forward": 100, "backward": 130, COMMUNICATION: 70, "optimizer": 50, "ema": 20, "log": 20, REST: 0,
    }  # fmt: skip
    assert times.hidden == 60
    assert times.whole == 400
    assert times.host["backward"] == 200


def test_kernels_belong_to_the_phase_that_launched_them():
    events = [
        *step_of(10, 100, 200, 50, 20, 20),
        Event("cudaLaunchKernel", 120, 122, correlation=1),
        Event("forward", 215, 250, gpu=True, correlation=1),  # runs on in the host's backward pass
        Event("aten::mm", 215, 220, correlation=1),  # another count: that of operators
        Event("cuLaunchKernelEx", 230, 232, correlation=2),
        Event("backward", 250, 400, gpu=True, correlation=2),
        Event("cudaLaunchKernelExC", 300, 301, correlation=3),
        Event("ncclDevKernel_AllReduce", 380, 430, gpu=True, correlation=3),
        Event("aten::add", 415, 420, correlation=7),
        Event("adam", 440, 450, gpu=True, correlation=9, linked=7),  # whose call was not seen
        Event("step:forward", 150, 250, gpu=True, annotation=True),
    ]
    times = times_of(events, "cuda")
    assert times.phases == {
        "data": 0, "forward": 35, "backward": 150, COMMUNICATION: 30, "optimizer": 10, "ema": 0, "log": 0, REST: 175,
    }  # fmt: skip
    assert times.hidden == 20
    with pytest.raises(UserError, match="has seen no kernel"):
        times_of(step_of(1, 1, 1, 1, 1, 1), "cuda")


def test_phases_that_are_not_there_are_an_error():
    with pytest.raises(UserError, match="events have no ema, log; expected data, forward"):
        times_of(step_of(10, 100, 200, 50, 20, 20)[:4], "cpu")
    with pytest.raises(UserError, match="events have no data, forward"):
        times_of([], "cpu")


def test_a_phase_is_nothing_where_nobody_measures():
    assert phase("data") is phase("log")


def test_phases_of_real_steps_sum_up():
    trainer = Trainer(tiny_config(optim={"batch_size": 4, "accumulate": 2}), tiny_data())
    times, seconds = breakdown(trainer, 3)
    assert trainer.steps_done == 3 + 2 * 3
    assert tuple(sorted(times.phases)) == tuple(sorted(ROWS))
    assert sum(times.phases.values()) == times.whole
    assert all(times.phases[name] == times.host[name] > 0 for name in PHASES)  # nothing is shared: all is their own
    assert (times.phases[COMMUNICATION], times.hidden) == (0, 0)
    assert seconds > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ops", "--breakdown"], "--breakdown is of the trainer: layersync bench trainer --breakdown, not ops"),
        (["trainer", "--breakdown", "--rounds", "0"], "--rounds 0: expected at least 1"),
        (["trainer", "--breakdown", "--batch", "0"], "--batch 0: expected at least 1"),
        (["trainer", "--breakdown", "--model", "SiT-Q/2"], "no model is named 'SiT-Q/2'; known: SiT-XL/2"),
        (["trainer", "--breakdown", "--device", "tpu"], "tpu"),
        (["trainer", "--breakdown", "--resume"], "--breakdown is measured at once"),
    ],
)
def test_bad_input_is_refused(arguments, message, capsys):
    assert cli.main(["bench", *arguments]) == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_what_else_is_measured_is_the_work_of_one_process(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["bench", "trainer", "--resume"]) == 1
    assert "this is the work of one process, and WORLD_SIZE is 2" in " ".join(capsys.readouterr().err.split())
    assert cli.main(["bench", "trainer", "--breakdown"]) == 1
    assert "WORLD_SIZE is 2, and RANK is not set" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_two_processes_wait_for_each_other(tmp_path):
    path = tmp_path / "rows.jsonl"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "layersync_kernels", "bench", "trainer", "--breakdown", "--quick", "--device=cpu"]
    done = subprocess.run(
        [*command, "--rounds=2", f"--json={path}", "--precision=fp32"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("SiT-P/8 batch 4 float32, 2 processes (ddp), cpu: wall time of a step") == 1
    rows = {row["phase"]: row for row in read_json(path)}
    assert tuple(rows) == ROWS
    assert all(rows[name]["ms"] > 0 for name in (*PHASES, COMMUNICATION))
    assert sum(row["ms"] for row in rows.values()) == pytest.approx(rows["data"]["step_ms"])
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)
    assert rows["data"]["processes"] == 2

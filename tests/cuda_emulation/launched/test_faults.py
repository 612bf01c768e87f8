"""The emulation itself: a fault that it would not notice makes every other test here worthless."""

from __future__ import annotations

import faulthandler
import os

import pytest
import torch

from .harness import emulated


def run(fault: str) -> torch.Tensor:
    """The launcher of faults.cu on 0, 1, …, 63."""
    return torch.ops.layersync_faults.run(torch.arange(64.0), fault)


def test_a_launch_without_a_fault_passes():
    assert torch.equal(run(""), 2 * torch.arange(64.0))


@pytest.mark.parametrize("seed", range(4))
def test_threads_exchange_values_over_a_barrier(seed):
    with emulated(seed):
        assert torch.equal(run("exchange"), torch.arange(64.0).view(2, 32).flip(0).flatten())


def test_a_missing_barrier_shows_in_the_result():
    results = set()
    for seed in range(4):
        with emulated(seed):
            results.add(tuple(run("missing barrier").tolist()))
    assert len(results) > 1


def test_an_output_that_nothing_writes_is_nan():
    assert run("no launch").isnan().all()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no guard", "a launch without a device guard"),
        ("default stream", "a launch on the default stream"),
        ("kept stream", "a launch on a stream that is not the current one of card 2"),
        ("no kernel", "a launch of no kernel"),
        ("no blocks", "an empty grid, 0 x 1 x 1"),
        ("no threads", "an empty block, 0 x 1 x 1"),
        ("too many threads", "a block of 2048 x 1 x 1; at most 1024"),
        ("output on the stack", "a kernel is given a pointer to the host's stack"),
        ("diverged barrier", r"threads diverged [^\n]*\n  thread 0 waits at __syncthreads\n  thread 40 has returned"),
        ("diverged shuffle", "threads diverged before a collective"),
        ("half a warp", "a shuffle of part of a warp"),
        *(
            (call, f"{call} is called: it waits for the card, or takes its memory")
            for call in (
                "cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaStreamQuery", "cudaMalloc", "cudaMallocAsync",
                "cudaFree", "cudaMemcpy", "cudaMemset",
            )
        ),
    ],
)  # fmt: skip
def test_a_launch_that_a_card_would_not_forgive_raises(fault, message):
    run("")  # the first stream is not the next one
    with pytest.raises(RuntimeError, match=f"emulation: {message}"):
        run(fault)
    assert torch.equal(run(""), 2 * torch.arange(64.0))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("small output", "heap-buffer-overflow"),
        ("beyond the end", "heap-buffer-overflow"),
        ("wrong copy", "heap-buffer-overflow"),
        ("missing output", "SEGV on unknown address 0x0000"),
        ("borrowed sizes", "stack-use-after-scope"),
        ("misaligned", "misaligned address"),
    ],
)
def test_memory_that_is_not_ours_ends_the_process(fault, message, tmp_path):
    report = tmp_path / "stderr"
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        os.dup2(os.open(report, os.O_WRONLY | os.O_CREAT), 2)
        run(fault)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0
    assert message in report.read_text()

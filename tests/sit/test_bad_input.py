"""What several processes run into together: one of them says it, and all of them end."""

import contextlib
import io
import itertools
import json
import multiprocessing
import os
import time
import types

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from layersync_kernels import cli
from layersync_kernels.errors import ConfigError
from layersync_kernels.sit.checkpoints.local import list_checkpoints
from layersync_kernels.sit.distributed import processes
from layersync_kernels.sit.training.folder import LOCK

from .test_whole import rewrite

SECONDS = 150
FLAGS = [
    *("--model=SiT-P/2", "--hidden-size=16", "--num-heads=2", "--depth=3", "--batch-size=8", "--device=cpu"),
    *("--no-tensorboard", "--precision=fp32", "--sample-every=0", "--timeout=60", "--steps=2"),
]


def one_of_two(rank, port, commands, results):
    """Exit code and stderr of each command, of this process."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    store = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}  # as of torchrun
    os.environ.update({name: str(value) for name, value in (own | store).items()})
    torch.set_num_threads(1)
    for command in commands:
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            try:
                code = cli.main(["train", *command])
            except SystemExit as stopped:
                code = stopped.code
        results.put((rank, code, said.getvalue()))


def run_by_two(commands):
    """For each command what both processes end with and say."""
    context = multiprocessing.get_context("spawn")
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    results = context.Queue()
    both = [context.Process(target=one_of_two, args=(rank, store.port, commands, results)) for rank in (0, 1)]
    for process in both:
        process.start()
    end, found = time.monotonic() + SECONDS, {0: [], 1: []}
    try:
        for _ in range(2 * len(commands)):
            rank, code, said = results.get(timeout=max(1.0, end - time.monotonic()))
            found[rank].append((code, " ".join(said.split())))
    finally:
        for process in both:
            process.kill()
            process.join()
    return list(zip(found[0], found[1], strict=True))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What comes of each case, by name."""
    folder = tmp_path_factory.mktemp("bad")
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 4), np.uint8)
    np.savez(folder / "six.npz", images=pixels)
    np.savez(folder / "one.npz", images=pixels[:1])
    (folder / "pictures" / "a").mkdir(parents=True)
    for number, size in enumerate([(4, 8), (8, 4), (4, 8)]):
        Image.new("L", size).save(folder / "pictures" / "a" / f"{number}.png")
    newer = folder / "newer"
    assert cli.main(["train", f"--data={folder / 'six.npz'}", f"--out={newer}", *FLAGS]) == 0
    (checkpoint,) = list_checkpoints(newer)
    rewrite(checkpoint, lambda state: state.update(shards={"of": 9}))
    names = itertools.count()

    def fresh(data, *flags):
        return [f"--data={folder / data}", f"--out={folder / f'run-{next(names)}'}", *FLAGS, *flags]

    commands = {
        "fewer samples than processes": fresh("one.npz"),
        "no bucket with a batch": fresh("pictures", "--buckets", "8x4", "4x8", "--channels=1"),
        "no mesh": fresh("six.npz", "--parallel=hsdp", "--shard-size=2"),
        "a folder in use": [f"--data={folder / 'six.npz'}", f"--out={newer}", *FLAGS],
        "no GPU": fresh("six.npz", "--device=cuda"),
        "a newer checkpoint": [f"--out={newer}", "--resume", "--steps=4"],
    }
    return folder, dict(zip(commands, run_by_two(list(commands.values())), strict=True))


def test_a_batch_of_all_processes_may_be_larger_than_the_data(found):
    folder, results = found
    (code, said), (other, nothing) = results["fewer samples than processes"]
    assert (code, other, nothing) == (0, 0, "")
    assert "done: step 2" in said
    assert len(list_checkpoints(folder / "run-0")) == 1


MESSAGES = {
    "no bucket with a batch": "no size has enough samples for a batch of 8: 2 of (8, 4), 1 of (4, 8); lower --batch",
    "no mesh": "--parallel hsdp with --shard-size 2: 2 processes do not make several copies of that many",
    "a folder in use": "newer exists; choose another --out",
    "no GPU": "--device cuda: ",
    "a newer checkpoint": "state.json is not what a run saves: unknown settings ['shards'], as a newer version of "
    "layersync_kernels may write them: install that one",
}


@pytest.mark.parametrize("case", MESSAGES)
def test_one_process_says_what_all_run_into(found, case):
    if case == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is one")
    folder, results = found
    (code, said), (other, nothing) = results[case]
    assert (code, other) == (1, 1)
    assert said.count(MESSAGES[case]) == 1
    assert nothing == ""
    assert list(folder.glob(f"*/{LOCK}")) == []


def test_flags_that_cannot_be_are_said_by_the_first_process_of_a_machine(monkeypatch, capsys, tmp_path):
    """The others speak where torchrun has not ended them meanwhile."""
    waited = []
    clock = types.SimpleNamespace(sleep=lambda seconds: waited.append((seconds, capsys.readouterr().err)))
    monkeypatch.setattr(processes, "time", clock)  # not the module's: other threads sleep too
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"seed": 1, "shards": 2}))
    for name, value in {"WORLD_SIZE": 2, "RANK": 3, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    for flags, code, message in (
        ([f"--out={tmp_path / 'run'}", "--resume"], 1, "unknown settings ['shards'], as a newer version of"),
        (["--data=x.npz", "--log-every=0"], 1, "--log-every 0: expected at least 1"),
        (["--no-such-flag"], 2, "no-such-flag"),
    ):
        for local_rank, waits in ((0, []), (1, [(processes._SECONDS_FOR_FIRST, "")])):
            monkeypatch.setenv("LOCAL_RANK", str(local_rank))
            waited.clear()
            try:
                ended = cli.main(["train", *flags])
            except SystemExit as stopped:
                ended = stopped.code
            assert (ended, waited) == (code, waits)
            assert message in capsys.readouterr().err


def test_gpus_without_nccl_are_refused(monkeypatch):
    monkeypatch.setattr(processes, "resolve_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    with pytest.raises(ConfigError, match=r"--device cuda: this torch has no NCCL.*several with --device cpu"):
        processes._own_device("cuda", 1, 2)

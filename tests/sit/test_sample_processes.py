"""Several processes draw what one draws: files of many samples, overviews, and the pictures of a run."""

import functools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from layersync_kernels import cli
from layersync_kernels.sit.commands.sample import SampleCommand, sample
from layersync_kernels.sit.config.sampling import SamplingConfig
from layersync_kernels.sit.distributed.processes import ALONE, Processes
from layersync_kernels.sit.sampling import many
from layersync_kernels.sit.sampling.draw import conditions, draw
from layersync_kernels.sit.spec import SampleSpec
from layersync_kernels.sit.training.folder import start_run
from layersync_kernels.sit.training.loop import Trainer

from ..integrate.distributed import run as run_processes
from .test_launched import ended
from .test_parallel import motions
from .tiny import tiny_config, tiny_data

pytestmark = pytest.mark.xdist_group("sampling processes")
EULER = SamplingConfig(solver="euler", sampling_steps=3, cfg_scale=2.0)
SOLVERS = {
    "guided dopri5": SamplingConfig(cfg_scale=2.0, guidance_interval=(0.2, 0.7)),
    "guided sde": SamplingConfig(sampler="sde", solver="heun", sampling_steps=4, cfg_scale=1.5),
}
LOG = {"sample_every": 1, "grid_columns": 3, "log_every": 100, "checkpoint_every": 100}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on images, which has learnt something to draw."""
    path = tmp_path_factory.mktemp("images") / "run"
    config = tiny_config(optim={"steps": 4, "batch_size": 8, "lr": 5e-2}, log=LOG | {"sample_every": 0})
    start_run(path, config, overwrite=False)
    Trainer(config, tiny_data(), run_dir=path).fit()
    return path


def command(run, folder, **changes):
    options = {"sampling": EULER, "precision": "fp32", "device": "cpu", "out": folder, "number": 7, "shard": 2}
    return SampleCommand(run, **(options | changes))


def files(folder):
    return {path.name: dict(np.load(path)) for path in sorted(folder.glob("*.npz"))}


def assert_same_files(first, second):
    assert first.keys() == second.keys()
    for name, arrays in first.items():
        assert all(np.array_equal(values, second[name][key]) for key, values in arrays.items())


def overview(run, folder, processes=ALONE):
    options = {"number": None, "per_class": 3, "sampling": SOLVERS["guided dopri5"], "batch_size": 5}
    path = sample(
        command(run, folder / "grid.png", array=folder / "grid.npz", floats=True, **options), processes=processes
    )
    assert path == folder / "grid.png"


class Uneven(torch.nn.Module):
    """A flow in which samples of class 1 turn four times as fast, so that the solver has to look at both classes."""

    spec, guidable = SampleSpec(1, (4, 4)), False
    calls = 0

    def forward(self, x, t, y):
        self.calls += 1
        rate = (10 + 30 * y).view(-1, 1, 1, 1)
        return rate * torch.cos(rate * t.view(-1, 1, 1, 1)) * x


def pictures(folder, processes=ALONE, **parallel):
    """Samples by each solver, of uneven batches, and the pictures of a run, before and after a further step."""
    groups = {"optim": {"batch_size": 8, "lr": 5e-2}, "model": {"num_classes": 4}, "log": LOG}
    config = tiny_config(**groups, parallel=parallel)
    trainer = Trainer(config, tiny_data(), processes=processes, run_dir=folder)
    trainer.advance(3)
    found = []
    for _ in range(2):
        condition = conditions(torch.arange(5) % 3)
        for sampling in SOLVERS.values():
            options = {"seed": 3, "batch_size": 3, "processes": processes}
            found.append(draw(trainer.ema, trainer.transport, sampling, condition, **options))
        trainer.draw_samples()
        trainer.advance(trainer.steps_done + 1)
    flow, condition = Uneven(), conditions(torch.arange(5) % 2)
    options = {"seed": 3, "batch_size": 3, "processes": processes}
    found.append(draw(flow, trainer.transport, SamplingConfig(), condition, **options))
    found.append(torch.tensor(flow.calls))
    config, data = motions()
    lengths = Trainer(config, data)  # of a model that has learnt nothing, with lengths
    condition = conditions(torch.arange(5) % 2, data.typical_lengths())
    found.append(draw(lengths.ema, lengths.transport, SOLVERS["guided sde"], condition, seed=4, processes=processes))
    return found


WAYS = ({"parallel": "ddp"}, {"parallel": "fsdp", "reshard": False})


def drawn_by_two(rank, run, folder):
    """How many files each process draws anew, and of those that are missing; and the pictures."""
    processes = Processes(rank, 2, 2)
    calls, own = [], many.draw
    many.draw = lambda *arguments, **options: calls.append(1) or own(*arguments, **options)
    sample(command(run, folder / "anew", files=True), processes=processes)
    anew = len(calls)
    sample(command(run, folder / "parts"), processes=processes)
    counts = anew, len(calls) - anew
    overview(run, folder, processes)
    return counts, [pictures(folder / str(number), processes, **way) for number, way in enumerate(WAYS)]


@pytest.fixture(scope="module")
def two(run, tmp_path_factory):
    """The folder that two processes have drawn into, one of its parts after a single one was stopped; the results."""
    folder = tmp_path_factory.mktemp("two")
    own, calls = many.draw, []

    def stopped(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return own(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(many, "draw", stopped)
        with pytest.raises(KeyboardInterrupt):
            sample(command(run, folder / "parts"))
    work = functools.partial(drawn_by_two, run=run, folder=folder)
    return folder, run_processes(work, tmp_path_factory.mktemp("work"), 240)


def test_processes_draw_the_files_of_one(run, two, tmp_path):
    folder, results = two
    assert [counts for counts, _ in results] == [(2, 2), (2, 1)]  # of four files, of the three that were missing
    sample(command(run, tmp_path / "one", files=True))
    one = files(tmp_path / "one")
    assert len(one) == 4
    assert_same_files(one, files(folder / "anew"))
    assert_same_files(one, files(folder / "parts"))
    own, theirs = (sorted((place / "files").iterdir()) for place in (tmp_path / "one", folder / "anew"))
    assert [path.read_bytes() for path in own] == [path.read_bytes() for path in theirs]
    assert len(own) == 7


def test_processes_draw_the_overview_of_one(run, two, tmp_path):
    overview(run, tmp_path)
    alone, together = (np.load(folder / "grid.npz") for folder in (tmp_path, two[0]))
    np.testing.assert_allclose(together["samples"], alone["samples"], rtol=0, atol=1e-4)
    assert together["labels"].tolist() == alone["labels"].tolist()
    assert (two[0] / "grid.png").is_file()


def test_pictures_of_a_run_are_those_of_one_process(two, tmp_path):
    folder, results = two
    alone = pictures(tmp_path)
    assert all(not torch.allclose(alone[i], alone[i + len(SOLVERS)], atol=1e-3) for i in range(len(SOLVERS)))
    for _, of_ways in results:
        for found in of_ways:
            for mine, theirs in zip(alone, found, strict=True):
                torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=3e-5)
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == ["step_00000003.png", "step_00000004.png"]
    for number in range(len(WAYS)):
        for name in names:
            mine, theirs = (
                np.array(Image.open(run / "samples" / name), int) for run in (tmp_path, folder / str(number))
            )
            assert np.abs(mine - theirs).max() <= 1


DYING = """
import os, signal, sys
from layersync_kernels import cli
from layersync_kernels.sit.sampling import many
draw, calls = many.draw, []
def dying(*arguments, **options):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return draw(*arguments, **options)
many.draw = dying
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_one_process_goes_on_where_one_of_two_was_killed(run, tmp_path, capfd):
    (tmp_path / "dying.py").write_text(DYING)
    flags = ["--number=7", "--shard=1", "--solver=euler", "--sampling-steps=3", "--device=cpu", "--precision=fp32"]
    arguments = ["sample", str(run), f"--out={tmp_path / 'parts'}", *flags]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    code, output = ended(
        subprocess.Popen(
            [*torchrun, str(tmp_path / "dying.py"), *arguments],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    )
    assert code != 0
    assert "Signal 9 (SIGKILL)" in output
    before = files(tmp_path / "parts").keys()
    assert "samples_00001.npz" in before
    assert not {"samples_00003.npz", "samples_00005.npz"} & before
    assert cli.main(arguments) == 0
    sample(command(run, tmp_path / "one", shard=1))
    assert_same_files(files(tmp_path / "one"), files(tmp_path / "parts"))
    assert len(before) < len(files(tmp_path / "parts")) == 7

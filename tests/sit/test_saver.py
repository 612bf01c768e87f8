"""Checkpoints that are written while training goes on, and by several processes, each of which holds a part."""

import functools
import shutil
import threading

import pytest
import torch
from torch.distributed.checkpoint.staging import DefaultStager

from layersync_kernels.errors import TrainingDiverged
from layersync_kernels.sit.checkpoints import local
from layersync_kernels.sit.checkpoints.local import DamagedCheckpoint, list_checkpoints, read_tensors
from layersync_kernels.sit.checkpoints.weights import load_weights
from layersync_kernels.sit.config.parallel import ParallelConfig
from layersync_kernels.sit.distributed.processes import ALONE, Processes
from layersync_kernels.sit.distributed.shards import whole
from layersync_kernels.sit.training.folder import start_run
from layersync_kernels.sit.training.loop import Trainer
from layersync_kernels.sit.training.runlog import read_records
from layersync_kernels.sit.training.saver import Saver

from ..integrate.distributed import run
from .tiny import tiny_config, tiny_data

STEMS = ("model", "ema", "optimizer", "rng")


def fitted(folder, **log):
    config = tiny_config(optim={"steps": 6}, log={"sample_every": 0, "checkpoint_every": 2, "log_every": 2, **log})
    start_run(folder, config, overwrite=False)
    Trainer(config, tiny_data(), run_dir=folder).fit()
    return folder


@pytest.fixture(scope="module")
def foreground(tmp_path_factory):
    return fitted(tmp_path_factory.mktemp("foreground") / "run", save_in_background=False)


def assert_same(runs):
    one, other = (list_checkpoints(folder) for folder in runs)
    assert [path.name for path in one] == [path.name for path in other]
    for mine, theirs in zip(one, other, strict=True):
        for stem in STEMS:
            tensors = read_tensors(theirs / f"{stem}.safetensors")
            for name, tensor in read_tensors(mine / f"{stem}.safetensors").items():
                assert torch.equal(tensor, tensors[name]), (mine, stem, name)


def test_a_checkpoint_holds_what_there_was_when_it_was_asked_for(foreground, tmp_path, monkeypatch):
    asked, went_on = threading.Event(), threading.Event()
    stage, write, wait = DefaultStager.stage, local.save_file, Saver._wait

    def waiting(saver, what):
        if saver._thread is not None:
            (went_on if saver._copied.done() else asked).set()
        wait(saver, what)

    def slowly(stager, tensors):
        went_on.clear()
        assert asked.wait(60)  # forward and backward passes are over, and the optimiser waits
        asked.clear()
        return stage(stager, tensors)

    def later(*arguments):
        assert went_on.wait(60)  # to a further step, or to the end
        write(*arguments)

    monkeypatch.setattr(Saver, "_wait", waiting)
    monkeypatch.setattr(DefaultStager, "stage", slowly)
    monkeypatch.setattr(local, "save_file", later)
    background = fitted(tmp_path / "run")
    assert_same((foreground, background))
    records = read_records(background)
    assert [record["step"] for record in records if "save_seconds" in record]  # of the first or second checkpoint
    assert all(0 < record["save_wait"] < record["save_seconds"] for record in records if "save_wait" in record)
    assert not any("save_wait" in record for record in read_records(foreground))


def test_training_goes_on_when_a_checkpoint_in_the_background_fails(tmp_path, monkeypatch, caplog):
    write, calls = local.save_file, []

    def fail_at_first(tensors, path, label):
        calls.append(path)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        write(tensors, path, label)

    monkeypatch.setattr(local, "save_file", fail_at_first)
    folder = fitted(tmp_path / "run")
    assert [path.name for path in list_checkpoints(folder)] == ["step_00000004", "step_00000006"]
    assert "No space left on device; there is no earlier checkpoint" in caplog.text
    assert not list((folder / "checkpoints").glob(".writing*"))


def test_what_cannot_be_copied_ends_training(tmp_path, monkeypatch):
    def out_of_memory(*_):
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(DefaultStager, "stage", out_of_memory)
    with pytest.raises(RuntimeError, match="not enough memory"):
        fitted(tmp_path / "run")


def test_an_error_lets_a_checkpoint_come_to_its_end(tmp_path, monkeypatch):
    write, raised = local.save_file, threading.Event()

    def later(*arguments):
        raised.wait(30)
        write(*arguments)

    def diverges(*_):
        raised.set()
        raise TrainingDiverged("at once")

    monkeypatch.setattr(local, "save_file", later)
    config = tiny_config(log={"sample_every": 0, "checkpoint_every": 2, "log_every": 3})
    start_run(tmp_path / "run", config, overwrite=False)
    trainer = Trainer(config, tiny_data(), run_dir=tmp_path / "run")
    check = trainer.check_finite
    monkeypatch.setattr(trainer, "check_finite", lambda: diverges() if trainer.steps_done == 3 else check())
    with pytest.raises(TrainingDiverged):
        trainer.fit()
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step_00000002"]


def divided(processes, run_dir, parallel):
    """A trainer whose optimiser has moments."""
    config = tiny_config(
        optim={"batch_size": 8, "ema_decay": (0.9, 0.5)}, parallel=ParallelConfig(parallel=parallel), log={"keep": 9}
    )
    return Trainer(config, tiny_data(), processes=processes, run_dir=run_dir)


def tensors_of(trainer):
    state = trainer.state
    modules = {"model": state.model, **state.emas}
    found = {f"{stem}.{name}": t for stem, module in modules.items() for name, t in module.state_dict().items()}
    for name, parameter in zip(state.names, state.trained, strict=True):
        found |= {f"{name}.{key}": value for key, value in state.optimizer.state[parameter].items()}
    return {name: whole(tensor).clone() for name, tensor in found.items()}


def saving(rank, *, world, parallel, run_dir):
    """What is saved at step 2, by both ways, and what a disk says that is full for the last process."""
    trainer = divided(Processes(rank, world, 2), run_dir, parallel)
    trainer.advance(1)
    trainer.save(background=True)
    trainer.advance(2)
    trainer.save()
    saved = tensors_of(trainer)
    trainer.advance(3)
    if rank == world - 1:
        local.flush = full
    with pytest.raises(local.CheckpointError) as raised:
        trainer.save()
    return saved, str(raised.value)


def full(_):
    raise OSError(28, "No space left on device")


def loading(rank, *, world, parallel, run_dir, again):
    """What is loaded, and saved in another run."""
    trainer = divided(Processes(rank, world, 2), again, parallel)
    trainer.load(list_checkpoints(run_dir)[-1])
    trainer.save()
    return tensors_of(trainer)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A run that two processes wrote, and what they held."""
    folder = tmp_path_factory.mktemp("parts")
    run_dir = folder / "run"
    results = run(functools.partial(saving, world=2, parallel="fsdp", run_dir=run_dir), folder, 120)
    return run_dir, results


@pytest.mark.xdist_group("parts")
def test_any_number_of_processes_reads_what_any_number_wrote(parts, tmp_path):
    first, results = parts
    expected = results[0][0]
    run_dir = first
    assert [path.name for path in list_checkpoints(first)] == ["step_00000001", "step_00000002"]
    names = sorted(path.name for path in (list_checkpoints(first)[-1] / "model").iterdir())
    assert names == ["shard-00001-model-00001-of-00001.safetensors", "shard-00002-model-00001-of-00001.safetensors"]
    for number, (world, parallel) in enumerate([(4, "hsdp"), (1, "ddp")]):  # and then two, see test_launched.py
        again = tmp_path / str(number)
        if world == 1:
            trainer = divided(ALONE, again, parallel)
            trainer.load(list_checkpoints(run_dir)[-1])
            trainer.save()
            found = [tensors_of(trainer)]
        else:
            place = tmp_path / f"processes-{number}"
            place.mkdir()
            function = functools.partial(loading, world=world, parallel=parallel, run_dir=run_dir, again=again)
            found = run(function, place, 120, world=world)
        for tensors in found:
            assert tensors.keys() == expected.keys()
            for name, tensor in expected.items():
                assert torch.equal(tensors[name], tensor), (world, parallel, name)
        weights = load_weights(again, which="ema-0.5").tensors
        assert weights.keys() == {name.removeprefix("ema-0.5.") for name in expected if name.startswith("ema-0.5.")}
        assert all(torch.equal(tensor, expected[f"ema-0.5.{name}"]) for name, tensor in weights.items())
        run_dir = again


@pytest.mark.xdist_group("parts")
def test_a_disk_that_is_full_for_one_process_is_an_error_of_all(parts):
    run_dir, results = parts
    for _, message in results:
        assert "cannot save" in message
        assert "No space left on device; the last good checkpoint is" in message
    assert not list((run_dir / "checkpoints").glob(".writing*"))


def cut(path):
    path.write_bytes(path.read_bytes()[:-8])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def stray(path):
    shutil.copy(path, path.with_name("shard-00003-model-00001-of-00001.safetensors"))


HARM = {
    "cut": (cut, "it is damaged"),
    "flipped": (flip, "it is damaged"),
    "lost": (lambda path: path.unlink(), "has lost model/shard-00002"),
    "another's": (lambda path: shutil.copy(path.parent.parent / "ema" / path.name, path), "it is damaged"),
    "no checksums": (lambda path: (path.parent.parent / "state.json").unlink(), "state.json"),
}


@pytest.mark.xdist_group("parts")
@pytest.mark.parametrize("harm", HARM)
def test_parts_that_are_not_what_was_written_are_refused(parts, tmp_path, harm):
    shutil.copytree(parts[0], tmp_path / "run")
    checkpoint = list_checkpoints(tmp_path / "run")[-1]
    damage, message = HARM[harm]
    damage(checkpoint / "model" / "shard-00002-model-00001-of-00001.safetensors")
    trainer = divided(ALONE, None, "ddp")
    for read in (lambda: trainer.load(checkpoint), lambda: read_tensors(checkpoint / "model")):
        with pytest.raises(DamagedCheckpoint, match=message):
            read()


@pytest.mark.xdist_group("parts")
def test_a_part_more_than_was_written_is_not_read(parts, tmp_path):
    shutil.copytree(parts[0], tmp_path / "run")
    checkpoint = list_checkpoints(tmp_path / "run")[-1]
    stray(checkpoint / "model" / "shard-00002-model-00001-of-00001.safetensors")
    with pytest.raises(DamagedCheckpoint, match="it was not saved with this checkpoint"):
        load_weights(checkpoint, which="model")
    trainer = divided(ALONE, None, "ddp")
    trainer.load(checkpoint)
    expected = parts[1][0][0]
    assert all(torch.equal(tensor, expected[f"model.{name}"]) for name, tensor in trainer.model.state_dict().items())

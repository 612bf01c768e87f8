from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import types

import pytest
import torch
from PIL import Image

from layersync_kernels.errors import CheckpointError, ConfigError, TrainingDiverged
from layersync_kernels.sit.checkpoints import local as checkpoint
from layersync_kernels.sit.checkpoints.local import DamagedCheckpoint, check_checkpoint, list_checkpoints, read_tensors
from layersync_kernels.sit.commands.train import run_training
from layersync_kernels.sit.config.io import load_config
from layersync_kernels.sit.config.loss import AlignConfig, ScheduleConfig
from layersync_kernels.sit.config.run import CONFIG
from layersync_kernels.sit.training import loop as train
from layersync_kernels.sit.training.folder import LOCK, start_run
from layersync_kernels.sit.training.loop import Trainer
from layersync_kernels.sit.training.runlog import Meter, read_records
from layersync_kernels.sit.training.terms.layersync import LayerSyncTerm

from .slow import slow_run
from .tiny import tiny_config, tiny_data


@pytest.fixture(autouse=True)
def _tiny_data(monkeypatch):
    monkeypatch.setattr("layersync_kernels.sit.training.loop.load_data", lambda config, device: tiny_data())


def weights(run, step, stem="model"):
    return read_tensors(run / "checkpoints" / f"step_{step:08d}" / f"{stem}.safetensors")


def assert_equal_files(first, second):
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


# The trajectory


@pytest.mark.parametrize("stop_at", [4, 8])
def test_resumed_run_is_bit_equal_to_an_uninterrupted_one(tmp_path, stop_at):
    config = tiny_config()
    run_training(config, tmp_path / "whole")
    run_training(tiny_config(optim={"steps": stop_at}), tmp_path / "parts")
    torch.manual_seed(12345)  # what another process would start with
    run_training(config, tmp_path / "parts", resume=True)
    for stem in ("model", "ema", "optimizer", "rng"):
        assert_equal_files(weights(tmp_path / "whole", 12, stem), weights(tmp_path / "parts", 12, stem))
    assert [r["step"] for r in read_records(tmp_path / "parts")] == [2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize("stop_at", [4, 7])
def test_records_of_a_resumed_run_are_those_of_an_uninterrupted_one(tmp_path, stop_at):
    """The first one after the resume too, which averages steps from before it."""
    log = {"log_every": 5, "sample_every": 0}
    run_training(tiny_config(log=log), tmp_path / "whole")
    trainer = Trainer(tiny_config(log=log), run_dir=tmp_path / "parts")
    start_run(tmp_path / "parts", trainer.config, overwrite=False)
    step = trainer.step
    trainer.step = lambda batch: (step(batch), trainer.steps_done == stop_at and os.kill(os.getpid(), signal.SIGTERM))
    assert trainer.fit().ended == "interrupted"
    run_training(tiny_config(log=log), tmp_path / "parts", resume=True)
    timed = ("seconds", "samples_per_second", "tokens_per_second", "data_wait", "save_seconds", "save_wait")
    whole, parts = (
        [{k: r[k] for k in r if k not in timed} for r in read_records(tmp_path / n)] for n in ("whole", "parts")
    )
    assert [record["step"] for record in whole] == [5, 10, 12]
    assert parts == whole


def test_resume_in_another_precision_goes_on(tmp_path, caplog):
    """With a scale of the loss that begins anew where there was none before."""
    for steps, precision in ((2, "fp32"), (4, "fp16"), (6, "fp16"), (8, "fp32")):
        caplog.clear()
        config = tiny_config(optim={"steps": steps}, log={"sample_every": 0}, precision=precision)
        assert run_training(config, tmp_path / "run", resume=steps > 2).step == steps
        assert ("scale of the loss begins anew" in caplog.text) == (steps == 4)


def test_two_runs_of_one_seed_are_equal_and_of_two_are_not(tmp_path):
    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        run_training(tiny_config(seed=seed), tmp_path / name)
    assert_equal_files(weights(tmp_path / "a", 12), weights(tmp_path / "b", 12))
    with pytest.raises(AssertionError):
        assert_equal_files(weights(tmp_path / "a", 12), weights(tmp_path / "c", 12))


def test_drawing_samples_and_saving_leave_the_trajectory_alone(tmp_path):
    run_training(tiny_config(), tmp_path / "often")
    run_training(tiny_config(log={"sample_every": 0, "checkpoint_every": 100, "log_every": 100}), tmp_path / "never")
    assert_equal_files(weights(tmp_path / "often", 12), weights(tmp_path / "never", 12))


class FixedNoise:
    """A transport whose noise and times are functions of the sample, so that passes of any size see the same."""

    def __init__(self, transport):
        self.transport = transport

    def training_losses(self, model, x, kwargs, **_):
        return self.transport.training_losses(model, x, kwargs, x0=x.flip(-1), t=x.mean((1, 2, 3)).sigmoid())


def test_accumulation_gives_the_gradient_of_the_whole_batch():
    results = []
    for accumulate in (1, 3):
        optim = {"accumulate": accumulate, "batch_size": 6}
        trainer = Trainer(tiny_config(optim=optim, model={"class_dropout": 0.0}, log={"sample_every": 0}), tiny_data())
        trainer.transport = FixedNoise(trainer.transport)
        trainer.step(next(trainer.data.batches(6, seed=0)))
        results.append(trainer.state.optimizer.state_dict()["state"])
    for number, state in results[0].items():
        torch.testing.assert_close(results[1][number]["exp_avg"], state["exp_avg"], rtol=1e-4, atol=1e-6)


def test_ema_is_the_decayed_sum_of_all_weights_so_far():
    trainer = Trainer(tiny_config(optim={"ema_decay": 0.75}), tiny_data())
    name = "blocks.0.mlp.fc1.weight"
    expected = trainer.model.state_dict()[name].clone()
    batches = trainer.data.batches(5, seed=0)
    for _ in range(5):
        trainer.step(next(batches))
        expected = 0.75 * expected + 0.25 * trainer.model.state_dict()[name]
    torch.testing.assert_close(trainer.ema.state_dict()[name], expected)
    assert not torch.equal(expected, trainer.model.state_dict()[name])


def test_ema_warmup_forgets_the_initial_weights_early():
    trainer = Trainer(tiny_config(optim={"ema_decay": 0.9999, "ema_warmup": True}), tiny_data())
    before = trainer.ema.state_dict()["final_layer.linear.weight"].clone()
    trainer.step(next(trainer.data.batches(5, seed=0)))
    after, now = (m.state_dict()["final_layer.linear.weight"] for m in (trainer.ema, trainer.model))
    torch.testing.assert_close(after, torch.lerp(before, now, 1 - 1 / 10))


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [("constant", [0.5, 1, 1, 1, 1]), ("linear", [0.5, 0.8, 0.6, 0.4, 0.2]), ("cosine", [0.5, 0.9045, 0.6545, 0.3455])],
)
def test_learning_rate_warms_up_and_decays(schedule, rates):
    trainer = Trainer(
        tiny_config(optim={"lr": 1.0, "lr_schedule": schedule, "warmup_steps": 2, "steps": 5}), tiny_data()
    )
    for step, rate in enumerate(rates):
        trainer.state.steps_done = step
        assert trainer.learning_rate() == pytest.approx(rate, abs=1e-4)


def test_time_budget_ends_the_run_and_decays_the_rate(tmp_path, monkeypatch):
    ticks = itertools.count()  # a clock that a busy machine does not disturb: 1 ms at each look
    monkeypatch.setattr(train, "time", types.SimpleNamespace(monotonic=lambda: 1e-3 * next(ticks)))
    log = {"sample_every": 0, "checkpoint_every": 10**9}
    config = tiny_config(optim={"steps": 10**9, "max_seconds": 0.2, "lr_schedule": "linear"}, log=log)
    outcome = run_training(config, tmp_path / "run")
    assert outcome.ended == "finished"
    assert 10 < outcome.step < 500
    assert outcome.seconds == pytest.approx(0.2, abs=0.05)
    rates = [r["lr"] for r in read_records(tmp_path / "run")]
    assert rates[-1] < 0.2 * max(rates)


# LayerSync in the loop


def test_off_is_plain_sit_and_captures_nothing(monkeypatch):
    """The weights are those of a hand-written SiT step, and the model is never asked for hidden states."""
    config = tiny_config(
        layersync={"layersync": ("off",)}, optim={"clip_norm": None, "warmup_steps": 0}, data={"flip": False}
    )
    trainer = Trainer(config, tiny_data())
    assert trainer.term(LayerSyncTerm) is None
    plain = Trainer(config, tiny_data())
    forward = trainer.model.forward
    monkeypatch.setattr(trainer.model, "forward", lambda x, t, *, y: forward(x, t, y))  # has no `capture`
    batches = [batch for _, batch in zip(range(3), trainer.data.batches(5, seed=0), strict=False)]
    torch.manual_seed(1)
    for batch in batches:
        trainer.step(batch)
    optimizer = torch.optim.AdamW(plain.state.weights, lr=config.optim.lr, weight_decay=0, fused=True)
    generator = torch.Generator().manual_seed(config.seed)
    torch.manual_seed(1)
    for batch in batches:
        inputs = {"y": batch.labels}
        loss = plain.transport.training_losses(plain.model, batch.samples, inputs, generator=generator)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_equal_files(trainer.model.state_dict(), plain.model.state_dict())


def test_layersync_changes_training_and_logs_a_cosine_per_pair(tmp_path):
    pairs = {"layersync": ("1:2", "1:3"), "weight": (0.5, 0.25)}
    run_training(tiny_config(layersync=pairs), tmp_path / "on")
    run_training(tiny_config(layersync={"layersync": ("off",)}), tmp_path / "off")
    with pytest.raises(AssertionError):
        assert_equal_files(weights(tmp_path / "on", 12), weights(tmp_path / "off", 12))
    for record in read_records(tmp_path / "on"):
        assert set(record["cosine"]) == {"1:2", "1:3"}
        weighted = -0.5 * record["cosine"]["1:2"] - 0.25 * record["cosine"]["1:3"]
        assert record["align_loss"] == pytest.approx(weighted, rel=1e-4)
    assert all("cosine" not in record and "align_loss" not in record for record in read_records(tmp_path / "off"))


def test_nothing_is_captured_in_steps_that_layersync_skips(monkeypatch):
    trainer = Trainer(tiny_config(layersync={"when": ScheduleConfig(every=2, stop_step=5)}), tiny_data())
    asked = []
    forward = trainer.model.forward

    def spy(x, t, y, capture=()):
        asked.append(tuple(capture))
        return forward(x, t, y, capture)

    monkeypatch.setattr(trainer.model, "forward", spy)
    batches = trainer.data.batches(5, seed=0)
    for _ in range(7):
        trainer.step(next(batches))
    captures = trainer.term(LayerSyncTerm).module.captures
    assert asked == [captures, (), captures, (), captures, (), ()]


# The run's folder


def test_run_folder_holds_all_that_is_promised(tmp_path):
    config = tiny_config(log={"tensorboard": True, "keep": 1})
    run_training(config, tmp_path / "run")
    run = tmp_path / "run"
    assert load_config(run / CONFIG) == config
    assert [p.name for p in list_checkpoints(run)] == ["step_00000012"]
    assert [p.name for p in sorted((run / "samples").iterdir())] == [f"step_{s:08d}.png" for s in (4, 8, 12)]
    assert Image.open(run / "curves.png").size[0] > 100
    assert len(list((run / "tensorboard").iterdir())) == 1
    record = read_records(run)[-1]
    rates = {"samples_per_second", "tokens_per_second", "data_wait"}
    assert {"step", "loss", "align_loss", "cosine", "lr", "grad_norm", "seconds"} | rates == set(record) - {
        "save_seconds",
        "save_wait",
    }


def test_existing_run_is_not_touched_unless_asked(tmp_path):
    run = tmp_path / "run"
    run_training(tiny_config(), run)
    before = weights(run, 12)
    with pytest.raises(ConfigError, match=r"run exists; choose another --out, or --resume or --overwrite"):
        run_training(tiny_config(seed=1), run)
    assert_equal_files(before, weights(run, 12))
    with pytest.raises(ConfigError, match="exclude"):
        run_training(tiny_config(), run, resume=True, overwrite=True)
    with pytest.raises(ConfigError, match=r"finished at step 12; give more --steps"):
        run_training(tiny_config(), run, resume=True)
    run_training(tiny_config(seed=1), run, overwrite=True)
    with pytest.raises(AssertionError):
        assert_equal_files(before, weights(run, 12))


def test_folder_that_is_no_run_is_never_deleted(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    for flags in ({"overwrite": True}, {"resume": True}, {}):
        with pytest.raises(ConfigError, match="not a run"):
            run_training(tiny_config(), tmp_path, **flags)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_settings_that_fail_do_not_delete_the_run_to_be_overwritten(tmp_path):
    run_training(tiny_config(), tmp_path / "run")
    with pytest.raises(ConfigError):
        run_training(tiny_config(model={"model": "nonsense"}), tmp_path / "run", overwrite=True)
    assert weights(tmp_path / "run", 12)


def flip_bit(path):
    """In the middle of a file: a weight, a moment, a digit."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["model", "ema", "optimizer", "rng", "projector", "state.json"])
def test_resume_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path, caplog, file):
    align = {}
    if file == "projector":
        (tmp_path / "hubconf.py").write_text(
            "import torch\ndef tiny(pretrained):\n    return torch.nn.Conv2d(3, 8, 2, 2)\n"
        )
        align = {"align": AlignConfig(align="repa", teacher=f"hub/{tmp_path}:tiny", teacher_size=4)}
    config, run = tiny_config(log={"keep": 2}, **align), tmp_path / "run"
    run_training(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", run)
    damaged = run / "checkpoints" / "step_00000012" / (file if "." in file else f"{file}.safetensors")
    flip_bit(damaged)
    with pytest.raises(DamagedCheckpoint, match=damaged.name):
        Trainer(config, tiny_data()).load(damaged.parent)
    assert run_training(config, run, resume=True).step == 12
    assert str(damaged) in caplog.text
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == [
        "damaged-step_00000012",
        "step_00000008",
        "step_00000012",
    ]
    for stem in ("model", "ema", "optimizer", "rng"):
        assert_equal_files(weights(tmp_path / "whole", 12, stem), weights(run, 12, stem))
    assert [r["step"] for r in read_records(run)] == [2, 4, 6, 8, 10, 12]


def test_resume_of_a_run_whose_checkpoints_are_all_damaged_changes_nothing(tmp_path):
    run = tmp_path / "run"
    run_training(tiny_config(log={"keep": 2}), run)
    for folder in list_checkpoints(run):
        flip_bit(folder / "ema.safetensors")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"every .*step_00000012.ema.*step_00000008.ema"):
        run_training(tiny_config(optim={"steps": 20}), run, resume=True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_resume_with_another_model_names_the_file(tmp_path):
    run_training(tiny_config(optim={"steps": 4}), tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not fit"):
        run_training(tiny_config(model={"depth": 2}), tmp_path / "run", resume=True)


def test_init_starts_from_a_checkpoint(tmp_path):
    run_training(tiny_config(), tmp_path / "run")
    trainer = Trainer(tiny_config(model={"init": tmp_path / "run"}), tiny_data())
    assert_equal_files(trainer.model.state_dict(), weights(tmp_path / "run", 12, "ema"))


# When things go wrong


def test_full_disk_lets_training_go_on_and_keeps_the_last_checkpoint(tmp_path, monkeypatch, caplog):
    attempts = []
    save_file = checkpoint.save_file

    def sometimes_full(tensors, path, metadata):
        attempts.append(path)
        if "00000008" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", sometimes_full)
    assert run_training(tiny_config(), tmp_path / "run").step == 12
    assert [p.name for p in list_checkpoints(tmp_path / "run")] == ["step_00000004", "step_00000012"]
    assert "No space left" in caplog.text
    assert "training goes on" in caplog.text


def test_full_disk_at_the_end_is_an_error_that_names_the_last_checkpoint(tmp_path, monkeypatch):
    save_file = checkpoint.save_file

    def full(tensors, path, metadata):
        if "00000004" not in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left.*last good checkpoint is .*step_00000004"):
        run_training(tiny_config(), tmp_path / "run")
    monkeypatch.undo()
    monkeypatch.setattr("layersync_kernels.sit.training.loop.load_data", lambda config, device: tiny_data())
    assert run_training(tiny_config(), tmp_path / "run", resume=True).step == 12


@pytest.mark.parametrize("bad_step", [6, 7])
def test_nan_loss_stops_names_the_step_and_keeps_good_checkpoints(tmp_path, monkeypatch, bad_step):
    step = Trainer.step

    def poisoned(self, batch):
        bad = dataclasses.replace(batch, samples=batch.samples * float("nan"))
        step(self, bad if self.steps_done + 1 == bad_step else batch)

    monkeypatch.setattr(Trainer, "step", poisoned)
    with pytest.raises(TrainingDiverged, match=rf"not finite at step {bad_step}; .*step_00000004"):
        run_training(tiny_config(), tmp_path / "run")
    assert [p.name for p in list_checkpoints(tmp_path / "run")] == ["step_00000004"]


def test_nan_weights_are_never_saved(tmp_path):
    trainer = Trainer(tiny_config(), tiny_data(), run_dir=tmp_path)
    with torch.no_grad():
        trainer.model.blocks[1].mlp.fc1.weight[0, 0] = float("nan")
    with pytest.raises(TrainingDiverged, match="weights were not finite"):
        trainer.save()
    assert list_checkpoints(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupt_finishes_the_step_saves_and_says_how_to_resume(tmp_path, number):
    with slow_run(tmp_path / "run", 0.2) as process:
        os.kill(process.pid, number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == (0 if number == signal.SIGTERM else 130), errors
    (saved,) = list_checkpoints(tmp_path / "run")
    text = " ".join(errors.split())
    assert f"saved at step {int(saved.name[5:])}" in text
    assert "--resume" in text
    assert "Traceback" not in text


def test_a_signal_to_save_saves_and_training_goes_on(tmp_path):
    run = tmp_path / "run"
    with slow_run(run, 0.05) as process:
        for number in (1, 2):
            os.kill(process.pid, signal.SIGUSR1)
            while len(list_checkpoints(run)) < number:
                assert process.stdout.readline().startswith("step")
        os.kill(process.pid, signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 0
    check_checkpoint(list_checkpoints(run)[0])


TWO_SIGNALS = """
import signal, sys
from layersync_kernels.sit.training.signals import stop_signals
for line in range(1, 40):
    def trace(frame, event, _):
        global line
        line -= event == "line"
        if event == "line" and line == 0:
            signal.raise_signal(signal.SIGHUP)
        return trace
    with stop_signals() as stop_asked:
        sys.settrace(trace)
        signal.raise_signal(signal.SIGTERM)
        sys.settrace(None)
        assert stop_asked()
"""


def test_signal_in_the_middle_of_another_does_not_hang():
    """The second one comes at each line that the handler of the first runs, in turn."""
    done = subprocess.run([sys.executable, "-c", TWO_SIGNALS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


OWN_TERMINAL = "import fcntl, os, termios; os.setsid(); fcntl.ioctl(2, termios.TIOCSCTTY, 0)"


def test_terminal_that_closes_is_a_request_to_save(tmp_path):
    """The system sends SIGHUP to what ran there, its shell another one, and nothing can be printed any more."""
    ours, theirs = pty.openpty()
    with slow_run(tmp_path / "run", 0.2, before=OWN_TERMINAL, stderr=theirs) as process:
        os.close(theirs)
        os.close(ours)
        os.kill(process.pid, signal.SIGHUP)
        process.communicate(timeout=60)
    assert len(list_checkpoints(tmp_path / "run")) == 1
    assert not (tmp_path / "run" / LOCK).exists()


def test_run_under_nohup_outlives_its_terminal(tmp_path):
    with slow_run(
        tmp_path / "run", 0.05, before="import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    ) as process:
        os.kill(process.pid, signal.SIGHUP)
        for _ in range(3):
            assert process.stdout.readline().startswith("step")
        os.kill(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert "SIGTERM: finishing" in errors
    assert "SIGHUP" not in errors


def test_second_interrupt_aborts(tmp_path):
    with slow_run(tmp_path / "run", 30) as process:
        os.kill(process.pid, signal.SIGINT)
        while "aborts" not in process.stderr.readline():  # two signals at once would count as one
            pass
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=25)
    assert process.returncode == 130
    assert "aborted" in errors
    assert "Traceback" not in errors
    assert list_checkpoints(tmp_path / "run") == []


# Meters


def test_meter_averages_between_reads():
    meter = Meter()
    for value in (1.0, 2.0, 6.0):
        meter.add("loss", torch.tensor(value))
    assert meter.read() == {"loss": 3.0}
    assert meter.read() == {}


def test_meter_goes_on_from_its_state_and_keeps_no_infinity():
    meter, resumed = Meter(), Meter()
    for value in (0.1, 2.0):
        meter.add("loss", torch.tensor(value))
        meter.add("grad_norm", torch.tensor(float("inf")))
    resumed.load_state_dict(json.loads(json.dumps(meter.state_dict(), allow_nan=False)), torch.device("cpu"))
    for each in (meter, resumed):
        each.add("loss", torch.tensor(6.0))
    assert resumed.read() == {"loss": meter.read()["loss"]}

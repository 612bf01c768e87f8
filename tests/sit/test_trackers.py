"""What Weights & Biases gets of a run: the real package, offline."""

import dataclasses
import json
import logging
import os
import struct
import sys

import pytest

from layersync_kernels.errors import ConfigError
from layersync_kernels.sit.checkpoints.local import list_checkpoints
from layersync_kernels.sit.commands.train import run_training
from layersync_kernels.sit.data import registry
from layersync_kernels.sit.training.runlog import read_records

from .tiny import tiny_config, tiny_data


@pytest.fixture(autouse=True)
def data(monkeypatch):
    kind = registry.DataKind("tiny", lambda name: name == "unused", lambda _: tiny_data())
    monkeypatch.setattr(registry, "KINDS", [kind])


@pytest.fixture
def wandb(monkeypatch):
    """The package, whose runs stay on this machine."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    yield wandb
    wandb.teardown()


def tracked(steps=12, **groups):
    return tiny_config(log={"wandb": "digits", "sample_every": 0}, optim={"steps": steps}, **groups)


def written(run):
    """The records of each file that W&B keeps for its upload: frames as of LevelDB's log behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    for path in sorted(run.glob("wandb/offline-run-*/*.wandb"), key=os.path.getmtime):
        content, place, whole, records = path.read_bytes(), 7, b"", []
        while place + 7 <= len(content):
            if (left := -place % 2**15) and left < 7:
                place += left
                continue
            _, length, kind = struct.unpack_from("<IHB", content, place)
            whole += content[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # whole, or the last part
                records.append(Record.FromString(whole))
                whole = b""
        yield records


def of_kind(records, kind):
    return [getattr(record, kind) for record in records if record.WhichOneof("record_type") == kind]


def history(records):
    """By step, what W&B shows of it."""
    found = {}
    for entry in of_kind(records, "history"):
        values = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in entry.item}
        found[values["_step"]] = {name: value for name, value in values.items() if not name.startswith("_")}
    return found


def flat(record):
    values = {name: value for name, value in record.items() if name not in ("step", "cosine")}
    return values | {f"cosine/{pair}": value for pair, value in record.get("cosine", {}).items()}


def test_wandb_gets_the_records_and_a_resume_goes_on_in_the_same_run(wandb, tmp_path):
    run = tmp_path / "digits-1"
    run_training(tracked(steps=8), run)
    run_training(tracked(steps=12), run, resume=True)
    first, second = written(run)
    both = history(first) | history(second)
    records = read_records(run)
    assert [record["step"] for record in records] == [2, 4, 6, 8, 10, 12]
    assert (list(history(first)), list(history(second))) == ([2, 4, 6, 8], [10, 12])
    for record in records:
        assert both[record["step"]] == pytest.approx(flat(record))
    (begun,), (resumed,) = of_kind(first, "run"), of_kind(second, "run")
    mark = json.loads((list_checkpoints(run)[-1] / "state.json").read_text())["run"]
    assert begun.run_id == resumed.run_id == mark
    assert (begun.project, begun.display_name) == ("digits", "digits-1")
    shown = {item.key: json.loads(item.value_json) for item in begun.config.update}
    assert shown["optim"] == json.loads(json.dumps(dataclasses.asdict(tracked(steps=8).optim)))
    assert [entry.exit_code for entry in of_kind(first, "exit")] == [0]


def test_what_wandb_has_already_is_not_written_again(wandb, tmp_path, monkeypatch):
    monkeypatch.setattr(wandb.Run, "step", 7)  # as of a run that had come further than its last checkpoint
    run_training(tracked(), tmp_path / "run")
    (records,) = written(tmp_path / "run")
    assert list(history(records)) == [8, 10, 12]


def test_wandb_that_fails_is_said_once_and_training_goes_on(wandb, tmp_path, monkeypatch, caplog):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    def unreachable(**_):
        raise wandb.errors.CommError("the network is gone\nwhile retrying")

    for where, name, failure, message in (
        (wandb.Run, "log", full, "Weights & Biases: [Errno 28] No space left on device; training goes on without it"),
        (wandb, "init", unreachable, "Weights & Biases: the network is gone; training goes on without it"),
    ):
        caplog.clear()
        with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
            patched.setattr(where, name, failure)
            outcome = run_training(tracked(), tmp_path / name)
        assert outcome.step == 12
        assert [record.message for record in caplog.records if "Biases" in record.message] == [message]


def test_wandb_that_is_missing_stops_before_there_is_a_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"--wandb needs a package: .*pip install 'layersync_kernels\[wandb\]'"):
        run_training(tracked(), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()

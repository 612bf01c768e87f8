from __future__ import annotations

import collections
import io

import pytest
import torch
from rich.console import Console

from layersync_kernels.bench import throughput
from layersync_kernels.bench.engine import DeviceLost
from layersync_kernels.bench.throughput import (
    PROVIDERS,
    TRAINERS,
    PublishedTrainer,
    measure_throughput,
    provider_config,
)
from layersync_kernels.modules.block import AdaLNZeroBlock
from layersync_kernels.sit.training.loop import Trainer
from layersync_kernels.sit.training.terms.layersync import LayerSyncTerm

from ..sit.tiny import tiny_config, tiny_data


def test_throughput_of_every_provider():
    configs = {name: provider_config(tiny_config(), name) for name in PROVIDERS if name != "compile"}
    assert configs["off"].layersync.layersync == ("off",)
    assert configs["eager"].layersync.loss_backend == "reference"
    assert configs["eager"].model.kernels == "eager"
    assert configs["published"].precision == "fp32"
    assert configs["applied"].model.kernels == "eager"
    assert configs["applied"].layersync.loss_backend == "auto"
    rates = measure_throughput(configs, trainers=TRAINERS, steps=1, rounds=2, warmup=1, data=tiny_data())
    assert all(0 < min(rate.rounds) <= rate.median for rate in rates.values())
    assert rates["eager"].over(rates["eager"]) == 1
    assert provider_config(tiny_config(), "compile").compile == "on"
    with pytest.raises(ValueError, match="no provider"):
        provider_config(tiny_config(), "magic")


def test_the_table_fits_into_80_columns():
    numbers = {"images_per_s": 511.25, "low": 498.75, "high": 520.5, **{f"vs_{name}": 1.034 for name in PROVIDERS}}
    row = {"op": "trainer", "case": "SiT-XL/2 batch 64", "device": "cuda", "provider": "fused fp32", "problem": None}
    console = Console(width=80, file=io.StringIO())
    throughput.print_table([row | numbers], console)
    text = console.file.getvalue()
    assert "fused fp32   511.250  498.750  520.500" in text
    assert "…" not in text


def test_configurations_that_differ_in_layersync_share_a_trainer(monkeypatch):
    made = []
    monkeypatch.setattr(throughput, "Trainer", lambda *args: made.append(Trainer(*args)) or made[-1])
    seen = []
    step = Trainer.step
    monkeypatch.setattr(
        Trainer, "step", lambda self, batch: (seen.append(self.term(LayerSyncTerm) is None), step(self, batch))
    )
    configs = {name: provider_config(tiny_config(), name) for name in ("fused", "off")}
    measure_throughput(configs, steps=1, rounds=2, warmup=0, data=tiny_data())
    assert len(made) == 1
    assert seen == [False, True, True, False]


def test_the_applied_trainer_has_fused_blocks_in_a_plain_model():
    trainer = TRAINERS["applied"](provider_config(tiny_config(), "applied"), tiny_data())
    assert {type(block) for block in trainer.model.blocks} == {AdaLNZeroBlock}


def test_the_published_average_and_optimiser_give_the_same_weights():
    trainers = [kind(tiny_config(model={"kernels": "eager"}), tiny_data()) for kind in (Trainer, PublishedTrainer)]
    for trainer in trainers:
        torch.manual_seed(0)  # of the weights, then of the labels that are dropped
        for parameter in trainer.model.parameters():  # at initialisation gradients are noise, which AdamW amplifies
            parameter.detach().normal_(std=0.1)
        batches = trainer.data.batches(trainer.config.optim.batch_size, seed=0)
        for _ in range(3):
            trainer.step(next(batches))
    for name in ("model", "ema"):
        states = [getattr(trainer, name).state_dict() for trainer in trainers]
        for key, value in states[0].items():
            # Three steps of 0.01; an average or a step that is wrong is off by a tenth of one or more.
            torch.testing.assert_close(
                value, states[1][key], rtol=0, atol=2e-4, msg=lambda text, key=key: f"{key}: {text}"
            )


class CompilationError(Exception):
    """No RuntimeError, as Triton's is none."""


class FailsWhenBuilt(Trainer):
    def __init__(self, *args):
        raise CompilationError("no such instruction")


class FailsLater(Trainer):
    def step(self, batch):
        if self.steps_done == 2:
            raise torch.OutOfMemoryError("20 GiB")
        return super().step(batch)


FAILING = pytest.mark.parametrize(
    ("kind", "problem"),
    [(FailsWhenBuilt, "CompilationError: no such instruction"), (FailsLater, "OutOfMemoryError: 20 GiB")],
)


@pytest.fixture
def small(monkeypatch):
    """A trainer benchmark of three contenders that is over at once."""
    configs = {name: provider_config(tiny_config(), name) for name in ("fused", "eager", "applied")}
    turns = throughput.turns
    monkeypatch.setattr(throughput, "contenders", lambda config: configs)
    monkeypatch.setattr(throughput, "turns", lambda c, **o: turns(c, **{**o, "warmup": 1, "data": tiny_data()}))
    return monkeypatch


@FAILING
def test_a_contender_that_fails_is_a_row_and_the_others_go_on(kind, problem, small):
    small.setitem(TRAINERS, "applied", kind)
    rows = list(throughput.measure("cpu", quick=True))
    assert {row["provider"]: row["problem"] for row in rows if row["op"] == "trainer"} == {
        "fused": None, "eager": None, "applied": problem,
    }  # fmt: skip
    timed = [row for row in rows if row["op"] == "trainer turn" and row["problem"] is None]
    assert [row["provider"] for row in timed if row["provider"] != "applied"] == ["fused", "eager", "eager", "fused"]


def test_each_turn_is_a_row_at_once_and_an_interrupted_contest_goes_on(small):
    rows = []
    for row in throughput.measure("cpu", quick=True):
        rows.append(row)
        if len(rows) == 4:  # a round and a part of one
            break
    begun = [(0, "fused"), (0, "eager"), (0, "applied"), (1, "applied")]
    assert [(row["round"], row["provider"]) for row in rows] == begun
    more = list(throughput.measure("cpu", quick=True, earlier=rows))
    assert [(row["round"], row["provider"]) for row in more[:3]] == [(2, "fused"), (2, "eager"), (2, "applied")]
    summary = {row["provider"]: row for row in more[3:]}
    assert summary.keys() == {"fused", "eager", "applied"}
    rates = [row["images_per_s"] for row in (rows[0], more[0])]
    assert (summary["fused"]["low"], summary["fused"]["high"]) == (min(rates), max(rates))
    assert summary["eager"]["vs_eager"] == 1


@FAILING
def test_a_contender_that_takes_the_device_with_it_stays_out_of_the_next_process(kind, problem, small):
    small.setitem(TRAINERS, "applied", kind)
    small.setattr(throughput, "device_lost", lambda device: True)
    rows = []
    measured = throughput.measure("cpu", quick=True)
    with pytest.raises(DeviceLost, match=f"applied has left the device unusable: {problem}"):
        collections.deque(map(rows.append, measured))
    assert rows[-1]["problem"] == problem
    more = list(throughput.measure("cpu", quick=True, earlier=rows))
    assert {row["provider"] for row in more if row["op"] == "trainer turn"} == {"fused", "eager"}
    assert {row["provider"]: row["problem"] for row in more if row["op"] == "trainer"}["applied"] == problem

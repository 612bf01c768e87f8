"""`layersync scale`: its arithmetic by hand and at its limits, its bytes against processes, its errors."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from layersync_kernels import cli
from layersync_kernels.bench.report import read_json
from layersync_kernels.bench.scale.collectives import Cost, Group
from layersync_kernels.bench.scale.command import MEASURED_MFU, ScaleConfig, scenarios, update_ms
from layersync_kernels.bench.scale.count import count, network, units_of
from layersync_kernels.bench.scale.inputs import STRATEGIES, Inputs, Unit
from layersync_kernels.bench.scale.links import FABRICS, LINKS, STORAGES, Link, find_link
from layersync_kernels.bench.scale.model import Estimate, checkpoint, estimate, memory
from layersync_kernels.bench.scale.schedule import buckets, timeline
from layersync_kernels.bench.traffic import Provider, training_step
from layersync_kernels.compiler.cards import CARDS
from layersync_kernels.compiler.gpu_graph import count_gpu_step
from layersync_kernels.errors import ConfigError, UserError
from layersync_kernels.sit.models.flops import training_flops
from layersync_kernels.sit.models.registry import sit_models

from ..integrate import distributed

SMALL = ["--model", "SiT-P/8", "--image-size", "16", "--batch-per-gpu", "2"]
QUIET = Link("quiet", 1.0, 0.0, "made up")


def inputs_of(**changes):
    """Two equal blocks on two GPUs; passes of 10 and 20 ms; a link of 1 GB/s without latency."""
    given = {
        "gpus": 2,
        "gpus_per_node": 8,
        "strategy": "ddp",
        "units": (Unit(1_000_000, 1_000_000, 0.5), Unit(1_000_000, 1_000_000, 0.5)),
        "batch": 4,
        "forward_ms": 10.0,
        "backward_ms": 20.0,
        "update_ms": 3.0,
        "gradient_bytes": 2,
        "intra": QUIET,
        "inter": QUIET,
    }
    return Inputs(**{**given, **changes})


def flat(played):
    """A timeline as plain numbers: compute, bytes sent, bytes out of the node, communication, end."""
    return (played.compute_ms, *played.communication, played.end_ms)


def group(nodes, per_node, intra=100.0, inter=10.0, latencies=(0.0, 0.0)):
    return Group(nodes, per_node, Link("a", intra, latencies[0], ""), Link("b", inter, latencies[1], ""))


def test_a_ring_by_hand():
    # 2·3/4 of a GB at 100 GB/s; half of that for each half of an all-reduce
    assert group(1, 4).all_reduce(1e9) == pytest.approx(Cost(1.5e9, 0, 15))
    assert group(1, 4).gather(1e9) == pytest.approx(Cost(0.75e9, 0, 7.5))
    assert group(1, 4).reduce_scatter(1e9) == group(1, 4).gather(1e9)
    # six steps of 10 µs
    assert group(1, 4, latencies=(10, 0)).all_reduce(1e9).ms == pytest.approx(15.06)
    # two nodes of four: four links of 10 GB/s leave each, 7 steps, one of which does
    assert group(2, 4, latencies=(10, 100)).gather(8e8) == pytest.approx(Cost(7e8, 1.75e8, 7e8 / 40e6 + 0.16))
    # and no more than the links inside take: 16 links of 10 GB/s
    assert group(2, 16).gather(32e8).ms == pytest.approx(31e8 / 100e6)
    # GPUs of one node each have the link between nodes alone
    assert group(4, 1).all_reduce(4e8) == pytest.approx(Cost(6e8, 6e8, 60))


def test_trees_take_over_where_steps_cost_more_than_bytes():
    tiny = group(4, 1, latencies=(0, 1000))
    assert tiny.all_reduce(1.0).ms == pytest.approx(4)  # 2·log2(4) steps, where a ring has 6
    assert tiny.all_reduce(1.0).sent == 2
    assert tiny.all_reduce(1e9).sent == 1.5e9  # the bytes of a ring, which are fewer
    assert tiny.gather(1.0).ms == pytest.approx(3)  # by a ring alone


def test_one_gpu_has_no_communication():
    for strategy in ("ddp", "fsdp"):
        result = estimate(inputs_of(gpus=1, strategy=strategy))
        assert (result.wire_bytes, result.between_bytes, result.communication_ms, result.exposed_ms) == (0, 0, 0, 0)
        assert result.step_ms == 33
        assert result.efficiency == 1
        assert result.images_per_s == pytest.approx(4 / 0.033)
    assert estimate(inputs_of(gpus=8, strategy="hsdp")).between_bytes == 0  # a node is one copy


@pytest.mark.parametrize("gpus", [2, 8, 64, 1 << 20])
def test_ddp_sends_up_to_twice_the_gradients_and_fsdp_half_as_much_again(gpus):
    gradients = 2 * 2_000_000
    ddp, fsdp = (estimate(inputs_of(gpus=gpus, strategy=name)).wire_bytes for name in ("ddp", "fsdp"))
    assert ddp == pytest.approx(2 * (gpus - 1) / gpus * gradients)
    assert fsdp == pytest.approx(1.5 * ddp)
    kept = estimate(inputs_of(gpus=gpus, strategy="fsdp", reshard=False)).wire_bytes
    assert kept == pytest.approx(ddp)  # one all-gather and one reduce-scatter


def test_hsdp_sends_a_share_between_nodes():
    result = estimate(inputs_of(gpus=32, strategy="hsdp"))
    inside, outside = 3 * 7 / 8 * 4e6, 2 * 3 / 4 * 4e6 / 8
    assert result.wire_bytes == pytest.approx(inside + outside)
    assert result.between_bytes == pytest.approx(outside)
    fsdp = estimate(inputs_of(gpus=32, strategy="fsdp"))
    assert fsdp.between_bytes == pytest.approx(3 * 31 / 32 * 4e6 / 8)  # an eighth of it leaves by each GPU's link


def test_frozen_parameters_are_gathered_and_have_no_gradient():
    units = (Unit(1_000_000, 0, 0.0), Unit(1_000_000, 1_000_000, 1.0))
    assert estimate(inputs_of(units=units)).wire_bytes == pytest.approx(2e6)
    assert estimate(inputs_of(units=units, strategy="fsdp")).wire_bytes == pytest.approx(2 * 2e6 + 1e6)
    assert memory(inputs_of(units=units)).gradients == 4e6


def test_ddp_hides_all_but_the_last_bucket():
    mib = (1 << 20) // 4
    link = Link("4 ms for a MiB", (1 << 20) / 4e6, 0.0, "made up")
    given = inputs_of(units=(Unit(mib, mib, 0.5), Unit(mib, mib, 0.5)), bucket_mb=1, gradient_bytes=4, intra=link)
    assert [(bucket.elements, bucket.ready) for bucket in buckets(given)] == [(mib, 0.5), (mib, 1.0)]
    assert estimate(given).exposed_ms == pytest.approx(4)  # begins when the backward pass has ended
    assert estimate(dataclasses.replace(given, overlap=0.5)).exposed_ms == pytest.approx(6)
    assert estimate(dataclasses.replace(given, overlap=0.0)).exposed_ms == pytest.approx(8)
    slow = dataclasses.replace(given, intra=dataclasses.replace(link, gigabytes_per_s=link.gigabytes_per_s / 5))
    # 20 to 40 ms the first bucket, whose gradients are there in the middle of the backward pass; then the second
    assert timeline(slow).end_ms == pytest.approx(60)
    assert estimate(slow).exposed_ms == pytest.approx(30)


def test_buckets_hold_every_gradient_and_none_before_it_is_there():
    units = (Unit(900_000, 700_000, 0.0), *[Unit(3_000_001, 3_000_001, 0.25)] * 4)
    found = list(buckets(inputs_of(units=units, bucket_mb=4)))
    assert sum(bucket.elements for bucket in found) == pytest.approx(sum(unit.trained for unit in units))
    assert found[0].elements == (1 << 20) / 4  # as in DistributedDataParallel, 1 MiB
    assert {bucket.elements for bucket in found[1:-1]} == {1 << 20}
    for number, bucket in enumerate(found):
        elements = sum(earlier.elements for earlier in found[: number + 1])
        assert bucket.ready == pytest.approx(min(1.0, elements / (4 * 3_000_001)))


def test_fsdp_waits_for_the_first_gathers_and_the_last_scatter():
    # Each transfer takes 1 ms. Forward 1 + 5 + 5; backward 1 + 10 + 10; the last gradients 1.
    given = inputs_of(strategy="fsdp")
    assert flat(timeline(given)) == pytest.approx((30, 6e6, 0, 6, 33))
    assert flat(timeline(dataclasses.replace(given, reshard=False))) == pytest.approx((30, 4e6, 0, 4, 32))
    # At 20 ms each: forward 20 + 5, then 40 + 5; backward 65 + 10, then 85 + 10. The second unit's gradients are there
    # at 75 and wait until 85 for the first unit's gather; then 20 for them and 20 for those of the first.
    slow = dataclasses.replace(given, intra=Link("slow", 0.05, 0.0, "made up"))
    assert timeline(slow).end_ms == pytest.approx(125)
    # No more than the next unit is gathered ahead: the third, of 6 ms, is asked for when the second begins, at 4.
    units = (Unit(1_000_000, 0, 1 / 3), Unit(1_000_000, 0, 1 / 3), Unit(6_000_000, 0, 1 / 3))
    ahead = dataclasses.replace(given, units=units, forward_ms=9.0, backward_ms=9.0, reshard=False)
    assert timeline(ahead).end_ms == pytest.approx(4 + 6 + 3 + 9)


def test_hsdp_sums_between_nodes_beside_the_scatters():
    given = inputs_of(gpus=4, gpus_per_node=2, strategy="hsdp", inter=Link("half", 0.5, 0.0, "made up"))
    # as fsdp in two GPUs, then 2 ms between nodes for the half of the gradients of the first unit
    assert flat(timeline(given)) == pytest.approx((30, 6e6 + 2e6, 2e6, 6 + 4, 35))


def test_crowded_cores_slow_compute():
    assert estimate(inputs_of(gpus=1, cores=2)).compute_ms == estimate(inputs_of(gpus=2, cores=2)).compute_ms == 33
    assert estimate(inputs_of(gpus=8, cores=2)).compute_ms == 4 * 33


def test_memory_by_hand_and_how_it_falls():
    units = (Unit(1000, 900, 1.0),)
    common = {"units": units, "copy_bytes": 2000, "activation_bytes": 77}
    alone = memory(inputs_of(**common, gpus=1))
    assert dataclasses.astuple(alone) == (4000, 2000, 3600, 7200, 4000, 77)
    assert alone.total == 20877
    assert memory(inputs_of(**common, gpus=8)) == alone
    assert memory(inputs_of(**common, gpus=1, ema_copies=3)).ema == 12_000
    units = (Unit(1000, 1000, 0.0), *[Unit(10_000, 10_000, 0.01)] * 100)
    spread = [memory(inputs_of(units=units, gpus=gpus, strategy="fsdp")) for gpus in (2, 8, 64)]
    assert [own.optimizer for own in spread] == [8 * 1_001_000 / gpus for gpus in (2, 8, 64)]
    assert spread[0].copies == 2 * 2 * 10_000  # the block at work and the next, in halves
    assert spread[0].total > spread[1].total > spread[2].total
    hsdp = [memory(inputs_of(units=units, gpus=gpus, strategy="hsdp")) for gpus in (8, 64)]
    assert hsdp[0] == hsdp[1] == spread[1]
    whole = memory(inputs_of(units=units, gpus=8, strategy="fsdp", reshard=False))
    assert whole.copies == 2 * 1_001_000
    assert memory(inputs_of(units=units[1:2], gpus=8, strategy="fsdp")).copies == 2 * 10_000  # there is no other


def test_checkpoints_by_hand():
    units = (Unit(2_000_000_000, 1_500_000_000, 1.0),)
    common = {"units": units, "storage_gbs": 4.0, "writer_gbs": 1.0}
    size = 4e9 * (2 + 2 + 2 * 1.5)  # weights, one average, two moments
    assert checkpoint(inputs_of(**common)) == (size, size, 28.0)  # one process writes 1 GB/s
    assert checkpoint(inputs_of(**common, gpus=8, strategy="fsdp")) == (size, size / 8, 7.0)  # the node, 4 GB/s
    assert checkpoint(inputs_of(**common, gpus=16, strategy="fsdp")) == (size, size / 16, 3.5)
    assert checkpoint(inputs_of(**common, gpus=16, strategy="hsdp")) == (size, size / 8, 7.0)
    result = estimate(inputs_of(**common, gpus=1, checkpoint_every=1000))
    assert result.checkpoint_share == pytest.approx(28 / (28 + 33))


def test_data_and_update_by_hand():
    assert estimate(inputs_of(gpus=1, bytes_per_sample=1e6)).data_gbs == pytest.approx(4 / 0.033 / 1e3)
    # 7 numbers of AdamW and 3 of the average, 4 bytes each, at 3 TB/s
    assert update_ms(675_000_000, CARDS["h100"], optimizer_states=2, ema_copies=1) == pytest.approx(9.0)
    sharded = estimate(inputs_of(gpus=2, strategy="fsdp"))
    assert sharded.compute_ms == 30 + 1.5


def test_counts_are_those_of_the_network():
    model = network("SiT-P/8", 16)
    units = units_of(model)
    assert sum(unit.parameters for unit in units) == sum(p.numel() for p in model.parameters())
    assert sum(unit.trained for unit in units) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(unit.share for unit in units) == pytest.approx(1)
    assert {unit.parameters for unit in units[1:]} == {sum(p.numel() for p in model.blocks[0].parameters())}
    whole = count_gpu_step(lambda: training_step(Provider("fused"), "SiT-P/8", 2, torch.bfloat16, 6, input_size=16))
    counted = count("SiT-P/8", 16, 2, "bf16", "h100")
    assert (counted.activation_bytes, counted.copy_bytes) == (whole.saved_bytes, whole.weight_bytes)


def test_the_default_time_is_that_of_the_h100_that_was_measured():
    """docs/h100.md: 511 images/s of SiT-XL/2 at batch 64."""
    flops = training_flops(network("SiT-XL/2", 32))
    measured = 511 * flops / (1e12 * CARDS["h100"].teraflops[torch.bfloat16])
    assert measured == pytest.approx(MEASURED_MFU, abs=5e-4)


def test_the_time_of_one_gpu_is_measured_or_modelled():
    config = ScaleConfig(model="SiT-P/8", image_size=16, batch_per_gpu=2, gpus=(1,))
    (least,) = scenarios(config)
    assert least.inputs.forward_ms == pytest.approx(count("SiT-P/8", 16, 2, "bf16", "h100").roofline_ms / 3)
    assert "counted bytes" in least.timed
    (modelled,) = scenarios(dataclasses.replace(config, mfu=1e-4))
    assert modelled.result.step_ms == pytest.approx(2 * training_flops(network("SiT-P/8", 16)) / (1e-4 * 798e12) * 1e3)
    (measured,) = scenarios(dataclasses.replace(config, step_ms=50.0))
    assert measured.result.step_ms == pytest.approx(50)
    assert measured.inputs.backward_ms == pytest.approx(2 * measured.inputs.forward_ms)
    assert measured.result.data_gbs == pytest.approx(2 / 0.050 * 2 * 2 * 4 * 16 * 16 / 1e9)


def test_tokens_and_batches_are_two_ways_to_say_it():
    config = ScaleConfig(model="SiT-P/8", tokens=16, batch_size=16, gpus=(1, 2))
    one, two = scenarios(config)
    assert (one.inputs.batch, two.inputs.batch) == (16, 8)
    assert one.inputs.units == units_of(network("SiT-P/8", 32))
    assert (one.inputs.parameter_bytes, one.inputs.gradient_bytes) == (2, 4)  # the trainer sums fp32
    halves, _ = scenarios(dataclasses.replace(config, gradients="bf16"))
    assert halves.inputs.gradient_bytes == 2


def test_what_has_a_name_has_a_source():
    assert FABRICS.keys() == CARDS.keys()
    assert all(own.intra in LINKS and own.inter in LINKS for own in FABRICS.values())
    assert all(own.source for own in (*LINKS.values(), *STORAGES.values()))
    given = find_link("430", 3.0, like="nvlink4")
    assert (given.gigabytes_per_s, given.microseconds) == (430, 3)
    assert given.source == given.latency_source == "as given"
    assert find_link("430", like="nvlink4").microseconds == LINKS["nvlink4"].microseconds
    assert find_link("NVLink4", like="nvlink4") == LINKS["nvlink4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "--gpus 0: expected at least 1"),
        (["--gpus", "12"], "--gpus 12 do not fill nodes of 8"),
        (["--gpus-per-node", "0"], "--gpus-per-node 0"),
        (["--gpus", "4", "--strategy", "hsdp"], "--gpus 4 are fewer"),
        (["--model", "SiT-Q/2"], "no model is named 'SiT-Q/2'; known: SiT-XL/2"),
        (["--card", "h900"], "no card is named 'h900'; known: h100"),
        (["--link-intra", "nvlink9"], "no link is named 'nvlink9'; expected GB/s, or one of nvlink3"),
        (["--link-inter", "0"], "a link of 0.0 GB/s"),
        (["--link-inter", "nan"], "a link of nan GB/s"),
        (["--latency-inter", "-1"], "a latency of -1.0 µs"),
        (["--storage-gbs", "tape"], "no storage is named 'tape'; expected GB/s, or one of nvme"),
        (["--storage-gbs", "0"], "--storage-gbs 0: expected a finite rate above 0"),
        (["--writer-gbs", "0"], "--writer-gbs 0.0"),
        (["--batch-size", "8"], "give one"),
        (["--image-size", "15"], "--image-size 15"),
        (["--tokens", "5"], "--tokens 5: expected a square number"),
        (["--mfu", "1.5"], "--mfu 1.5: expected a share"),
        (["--mfu", "0"], "--mfu 0.0: expected a positive number"),
        (["--mfu", "0.5", "--step-ms", "10"], "--mfu and --step-ms both"),
        (["--step-ms", "0.000001"], "the update alone takes"),
        (["--overlap", "1.1"], "--overlap 1.1: expected a share from 0 to 1"),
        (["--checkpoint-every", "0"], "--checkpoint-every 0"),
        (["--ema-copies", "-1"], "--ema-copies -1"),
        (["--bucket-mb", "0"], "--bucket-mb 0.0"),
    ],
)
def test_bad_input_is_refused_by_name(arguments, message, capsys):
    assert cli.main(["scale", *SMALL, *arguments]) == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_batches_that_do_not_go_together():
    for changes, message in (
        ({"batch_size": 9, "gpus": (2,)}, "--batch-size 9 does not divide by --gpus 2"),
        ({"batch_size": 8, "step_ms": 10.0}, "give that as --batch-per-gpu"),
        ({"gpus": ()}, "at least one number of GPUs"),
    ):
        with pytest.raises(UserError, match=message):
            scenarios(ScaleConfig(model="SiT-P/8", **changes))
    with pytest.raises(ConfigError, match="--strategy zero: expected one of ddp, fsdp, hsdp"):
        inputs_of(strategy="zero")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_tables_and_json(strategy, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    path = tmp_path / "rows.jsonl"
    arguments = ["scale", *SMALL, "--gpus", "8", "64", "--strategy", strategy, "--json", str(path)]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "a model on paper, no measurement" in out
    assert "a model, not a measurement: nothing was run on these GPUs" in out
    assert "NVIDIA's data sheet" in out
    assert max(map(len, out.splitlines())) <= 100
    rows = read_json(path)
    assert [row["inputs"]["gpus"] for row in rows] == [8, 64]
    for row in rows:
        assert row["prediction"] is True
        assert estimate(Inputs.from_json(row["inputs"])) == Estimate.from_json(row["estimate"])
        assert json.loads(json.dumps(dataclasses.asdict(Inputs.from_json(row["inputs"])))) == row["inputs"]


def test_what_does_not_fit_into_the_card_is_told(capsys):
    assert cli.main(["scale", *SMALL[:4], "--batch-per-gpu", "4000000", "--gpus", "1"]) == 0
    assert "do not fit into the 85.9 GB of NVIDIA H100" in " ".join(capsys.readouterr().out.split())


def _sent():
    """Bytes that this process has written, to sockets too, as gloo does."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))


def _bytes_of_steps(_rank):
    """What a DDP step and the gathers of an FSDP forward pass write."""

    def forward(model):
        return model(torch.randn(2, 4, 16, 16), torch.rand(2), torch.arange(2)).square().mean()

    def written(function):
        dist.barrier()
        before = _sent()
        function()
        return _sent() - before

    build = sit_models["SiT-P/8"]
    ddp = DistributedDataParallel(build(input_size=16))
    for _ in range(3):  # buckets are made anew after the first step
        step = written(lambda: forward(ddp).backward())
    sharded = build(input_size=16)
    for module in (*sharded.blocks, sharded):
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=True)
    gathers = written(lambda: forward(sharded))
    return step, gathers


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="this system does not count what a process writes")
def test_two_processes_send_what_is_said(tmp_path):
    units = units_of(network("SiT-P/8", 16))
    given = inputs_of(units=units, parameter_bytes=4, gradient_bytes=4)
    gathers = sum(given.all_gpus.gather(4 * unit.parameters).sent for unit in units)
    for step, forward in distributed.run(_bytes_of_steps, tmp_path, seconds=120):
        assert step == pytest.approx(estimate(given).wire_bytes, rel=0.01)
        assert forward == pytest.approx(gathers, rel=0.01)
    assert math.isclose(gathers, 2 * sum(unit.parameters for unit in units))

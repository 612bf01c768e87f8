"""What a probe measures, against plain formulas over all samples at once."""

from __future__ import annotations

import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console

from layersync_kernels.errors import CheckpointError, TeacherError
from layersync_kernels.sit.batch import Condition
from layersync_kernels.sit.data.memory import MemorySet
from layersync_kernels.sit.diffusion.interpolants import LinearInterpolant
from layersync_kernels.sit.evaluation.probes import (
    effective_rank,
    linear_cka,
    linear_cka_to,
    linear_probe,
    neighbour_probe,
)
from layersync_kernels.sit.models.sit import SiT
from layersync_kernels.sit.spec import SampleSpec
from layersync_kernels.sit.studies.pair.measure import States
from layersync_kernels.sit.studies.pair.report import cosine_note, pairs_in_range, teacher_range
from layersync_kernels.sit.studies.pair.run import analyse, measure
from layersync_kernels.sit.studies.pair.teacher import TeacherFeatures, teacher_features

TIMES = (0.4, 1.0)


def rank_by_svd(tokens):
    """exp of the entropy of the squared singular values of centred tokens (M, D)."""
    singular = torch.linalg.svdvals(tokens.double() - tokens.double().mean(0))
    shares = singular.square() / singular.square().sum()
    return (-(shares * shares.log()).sum()).exp()


# Of features


def test_neighbours_vote_as_those_of_scikit_learn():
    neighbors = pytest.importorskip("sklearn.neighbors")
    torch.manual_seed(0)
    labels = torch.arange(1500) % 5
    features = torch.randn(1500, 6)
    features[:, 0] += labels
    found = neighbour_probe(features, labels, 300)  # 1,200 queries: more than are looked at at a time
    expected = neighbors.KNeighborsClassifier(
        20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
    )
    expected.fit(features[:300].double().numpy(), labels[:300].numpy())
    named = torch.from_numpy(expected.predict(features[300:].double().numpy()))
    assert torch.equal(found, named == labels[300:])
    assert 0.25 < found.double().mean() < 0.75


def test_near_neighbours_outvote_more_of_those_that_are_far():
    angles = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.1])
    features = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([[1.0], [9.0], [0.1], [1.0], [5.0]])
    assert neighbour_probe(features, torch.tensor([1, 0, 0, 0, 1]), 4).item()
    assert neighbour_probe(features, torch.tensor([1, 0, 0, 0, 1]), 4, neighbours=1).item()
    assert not neighbour_probe(features, torch.tensor([1, 0, 0, 0, 0]), 4).item()


def test_effective_rank_counts_dimensions():
    basis, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    scales = torch.tensor([[1.0, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1], [5, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    covariances = basis @ torch.diag_embed(scales.double()) @ basis.T
    expected = torch.tensor([3.0, 6, 1, 1], dtype=torch.float64)
    torch.testing.assert_close(effective_rank(covariances), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(effective_rank(7 * covariances), expected, rtol=1e-6, atol=1e-6)
    covariances[1, 0, 0] = torch.nan
    assert effective_rank(covariances).isnan().tolist() == [False, True, False, False]


def test_cka_to_another_width_is_that_of_features_filled_up_with_zeros():
    blocks, other = torch.randn(3, 40, 5) + 3, torch.randn(40, 9)
    other[:, :5] += blocks[1]
    wide = torch.cat([torch.nn.functional.pad(blocks, (0, 4)), other[None]])
    found = linear_cka_to(blocks, other)
    torch.testing.assert_close(found, linear_cka(wide)[3, :3])
    assert found.argmax() == 1
    assert linear_cka_to(blocks, torch.ones(40, 2)).tolist() == [0, 0, 0]


# Of a model


def lively(**options):
    torch.manual_seed(0)
    model = SiT(in_channels=2, hidden_size=16, depth=3, num_heads=2, num_classes=3, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def sequences(count=14, size=10):
    """Samples of lengths of their own."""
    lengths = torch.arange(count) * 7 % size + 1
    samples = torch.randn(count, 2, size, generator=torch.Generator().manual_seed(2))
    samples *= torch.arange(size) < lengths[:, None, None]
    spec, labels = SampleSpec(2, (size,), variable=True), torch.arange(count) % 3
    return MemorySet(
        spec=spec, num_classes=3, class_names=["a", "b", "c"], samples=samples, labels=labels, lengths=lengths
    )


def run(model, data, **changes):
    options = {"samples": 14, "times": TIMES, "batch_size": 5, "seed": 3, "device": torch.device("cpu")}
    return measure(model, LinearInterpolant(), data, **(options | changes))


def test_tokens_of_padding_count_for_nothing():
    """Against sample by sample, of whose tokens those beyond the length are cut off."""
    model, data = lively(input_size=(10,), patch_size=2), sequences()
    states = run(model, data)
    batch = next(data.batches(14, seed=3))
    noise = torch.randn(14, 2, 10, generator=torch.Generator().manual_seed(3))
    for i, t in enumerate(TIMES):
        tokens, means = [], []
        for n, length in enumerate(batch.condition.lengths.tolist()):
            x = t * batch.samples[n : n + 1] + (1 - t) * noise[n : n + 1]
            told = Condition(torch.tensor([3]), torch.tensor([length]))
            with torch.no_grad():
                _, hidden = model(x, torch.tensor([t]), **told.keywords(), capture=(1, 2, 3))
            own = torch.stack([hidden[block][0, : -(-length // 2)] for block in (1, 2, 3)])
            tokens.append(own)
            means.append(own.mean(1))
        every = torch.cat(tokens, 1)
        torch.testing.assert_close(states.features[i], torch.stack(means, 1), rtol=1e-4, atol=1e-5)
        expected = torch.stack([rank_by_svd(block) for block in every])
        torch.testing.assert_close(states.effective_rank[i], expected, rtol=1e-4, atol=0)
        unit = torch.nn.functional.normalize(every.double(), dim=-1)
        cosine = torch.einsum("amd,bmd->ab", unit, unit) / every.shape[1]
        torch.testing.assert_close(states.cosine[i], cosine, rtol=1e-4, atol=1e-5)


def test_numbers_do_not_hang_on_the_batch_size():
    model, data = lively(input_size=(10,), patch_size=2), sequences()
    one, all_at_once = run(model, data, batch_size=1), run(model, data, batch_size=14)
    for field in dataclasses.fields(States):
        first, second = getattr(one, field.name), getattr(all_at_once, field.name)
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_large_mean_of_the_tokens_takes_nothing_from_their_rank():
    class Far(torch.nn.Module):
        depth, guidable = 1, False

        def forward(self, x, t, y, capture):
            return x, {1: 1000.0 + x.flatten(2).transpose(1, 2)}

    data = MemorySet(
        spec=SampleSpec(8, (4, 4)),
        num_classes=1,
        class_names=["a"],
        samples=torch.randn(50, 8, 4, 4),
        labels=torch.zeros(50).long(),
    )
    data.samples[:, 0] *= 3
    states = run(Far(), data, samples=50, times=(1.0,))
    tokens = data.samples.flatten(2).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(states.effective_rank[0, 0], rank_by_svd(tokens), rtol=1e-4, atol=0)


def test_network_is_averaged_over_tokens_that_are_there():
    class Network(torch.nn.Module):
        name = "net"

        def width(self, samples, lengths):
            return 3

        def forward(self, samples, lengths):
            tokens = samples.unfold(2, 2, 2).permute(0, 2, 1, 3).flatten(2)[..., :3]
            beyond = 2 * torch.arange(5) >= lengths[:, None]
            return tokens.masked_fill(beyond[..., None], 1e6)

    data = sequences()
    options = {"samples": 14, "batch_size": 4, "seed": 3, "device": torch.device("cpu")}
    found = teacher_features(Network(), lively(input_size=(10,), patch_size=2), data, **options)
    batch = next(data.batches(14, seed=3))
    for own, sample, length in zip(found.features, batch.samples, batch.condition.lengths.tolist(), strict=True):
        tokens = torch.stack([torch.cat([sample[0, i : i + 2], sample[1, i : i + 1]]) for i in range(0, length, 2)])
        torch.testing.assert_close(own, tokens.mean(0))
    with pytest.raises(
        TeacherError, match="the teacher net gives 5 tokens, the model has 10: which of them are padding"
    ):
        teacher_features(Network(), lively(input_size=(10,), patch_size=1), data, **options)


def test_probe_is_quiet_repeats_itself_and_leaves_random_numbers_alone(monkeypatch):
    terminal = Console(file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr("layersync_kernels.sit.studies.pair.measure.console", terminal)
    model, data = lively(input_size=(10,), patch_size=2), sequences()
    torch.manual_seed(5)
    before, contents = torch.get_rng_state(), []
    for _ in range(2):
        report = analyse(run(model, data), times=TIMES, null_label=True, checkpoint="x")
        contents.append(json.dumps(dataclasses.asdict(report), allow_nan=False))
    assert contents[0] == contents[1]
    assert torch.equal(torch.get_rng_state(), before)
    assert terminal.file.getvalue() == ""
    run(model, data, progress=True)
    assert "t = 0.4" in terminal.file.getvalue()


# The report


def known(depth=6, times=2, count=400):
    """States of random features, to put something into."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(times, depth, count, 4, generator=generator)
    eye = torch.eye(depth, dtype=torch.float64).expand(times, -1, -1).clone()
    return States(features, torch.arange(count) % 2, eye, torch.ones(times, depth))


def test_pair_and_means_rest_on_noised_inputs():
    states = known(depth=12, times=3)
    states.features[2, 5, :, 0] = 9.0 * states.labels  # of the clean samples block 6 knows all
    states.features[:2, 8, :, 0] = 9.0 * states.labels  # of noised ones block 9
    states.cosine[:2] *= torch.tensor([0.2, 0.4])[:, None, None]
    report = analyse(states, times=(0.5, 0.7, 1.0), null_label=True, checkpoint="x")
    assert report.pair == (5, 9)
    assert report.accuracy.mean[8] == report.neighbours.mean[8] == report.accuracy.per_time[2][5] == 1.0
    assert report.accuracy.mean[5] < 0.7
    assert report.cosine[3][3] == pytest.approx(0.3)
    expected = torch.stack([linear_cka(blocks) for blocks in states.features])
    torch.testing.assert_close(torch.tensor(report.cka, dtype=torch.float64), expected[:2].mean(0))
    torch.testing.assert_close(torch.tensor(report.cka_per_time, dtype=torch.float64), expected)
    assert torch.tensor(report.cosine_per_time, dtype=torch.float64).equal(states.cosine)


def test_clean_inputs_alone_are_averaged():
    states = known(times=1)
    report = analyse(states, times=(1.0,), null_label=True, checkpoint="x")
    expected = linear_probe(states.features[0, 3], states.labels, 200).double().mean()
    assert report.accuracy.mean[3] == pytest.approx(float(expected))
    assert report.cosine == report.cosine_per_time[0]


@pytest.mark.parametrize(("classes", "voters"), [(2, 20), (20, 10), (200, 1), (400, 1)])
def test_no_more_neighbours_vote_than_a_class_has(classes, voters):
    states = dataclasses.replace(known(times=1, depth=2), labels=torch.arange(400) % classes)
    report = analyse(states, times=(0.5,), null_label=True, checkpoint="x")
    assert report.neighbours.neighbours == voters
    own = neighbour_probe(states.features[0, 1], states.labels, 200, voters)
    assert report.neighbours.per_time[0][1] == pytest.approx(float(own.double().mean()))


def test_teacher_is_compared_with_each_block_at_each_time():
    states = known()
    teacher = TeacherFeatures("net", torch.randn(400, 7))
    report = analyse(states, times=(0.5, 0.9), null_label=True, checkpoint="x", teacher=teacher)
    expected = torch.stack([linear_cka_to(blocks, teacher.features) for blocks in states.features])
    assert report.teacher.name == "net"
    torch.testing.assert_close(torch.tensor(report.teacher.cka, dtype=torch.float64), expected)


def test_features_that_are_not_finite_are_named():
    states = known()
    states.features[1, 4, 7:9, 2] = torch.nan
    states.features[1, 5] = torch.inf
    with pytest.raises(
        CheckpointError, match=r"of/run: the output of block 5 is not finite .* 2 of 400 samples at t = 1;"
    ):
        analyse(states, times=(0.5, 1.0), null_label=True, checkpoint="of/run")


def test_pairs_in_range_keep_to_the_rule():
    assert pairs_in_range(6) == [(2, 4)]
    assert pairs_in_range(8) == [(2, 4), (2, 5), (3, 5), (2, 6), (3, 6), (4, 6)]
    for depth in range(2, 50):
        pairs = pairs_in_range(depth)
        assert {teacher for _, teacher in pairs} == set(teacher_range(depth))
        assert all(5 * student > depth and 4 * (teacher - student) >= depth for student, teacher in pairs)


def test_pair_that_is_alike_already_is_noted_with_lower_ones():
    cosine = torch.full((8, 8), 0.95)
    cosine[1, 3], cosine[3, 5], cosine[2, 4], cosine[1, 5], cosine[0, 7] = 0.97, 0.8, 0.2, 0.91, 0.1
    note = cosine_note((2, 4), cosine.tolist())
    assert "the cosine of the pair 2:4 is 0.970" in note
    assert note.endswith("lower in the same range: 3:5 (0.200), 4:6 (0.800), 2:6 (0.910)")
    assert cosine_note((3, 5), cosine.tolist()) is None
    assert cosine_note((2, 4), torch.full((6, 6), 0.99).tolist()).endswith(
        "no other pair in the same range has a lower one"
    )


def test_analyse_says_so_of_a_pair_that_is_alike():
    states = known()
    states.cosine.fill_(0.5)
    states.cosine[0, 1, 3] = 0.92
    report = analyse(states, times=(0.5, 1.0), null_label=True, checkpoint="x")
    assert any("the cosine of the pair 2:4 is 0.920" in note for note in report.notes)

"""Each metric against the reference implementation on the same features, and against its definition written out."""

import contextlib
import io
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from layersync_kernels.sit.evaluation.frechet import Gaussian, RealFeatures, frechet_distance
from layersync_kernels.sit.evaluation.metrics import (
    around,
    bootstrap,
    diversity,
    inception_score,
    kernel_distance,
    kernel_estimate,
    multimodality,
    posterior_divergence,
    precision_recall,
    retrieved,
)

TIGHT = {"rel": 1e-6, "abs": 0}


@pytest.fixture(scope="module")
def features():
    """Real and generated ones, (300, 24) and (250, 24), correlated and apart."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(24, 24, generator=generator)
    real = torch.randn(300, 24, generator=generator) @ mix
    generated = torch.randn(250, 24, generator=generator) @ mix * 1.2 + 0.3
    return real, generated


def test_frechet_distance_is_that_of_scipy(features):
    real, generated = (own.double().numpy() for own in features)
    covariances = np.cov(real, rowvar=False), np.cov(generated, rowvar=False)
    expected = ((real.mean(0) - generated.mean(0)) ** 2).sum() + np.trace(
        covariances[0] + covariances[1] - 2 * sqrtm(covariances[0] @ covariances[1]).real
    )
    assert frechet_distance(*map(Gaussian.of, features)) == pytest.approx(expected, **TIGHT)
    assert RealFeatures(features[0], None).distance(features[1]) == pytest.approx(expected, **TIGHT)


def test_metrics_are_those_of_torch_fidelity(features):
    kid = pytest.importorskip("torch_fidelity.metric_kid")
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    isc = pytest.importorskip("torch_fidelity.metric_isc")
    prc = pytest.importorskip("torch_fidelity.metric_prc")
    real, generated = (own.double() for own in features)
    statistics = [fid.fid_features_to_statistics(own) for own in (generated, real)]
    expected = fid.fid_statistics_to_metric(*statistics, verbose=False)[fid.KEY_METRIC_FID]
    assert frechet_distance(Gaussian.of(generated), Gaussian.of(real)) == pytest.approx(expected, **TIGHT)

    # A subset of all samples is a permutation of them.
    told = {"kid_subsets": 1, "kid_subset_size": 250, "verbose": False}
    expected = kid.kid_features_to_metric(generated, real[:250], **told)[kid.KEY_METRIC_KID_MEAN]
    assert float(kernel_distance(generated, real[:250])) == pytest.approx(expected, **TIGHT)

    expected = isc.isc_features_to_metric(generated, splits=10, shuffle=False)[isc.KEY_METRIC_ISC_MEAN]
    assert inception_score(generated) == pytest.approx(expected, **TIGHT)

    found = [float(own.double().mean()) for own in precision_recall(real, generated)]
    told = {"prc_neighborhood": 3, "save_cpu_ram": False, "verbose": False}
    expected = prc.prc_features_to_metric(generated, real, **told)
    assert found == pytest.approx([expected[prc.KEY_METRIC_PRECISION], expected[prc.KEY_METRIC_RECALL]], **TIGHT)
    assert min(found) > 0.05
    assert max(found) < 1


def test_precision_and_recall_are_those_of_prdc(features):
    prdc = pytest.importorskip("prdc.prdc")
    for neighbours in (1, 3, 5):
        with contextlib.redirect_stdout(io.StringIO()):
            expected = prdc.compute_prdc(*(own.double().numpy() for own in features), nearest_k=neighbours)
        found = [float(own.double().mean()) for own in precision_recall(*features, neighbours)]
        assert found == pytest.approx([expected["precision"], expected["recall"]], **TIGHT)


def test_precision_and_recall_by_their_definition(features):
    real, generated = features[0][:40], features[1][:30]

    def covers(own, other):
        radii = [sorted(math.dist(a, b) for b in own.tolist())[3] for a in own.tolist()]
        return [any(math.dist(a, b) <= r for b, r in zip(own.tolist(), radii, strict=True)) for a in other.tolist()]

    precise, recalled = precision_recall(real, generated)
    assert precise.tolist() == covers(real, generated)
    assert recalled.tolist() == covers(generated, real)
    assert 0 < precise.sum() < 30
    assert 0 < recalled.sum() < 40


def test_kernel_distance_is_the_mean_over_all_subsets(features):
    first, second = features[0][:6], features[1][:5]

    def unbiased(x, y):
        def k(a, b):
            return (a @ b / 24 + 1) ** 3

        within = [np.mean([k(a, b) for a, b in itertools.permutations(own, 2)]) for own in (x, y)]
        return sum(within) - 2 * np.mean([k(a, b) for a in x for b in y])

    x, y = first.double().numpy(), second.double().numpy()
    subsets = [unbiased(a, b) for a in itertools.combinations(x, 3) for b in itertools.combinations(y, 3)]
    found = float(kernel_distance(first, second))
    assert found == pytest.approx(unbiased(x, y), **TIGHT)
    assert found == pytest.approx(np.mean(subsets), **TIGHT)


def test_weights_stand_for_samples_that_are_there_twice(features):
    first, second = features[0][:5].double(), features[1][:4].double()
    weights = torch.tensor([[2, 0, 1, 1, 1]]), torch.tensor([[1, 3, 0, 0]])
    found = float(kernel_distance(first, second, weights))
    index = [torch.repeat_interleave(torch.arange(own.shape[1]), own[0]) for own in weights]
    kernels = [(a @ b.T / 24 + 1) ** 3 for a, b in ((first, first), (second, second), (first, second))]
    means = []
    for kernel, own in zip(kernels, index, strict=False):
        pairs = [(i, j) for i in own.tolist() for j in own.tolist() if i != j]
        means.append(np.mean([kernel[i, j] for i, j in pairs]))
    expected = sum(means) - 2 * float(kernels[2][index[0]][:, index[1]].mean())
    assert found == pytest.approx(expected, **TIGHT)


def test_large_sets_are_taken_in_pieces(features):
    first, second = (own.repeat(5, 1) + 0.01 * torch.randn(5 * len(own), 24) for own in features)
    kernels = [
        (a.double() @ b.double().T / 24 + 1) ** 3 for a, b in ((first, first), (second, second), (first, second))
    ]
    within = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in kernels[:2]]
    expected = float(sum(within) - 2 * kernels[2].mean())
    assert float(kernel_distance(first, second)) == pytest.approx(expected, **TIGHT)


def test_inception_score_at_its_ends():
    sure = 50 * torch.eye(5).repeat(4, 1)
    assert inception_score(sure, splits=2) == pytest.approx(5)
    assert inception_score(torch.zeros(20, 5), splits=2) == pytest.approx(1)


def test_divergence_of_posteriors_worked_out_by_hand():
    real = torch.tensor([[0.5, 0.5], [0.7, 0.3], [0.2, 0.8]])
    generated = torch.tensor([[0.4, 0.6], [0.1, 0.9]])
    labels, asked = torch.tensor([0, 0, 1]), torch.tensor([0, 1])
    first = 0.6 * math.log(0.6 / 0.4) + 0.4 * math.log(0.4 / 0.6)
    second = 0.2 * math.log(0.2 / 0.1) + 0.8 * math.log(0.8 / 0.9)
    found = posterior_divergence(real, labels, generated, asked)
    assert found == pytest.approx((first + second) / 2, rel=1e-5)
    assert posterior_divergence(real, labels, generated[:1], asked[:1]) == pytest.approx(first, rel=1e-5)


def test_diversity_of_two_points():
    """Half of the random pairs are the same point twice."""
    points = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert diversity(points, 20_000) == pytest.approx(2.5, rel=0.03)
    features = torch.cat([points, points + 100, torch.full((1, 2), -1e6)])
    assert multimodality(features, torch.tensor([0, 0, 1, 1, 2]), 20_000) == pytest.approx(2.5, rel=0.03)
    assert math.isnan(multimodality(points, torch.tensor([0, 1])))


def test_retrieval():
    logits = torch.tensor([[3.0, 2, 1], [3.0, 2, 1], [3.0, 2, 1]])
    labels = torch.tensor([0, 1, 2])
    assert [retrieved(logits, labels, top).tolist() for top in (1, 2, 3)] == [
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Of two Gaussians of 3 dimensions: their Fréchet distance is known, and what is left of its bias is small."""
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(2, 200, 3, generator=generator) for _ in range(60)]
    truth, held = 3 * 0.5**2, 0
    for own in draws:
        estimate = RealFeatures(own[0], None).estimate(own[1] + 0.5, 60)
        held += estimate.low <= truth <= estimate.high
    assert 48 <= held <= 60  # 57 are expected
    values = [float(kernel_distance(own[0], own[1] + 0.5)) for own in draws]
    truth = float(np.mean(values))
    estimates = [kernel_estimate(own[0], own[1] + 0.5, 60) for own in draws]
    assert 48 <= sum(e.low <= truth <= e.high for e in estimates) <= 60
    widths = np.mean([e.high - e.low for e in estimates])
    assert widths == pytest.approx(2 * 1.96 * np.std(values), rel=0.3)


def test_an_interval_is_moved_to_the_value():
    estimate = around(5.0, torch.tensor([10.0, 11.0, 12.0], dtype=torch.float64))
    assert (estimate.low, estimate.value, estimate.high) == (pytest.approx(4.05), 5.0, pytest.approx(5.95))
    shares = torch.tensor([1.0] * 80 + [0.0] * 20)
    estimate = bootstrap(lambda own: float(own.mean()), (shares,), 400)
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * (0.8 * 0.2 / 100) ** 0.5, rel=0.15)


def test_distances_of_too_few_samples_are_refused(features):
    real = RealFeatures(features[0], 16)
    assert real.dimensions == 16
    assert real.refusal(17) is None
    assert "16 samples and 300 real ones for 16 dimensions" in real.refusal(16)
    assert RealFeatures(features[0][:20], None).refusal(250) is not None

"""What is said of seeds, against simulations and known tables."""

from __future__ import annotations

import numpy as np
import pytest

from layersync_kernels.sit.studies.compare.statistics import (
    Sooner,
    paired_interval,
    power,
    resampled,
    seeds_needed,
    smallest_effect,
    sooner_interval,
)


def test_interval_of_a_textbook_example():
    """t of 3 degrees of freedom at 97.5 % is 3.182."""
    found = paired_interval([1.0, 2.0, 3.0, 6.0])
    assert found.mean == 3
    half = 3.182446 * np.std([1, 2, 3, 6], ddof=1) / 2
    assert (found.t_low, found.t_high) == pytest.approx((3 - half, 3 + half), rel=1e-6)
    assert 1 < found.low < 3 < found.high < 6


def test_all_resamples_are_taken_of_few_seeds():
    assert len(resampled(3)) == 27
    assert len(np.unique(resampled(3), axis=0)) == 27
    assert resampled(8).shape == (10_000, 8)
    assert (resampled(8) == resampled(8)).all()


def test_one_seed_has_no_interval():
    found = paired_interval([0.5])
    assert (found.mean, found.low, found.high, found.t_low, found.t_high) == (0.5, None, None, None, None)
    assert sooner_interval([([0, 10], [1, 0])], [([0, 10], [1, 0.5])]) == Sooner(2.0)


def test_students_interval_covers_95_percent_of_normal_differences():
    """And a bootstrap over three seeds far less, as the report says."""
    random = np.random.default_rng(0)
    found = [paired_interval(random.normal(size=3).tolist()) for _ in range(1000)]
    assert np.mean([own.t_low <= 0 <= own.t_high for own in found]) == pytest.approx(0.95, abs=0.03)
    assert np.mean([own.low <= 0 <= own.high for own in found]) < 0.75


@pytest.mark.parametrize(("effect", "seeds"), [(1.0, 10), (0.5, 34), (0.2, 199)])
def test_seeds_of_a_table_of_paired_t_tests(effect, seeds):
    """80 % power, two-sided 5 %: what any table of sample sizes has (Cohen 1988)."""
    assert seeds_needed(effect, 1.0) == seeds
    assert power(seeds - 1, effect, 1.0) < 0.8 <= power(seeds, effect, 1.0)
    assert smallest_effect(seeds, 1.0) <= effect < smallest_effect(seeds - 1, 1.0)


def test_power_is_how_often_a_simulated_study_finds_it():
    random = np.random.default_rng(0)
    found = [paired_interval(random.normal(1.0, 1.0, size=5).tolist()) for _ in range(1000)]
    share = np.mean([not own.t_low <= 0 <= own.t_high for own in found])
    assert share == pytest.approx(power(5, 1.0, 1.0), abs=0.05)


def test_extremes_of_power():
    assert power(3, 1.0, 0.0) == 1
    assert seeds_needed(1e6, 1.0) == 2
    assert seeds_needed(1e-6, 1.0) is None
    assert smallest_effect(1, 1.0) is None
    assert smallest_effect(3, 0.0) == 0


def test_a_baseline_that_rises_again_was_at_its_last_quality_before():
    base = ([0, 10, 20, 30, 40], [1, 0.6, 0.4, 0.5, 0.6])
    assert sooner_interval([([0, 10, 20], [1, 0.8, 0.6])], [base]).value == 0.5  # 20 steps against 10, not against 40


def test_sooner_is_of_the_mean_curves_each_over_its_own_range():
    """The arm takes twice the time and comes to the baseline's last value where that has long ended."""
    own = [([0, 20, 40], [1, 0.5, 0.3])] * 2
    base = [([0, 10, 20], [1, 0.6, 0.4])] * 2
    assert sooner_interval(own, base).value == pytest.approx(20 / 30)
    never = [([0, 20, 40], [1, 0.5, 0.3]), ([0, 20, 40], [1, 0.9, 0.8])]
    found = sooner_interval(never, base)
    assert (found.value, found.low) == (None, None)
    assert found.high == pytest.approx(20 / 30)

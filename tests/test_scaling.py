"""benchmarks/scaling.py: the fit finds the law that losses follow, and what disturbs it counts for little."""

import numpy as np
import pytest

LAW = np.array([1.7, 400.0, 1500.0, 0.34, 0.45])  # E, A, B, alpha, beta
N, D = (grid.ravel() for grid in np.meshgrid(np.geomspace(3e5, 1e7, 6), np.geomspace(4e5, 6e6, 4)))
EVEN = np.ones((1, len(N)))


@pytest.fixture
def scaling(from_benchmarks):
    return from_benchmarks("scaling")


def test_loss_at_by_hand(scaling):
    theta = [[2.0, 8.0, 9.0, 1.0, 0.5], [1.0, 16.0, 27.0, 2.0, 0.5]]
    expected = [[2 + 8 / 4 + 9 / 3, 2 + 8 / 2 + 9 / 9], [1 + 16 / 16 + 27 / 3, 1 + 16 / 4 + 27 / 9]]
    np.testing.assert_allclose(
        scaling.loss_at(theta, np.array([4.0, 2.0]), np.array([9.0, 81.0])), expected, rtol=1e-12
    )


def test_the_law_that_made_the_losses_is_found(scaling):
    (theta,) = scaling.fit(N, D, scaling.loss_at(LAW, N, D), EVEN)
    np.testing.assert_allclose(theta, LAW, rtol=1e-6)


def test_one_run_that_went_wrong_hardly_moves_the_law(scaling):
    losses = scaling.loss_at(LAW, N, D)
    losses[7] *= 1.2
    (theta,) = scaling.fit(N, D, losses, EVEN)
    np.testing.assert_allclose(theta[[0, 3, 4]], LAW[[0, 3, 4]], rtol=0.02)  # squares would move alpha by a quarter


def test_a_run_counted_twice_is_two_runs_and_one_not_counted_is_none(scaling):
    rng = np.random.default_rng(0)
    losses = scaling.loss_at(LAW, N, D) * np.exp(rng.normal(0, 0.003, len(N)))
    counts = rng.integers(0, 3, len(N))
    (counted,) = scaling.fit(N, D, losses, counts[None].astype(float))
    there = np.repeat(np.arange(len(N)), counts)
    (repeated,) = scaling.fit(N[there], D[there], losses[there], np.ones((1, len(there))))
    np.testing.assert_allclose(*(scaling.loss_at(theta, N, D) for theta in (counted, repeated)), rtol=1e-4)

from __future__ import annotations

import numpy as np
import pytest

from luthier.evaluation.metrics.intervals import bootstrap_mean
from luthier.evaluation.metrics.power import minimum_detectable_difference


def test_minimum_detectable_difference_follows_the_closed_form() -> None:
    # Standard deviation 1, 100 pairs: (1.959964 + 0.841621) / 10.
    differences = [1.0, -1.0] * 50
    spread = np.std(differences, ddof=1)
    assert minimum_detectable_difference(differences) == pytest.approx(0.2801585 * spread, rel=1e-6)
    assert minimum_detectable_difference(differences, power=0.5) == pytest.approx(
        0.1959964 * spread, rel=1e-6
    )


def test_minimum_detectable_difference_is_found_as_often_as_it_says() -> None:
    generator = np.random.Generator(np.random.Philox(11))
    effect = minimum_detectable_difference(list(generator.normal(0.0, 1.0, size=60)) * 10)
    spread = effect * np.sqrt(600) / 2.801585
    found = 0
    for trial in range(200):
        sample = generator.normal(effect, spread, size=600)
        found += bootstrap_mean(sample.tolist(), seed=trial, num_resamples=400).lower > 0
    assert 0.70 < found / 200 < 0.90


@pytest.mark.parametrize(("differences", "power"), [([0.5], 0.8), ([0.5, 0.1], 0.0), ([0.5, 0.1], 1.0)])
def test_minimum_detectable_difference_refuses_what_has_no_answer(
    differences: list[float], power: float
) -> None:
    with pytest.raises(ValueError, match=r"at least 2 pairs, got 1|must be in \(0, 1\), got"):
        minimum_detectable_difference(differences, power=power)

import pytest
import torch

from luthier.lm.draw import draw, row_generator


def test_draw_stays_in_the_nucleus_and_follows_the_probabilities() -> None:
    logits = torch.tensor([0.1, 0.6, 0.05, 0.25]).log()
    generator = row_generator(0, 0)
    drawn = [draw(logits, 1.0, 0.8, generator) for _ in range(2000)]
    assert set(drawn) == {1, 3}
    assert drawn.count(1) / 2000 == pytest.approx(0.6 / 0.85, abs=0.04)


def test_draw_at_low_temperature_takes_the_most_probable() -> None:
    logits = torch.tensor([0.0, 1.0, 0.5])
    assert {draw(logits, 0.01, 1.0, row_generator(0, row)) for row in range(20)} == {1}


def test_row_generators_differ_by_seed_and_by_row() -> None:
    values = {float(torch.rand(1, generator=row_generator(*key))) for key in [(0, 0), (0, 1), (1, 0), (1, 1)]}
    assert len(values) == 4

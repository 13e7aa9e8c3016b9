"""benchmarks/curves.py without measuring: exponents of known curves, a picture of made-up ones."""
import doctest
import sys

import pytest
from PIL import Image

from conftest import ROOT


@pytest.fixture
def bench(monkeypatch):
    # behind the root, whose loss.py and rollout.py have namesakes in that folder
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "tests" / "speed")])
    import curves
    return curves


def made_up(bench) -> dict:
    """Time x^2 in the batch and x in the rest, memory flat."""
    points = [bench.BASE] + [bench.BASE | {axis: x} for axis, xs in bench.SWEEPS.items() for x in xs
                             if x != bench.BASE[axis]]
    for n, point in enumerate(points):
        product = point["batch"] ** 2 * point["response"] * point["visual"] * point["vocabulary"]
        points[n] = {**point, "bytes": dict.fromkeys(("peak", "score", "sample", "update"), 2**28),
                     "seconds": dict.fromkeys(("total", *bench.PHASES), product / 1e7)}
    return {"points": points, "base": bench.BASE, "clock": "CPU seconds", "machine": "none"}


def test_exponents(bench):
    assert doctest.testmod(bench).failed == 0
    assert bench.slopes([1, 2, 4, 8], [5, 5, 5, 5]) == pytest.approx((0, 0), abs=1e-9)
    # affine, as the vocabulary's: flat at first, and steeper the further one goes
    fit, last = bench.slopes([1, 10, 100, 1000], [11, 20, 110, 1010])
    assert 0.3 < fit < last < 1
    result = made_up(bench)
    for axis, expected in {"batch": 2, "response": 1, "visual": 1, "vocabulary": 1}.items():
        lines = bench.curves(result, axis, "seconds")
        assert lines["total"][0] == bench.SWEEPS[axis]         # the base is a point of every sweep
        assert bench.slopes(*lines["total"]) == pytest.approx((expected, expected))
    assert len(bench.table(result)) == 1 + sum(len(xs) + 1 for xs in bench.SWEEPS.values())


def test_labels_keep_their_distance(bench):
    got = bench.spread([50, 51, 10, 49], gap=10, bottom=55)
    assert sorted(got)[-1] <= 55 and got[2] == 10
    assert all(b - a >= 10 for a, b in zip(sorted(got), sorted(got)[1:]))


def test_picture(bench, tmp_path):
    bench.draw(made_up(bench), tmp_path / "costs.png")
    with Image.open(tmp_path / "costs.png") as image:
        assert image.size == (8 * bench.WIDTH, 2 * (2 * bench.HEIGHT + 26))
    assert (tmp_path / "costs.png").stat().st_size < 200_000

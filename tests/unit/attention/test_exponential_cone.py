"""Projection on the exponential cone: planted solutions, Moreau's decomposition, difference quotients, every region."""

import numpy as np
import pytest

from maha_megatron.attention.aggregation.exponential_cone import dual_derivatives, project_on_dual


def on_cone(u):
    """Projection on K itself by Moreau: u + projection of -u on the dual cone."""
    return u + project_on_dual(-u.reshape(1, -1)).reshape(u.shape)


def below(scale, exponent, bound, size):
    """scale exp(exponent / scale) <= bound, to rounding; at scale 0 exponent <= 0 <= bound."""
    curved = scale > 1e-12 * size
    safe = np.where(curved, scale, 1.0)
    value = np.where(curved, safe * np.exp(np.where(curved, exponent, 0.0) / safe), 0.0)
    rounding = 1e-12 * (size + value) + 1e-15 * size * value * np.abs(exponent) / safe**2
    fits = value - bound <= rounding
    return fits & (curved | (exponent <= 1e-9 * size))


@pytest.mark.parametrize("spread", [1, 5, 20])
def test_planted_projections_are_found(spread):
    random = np.random.default_rng(spread)
    rho = spread * random.normal(size=500)
    a, b = 10 ** random.uniform(-8, 1, 500), 10 ** random.uniform(-3, 3, 500)
    p = np.stack([rho, np.ones(500), np.exp(rho)], -1)
    q = np.stack([np.ones(500), 1 - rho, -np.exp(-rho)], -1)
    u = a[:, None] * p + b[:, None] * q
    error = np.abs(on_cone(u) - a[:, None] * p).max(1) / np.abs(u).max(1)
    assert error.max() <= 1e-14


@pytest.mark.parametrize("seed", range(5))
def test_both_parts_are_feasible_orthogonal_and_differentiated(seed):
    random = np.random.default_rng(seed)
    v = random.normal(size=(300, 3)) * 10 ** random.uniform(-1, 1, (300, 1))
    dual = project_on_dual(v.reshape(1, -1)).reshape(v.shape)
    primal = dual - v
    size = 1 + np.abs(v).max(1)
    assert (np.abs((dual * primal).sum(1)) <= 1e-13 * size**2).all()
    x, y, z = primal.T
    assert below(np.maximum(y, 0), x, z, size).all()
    x, y, z = dual.T  # -x exp(y / x - 1) <= z
    assert below(np.maximum(-x, 0), -y - np.maximum(-x, 0), z, size).all()
    derivative = dual_derivatives(v.reshape(1, -1))[0]
    assert np.abs(derivative - derivative.swapaxes(1, 2)).max() <= 1e-9
    for place in range(3):
        step = 1e-7 * np.eye(3)[place]
        quotient = (on_cone(v + step) - on_cone(v - step)) / 2e-7
        of_dual = np.eye(3)[place] - dual_derivatives(-v.reshape(1, -1))[0][:, :, place]
        assert np.abs(quotient - of_dual).max() <= 1e-5


@pytest.mark.parametrize(
    ("point", "projection"),
    [
        ((-1.0, 2.0, 3.0), (-1.0, 2.0, 3.0)),  # inside
        ((1.0, 1.0, -3.0), (0.0, 0.0, 0.0)),  # in the polar cone
        ((-1.0, -2.0, 3.0), (-1.0, 0.0, 3.0)),  # the flat face
        ((-1.0, -2.0, -3.0), (-1.0, 0.0, 0.0)),  # the edge
        ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
        ((-5.0, 1e-3, -1.0), (-5.0, 1e-3, 0.0)),  # the curve is flat there to rounding
        ((5.0, -2e3, 3.0), (0.0, 0.0, 3.0)),
    ],
)
def test_regions(point, projection):
    assert on_cone(np.array([point])) == pytest.approx(np.array([projection]), abs=1e-15)

"""Projection on the exponential cone to rounding, and its derivative.

diffcp's is good to 1e-6 or so, and where a weight is small its derivative can be wrong by any factor. Here both are
written in one number rho, as by Friberg, "Projection onto the exponential cone: a univariate root-finding problem"
(2021): with K the closure of {(x, y, z): y > 0, y exp(x / y) <= z}, a point neither in K nor in its polar cone is

    u = a p + b q,   p = (rho, 1, e^rho) in K,   q = (1, 1 - rho, -e^-rho) in the polar cone,   <p, q> = 0,   a, b > 0

(unless x <= 0 and y <= 0), and its projection is a p. The first two rows give a and b for any rho; the third is then an
increasing function of rho between the places where a or b changes sign.
"""

import numpy as np

_LARGEST_RHO = 300.0
_FLAT_BEYOND = 200.0  # there e^rho or e^-rho leaves nothing of the curve
_LARGEST_STEP = 2.0
_STEPS = 200


def project_on_dual(v: np.ndarray) -> np.ndarray:
    """Projections of v [B, 3 k], k points each, on the dual cone: v + projection of -v on K."""
    return v + _project(-_points(v))[0].reshape(v.shape)


def dual_derivatives(v: np.ndarray) -> np.ndarray:
    """Derivative [B, k, 3, 3] of `project_on_dual` for each point."""
    return np.eye(3) - _project(-_points(v))[1]


def _points(v):
    return v.reshape(len(v), v.shape[1] // 3, 3)


def _project(u):
    """Projection on K and its derivative for points u [B, k, 3]."""
    projection, derivative = np.zeros_like(u), np.zeros((*u.shape, 3))
    x, y, z = np.moveaxis(u, -1, 0)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        inside = np.where(y > 0, y * np.exp(x / y) <= z, (y == 0) & (x <= 0) & (z >= 0))
        polar = np.where(x > 0, x * np.exp(y / x - 1.0) <= -z, (x == 0) & (y <= 0) & (z <= 0))
    projection[inside], derivative[inside] = u[inside], np.eye(3)
    flat = ~inside & ~polar & (x <= 0) & (y <= 0)
    curved = ~inside & ~polar & ~flat
    rho = _root(u[curved])
    flat[curved] = np.abs(rho) > _FLAT_BEYOND
    curved &= ~flat
    projection[curved], derivative[curved] = _on_curved_part(u[curved], rho[np.abs(rho) <= _FLAT_BEYOND])
    signs = np.array([-1.0, 1.0, 1.0])  # where it is flat, K is x <= 0, y >= 0, z >= 0
    projection[flat] = signs * np.maximum(signs * u[flat], 0.0)
    for place in range(3):
        derivative[flat, place, place] = signs[place] * u[flat, place] > 0
    return projection, derivative


def _on_curved_part(u, rho):
    """The same for points u [P, 3] that project on the curved part of the boundary, at rho [P]."""
    p, _, a, _, _, length = parts = _parts(u, rho, _by_all_rows)
    # u = a p + b q differentiated is p da + q db + (a p' + b q') drho. With turn = a (p' - p) + b (q' + q), for scale,
    # that is p (da + a drho) + q (db - b drho) + turn drho, and the projection's is p (da + a drho) + a (p' - p) drho
    change = np.stack([1.0 - rho, -np.ones_like(rho), np.zeros_like(rho)], -1)
    size = np.linalg.norm(p, axis=-1, keepdims=True)
    moved = np.stack([p / size, np.zeros_like(p), a[:, None] * change / length[:, None]], -1)
    return a[:, None] * p, moved @ np.linalg.inv(_columns(*parts))


def _root(u):
    """rho [P]: Newton's method, and bisection where that leaves the bracket.

    Steps are bounded, since from far beyond the root an exponential lets Newton's method go back by 1 only.
    """
    x, y, z = u.T
    with np.errstate(divide="ignore", invalid="ignore"):
        a_zero, b_zero = 1.0 - y / x, x / y
    low = np.maximum(np.where(x > 0, a_zero, -np.inf), np.where(y < 0, b_zero, -np.inf))
    high = np.minimum(np.where(x < 0, a_zero, np.inf), np.where(y > 0, b_zero, np.inf))
    low, high = np.clip(low, -_LARGEST_RHO, _LARGEST_RHO), np.clip(high, -_LARGEST_RHO, _LARGEST_RHO)
    rho = np.clip(np.zeros_like(low), low + 1e-3 * (high - low), high - 1e-3 * (high - low))
    done = np.zeros(len(u), dtype=bool)
    for _ in range(_STEPS):
        p, q, a, b, _, length = parts = _parts(u, rho, _by_two_rows)
        excess = a * p[:, 2] + b * q[:, 2] - z
        low, high = np.where(excess < 0, rho, low), np.where(excess > 0, rho, high)
        wrong = u - a[:, None] * p - b[:, None] * q
        newton = rho + np.linalg.solve(_columns(*parts), wrong[..., None])[:, 2, 0] / length
        done |= np.abs(newton - rho) <= 1e-15 * (1.0 + np.abs(rho))
        after = np.where((newton > low) & (newton < high), newton, (low + high) / 2.0)
        rho = np.where(done, rho, np.clip(after, rho - _LARGEST_STEP, rho + _LARGEST_STEP))
        if done.all():
            break
    return rho


def _by_two_rows(u, rho, p, q):
    """a and b that fit the first two rows, at any rho."""
    determinant = rho * rho - rho + 1.0
    return ((rho - 1.0) * u[:, 0] + u[:, 1]) / determinant, (u[:, 0] - rho * u[:, 1]) / determinant


def _by_all_rows(u, rho, p, q):
    """a and b of the nearest point; at the root the same, without the cancellation where one is very small."""
    return [(u * ray).sum(-1) / (ray * ray).sum(-1) for ray in (p, q)]


def _parts(u, rho, fit):
    """p, q, a, b, turn = a (p' - p) + b (q' + q) and its length at some rho."""
    one = np.ones_like(rho)
    p = np.stack([rho, one, np.exp(rho)], -1)
    q = np.stack([one, 1.0 - rho, -np.exp(-rho)], -1)
    a, b = fit(u, rho, p, q)
    turn = np.stack([a * (1.0 - rho) + b, -a - b * rho, 0.0 * rho], -1)
    return p, q, a, b, turn, np.maximum(np.linalg.norm(turn, axis=-1), np.finfo(float).tiny)


def _columns(p, q, a, b, turn, length):
    size_p, size_q = (np.linalg.norm(ray, axis=-1, keepdims=True) for ray in (p, q))
    return np.stack([p / size_p, q / size_q, turn / length[:, None]], -1)

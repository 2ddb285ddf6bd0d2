"""Linear probes: ridge regression, scored on samples that it was not fitted on."""

import numpy as np

# Of a ridge regression on standardised inputs
PENALTIES = 10.0 ** np.arange(-2, 6)


def held_out_r2(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """
    How well a linear map reads quantities from latents, on steps that it has not seen: fitted on the first half (ridge
    regression), its penalty chosen on the next quarter, fitted again on both, and tested on the last quarter.

    :param x: latents, in the order of the steps, shape ``(n, latent_dim)``
    :param y: quantities, shape ``(n, n_quantities)``
    :return: R2 of each: 1 if it is exact, 0 or less if it is no better than the mean, NaN if it does not vary in the last
        quarter; shape ``(n_quantities,)``
    """
    half, end = len(x) // 2, len(x) * 3 // 4
    best = _ridge_r2(x[:half], y[:half], x[half:end], y[half:end]).argmax(axis=0)
    return _ridge_r2(x[:end], y[:end], x[end:], y[end:])[best, np.arange(y.shape[1])]


def _ridge_r2(x: np.ndarray, y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray) -> np.ndarray:
    """:return: R2 for each of the penalties, shape ``(n_penalties, n_quantities)``"""
    mean, scale = x.mean(axis=0), x.std(axis=0) + 1e-8
    u, s, vt = np.linalg.svd((x - mean) / scale, full_matrices=False)
    projected, inner = (test_x - mean) / scale @ vt.T, u.T @ (y - y.mean(axis=0))
    predictions = np.stack([projected @ ((s / (s**2 + penalty))[:, None] * inner) for penalty in PENALTIES])
    errors = ((predictions + y.mean(axis=0) - test_y) ** 2).mean(axis=1)
    varies = np.ptp(test_y, axis=0) > 0
    return np.where(varies, 1 - errors / np.where(varies, test_y.var(axis=0), 1), np.nan)


def principal_components(x: np.ndarray) -> np.ndarray:
    """
    :param x: shape ``(n, n_features)``
    :return: the first principal components of the samples, 64 or as many as explain 99.9 % of the variance, shape
        ``(n, n_components)``; none if nothing varies
    """
    u, s, _ = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    explained = np.cumsum(s**2)
    n_components = min(int(np.searchsorted(explained, 0.999 * explained[-1])) + 1, 64) if s[0] > 0 else 0
    return u[:, :n_components] * s[:n_components]


def linear_predictability(x: np.ndarray, y: np.ndarray, more: np.ndarray | None = None) -> float:
    """
    How much of one representation is in another: the mean of :func:`held_out_r2` over the principal components of ``y``, each
    counted from 0 to 1. Unlike linear CKA, a direction with much variance does not hide the rest.

    :param x: latents, in a random order, shape ``(n, latent_dim)``; their principal components are the inputs
    :param y: other latents of the same observations, or of the next ones, shape ``(n, other_latent_dim)``
    :param more: inputs in addition to the latents, shape ``(n, n_inputs)``
    :return: from 0 to 1, the latter also if ``y`` does not vary
    """
    inputs, targets = principal_components(x), principal_components(y)
    if targets.shape[1] == 0:
        return 1.0
    r2 = held_out_r2(inputs if more is None else np.hstack([inputs, more]), targets)
    return float(np.nan_to_num(r2, nan=0).clip(0, 1).mean())

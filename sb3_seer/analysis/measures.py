"""How similar two representations are, where an encoder looks, and what can be read from latents."""

import numpy as np

# Of a ridge regression on standardised inputs
PENALTIES = 10.0 ** np.arange(-2, 6)


def debiased_cka(x: np.ndarray, y: np.ndarray) -> float:
    """
    Linear centred kernel alignment (Kornblith et al. 2019, https://arxiv.org/abs/1905.00414) with the unbiased estimate of
    HSIC (Song et al. 2012, equation 5). Biased, two independent representations of 576 numbers have 0.5 on 512 samples.

    A few directions with much variance decide it: two representations that share one, and nothing else, are near 1.

    :param x: shape ``(n_samples, n_features)``
    :param y: shape ``(n_samples, n_other_features)``
    :return: about 0 if they are independent, 1 if they are equal up to rotation and scale; NaN if one is constant
    """
    grams = [(z - z.mean(axis=0)) @ (z - z.mean(axis=0)).T for z in (x, y)]
    for gram in grams:
        np.fill_diagonal(gram, 0.0)
    xx, yy = (_hsic(gram, gram) for gram in grams)
    return float(_hsic(*grams) / np.sqrt(xx * yy)) if xx > 0 and yy > 0 else np.nan


def _hsic(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    """:return: unbiased estimate, of Gram matrices with a diagonal of zeros"""
    n, k_sums, l_sums = len(k), k.sum(axis=0), l.sum(axis=0)
    middle = k_sums.sum() * l_sums.sum() / ((n - 1) * (n - 2))
    return ((k * l).sum() + middle - 2 / (n - 2) * k_sums @ l_sums) / (n * (n - 3))


def svcca(x: np.ndarray, y: np.ndarray, variance: float = 0.99) -> float:
    """
    Mean canonical correlation of the principal components (Raghu et al. 2017, https://arxiv.org/abs/1706.05806), SEER's
    figure 8. It needs many more samples than components: with as many it is 1.

    :param x: shape ``(n_samples, n_features)``
    :param y: shape ``(n_samples, n_other_features)``
    :param variance: part of the variance that the components must explain
    :return: from 0 to 1, the latter if they are equal up to a linear map; NaN if one is constant
    """
    components = []
    for z in (x, y):
        u, s, _ = np.linalg.svd(z - z.mean(axis=0), full_matrices=False)
        if s[0] == 0:
            return np.nan
        explained = np.cumsum(s**2) / (s**2).sum()
        components.append(u[:, : np.searchsorted(explained, variance) + 1])
    return float(np.linalg.svd(components[0].T @ components[1], compute_uv=False).clip(0, 1).mean())


def spatial_attention(feature_maps: np.ndarray) -> np.ndarray:
    """
    Where activations are large (Zagoruyko & Komodakis 2017, https://arxiv.org/abs/1612.03928; SEER, figure 8).

    :param feature_maps: shape ``(n, channels, height, width)``
    :return: softmax over the pixels of the mean absolute activation, shape ``(n, height, width)``
    """
    means = np.abs(feature_maps).mean(axis=1)
    exponentials = np.exp(means - means.max(axis=(1, 2), keepdims=True))
    return exponentials / exponentials.sum(axis=(1, 2), keepdims=True)


def held_out_r2(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """
    How well a linear map reads quantities from latents, on steps that it has not seen: fitted on the first half (ridge
    regression), its penalty chosen on the next quarter, fitted again on both, and tested on the last quarter.

    :param x: latents, in the order of the steps, shape ``(n, latent_dim)``
    :param y: quantities, shape ``(n, n_quantities)``
    :return: R2 of each: 1 if it is exact, 0 or less if it is no better than the mean; shape ``(n_quantities,)``
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
    return 1 - errors / np.maximum(test_y.var(axis=0), 1e-12)

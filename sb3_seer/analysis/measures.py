"""How similar two representations are, and where an encoder looks."""

import numpy as np


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

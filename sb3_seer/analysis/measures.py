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
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    xx, yy = _hsic(x, x), _hsic(y, y)
    return float(_hsic(x, y) / np.sqrt(xx * yy)) if xx > 0 and yy > 0 else np.nan


def _hsic(x: np.ndarray, y: np.ndarray) -> float:
    """
    Without the Gram matrices x x^T and y y^T of equation 5, which has zeros on their diagonals: a row of one then sums to
    minus its diagonal, as the features are centred.

    :return: unbiased estimate of HSIC, of centred features
    """
    n, x_squares, y_squares = len(x), (x**2).sum(axis=1), (y**2).sum(axis=1)
    product = ((x.T @ y) ** 2).sum() - x_squares @ y_squares
    middle = x_squares.sum() * y_squares.sum() / ((n - 1) * (n - 2))
    return float(product + middle - 2 / (n - 2) * x_squares @ y_squares) / (n * (n - 3))


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

"""Categorical value distributions (C51): Bellemare et al. 2017, https://arxiv.org/abs/1707.06887."""

import torch as th


def categorical_projection(probabilities: th.Tensor, values: th.Tensor, support: th.Tensor) -> th.Tensor:
    """
    Project distributions onto a fixed support (Bellemare et al., equation 7): the probability of a value is divided
    between the two atoms next to it, in proportion to how near they are; beyond the ends of the support, the last atom
    gets all of it.

    :param probabilities: probabilities of the values, shape ``(batch_size, n_values)``
    :param values: values, shape ``(batch_size, n_values)``
    :param support: equally spaced atoms in ascending order, at least two, shape ``(n_atoms,)``
    :return: probabilities of the atoms, shape ``(batch_size, n_atoms)``
    :raises ValueError: for other shapes
    """
    if probabilities.ndim != 2 or probabilities.shape != values.shape:
        raise ValueError(
            "`probabilities` and `values` must have the same shape (batch_size, n_values), "
            f"got {tuple(probabilities.shape)} and {tuple(values.shape)}"
        )
    if support.ndim != 1 or len(support) < 2:
        raise ValueError(f"`support` must have shape (n_atoms,) with n_atoms >= 2, got {tuple(support.shape)}")
    spacing = (support[-1] - support[0]) / (len(support) - 1)
    values = values.clamp(support[0], support[-1])
    distances = (values[:, :, None] - support).abs() / spacing  # [batch_size, n_values, n_atoms]
    shares = (1.0 - distances).clamp(min=0.0)
    return th.bmm(probabilities[:, None, :], shares).squeeze(dim=1)

"""Noisy linear layers."""

import math
from collections.abc import Sequence

import torch as th
from torch import nn
from torch.nn import functional as F


class NoisyLinear(nn.Linear):
    """
    Linear layer with factorised Gaussian noise on its weights, whose scale is learned.

    Paper: Fortunato et al. 2018, https://arxiv.org/abs/1706.10295, section 3 (b): the weights are
    ``weight + weight_sigma * f(e_out) f(e_in)^T``, the biases ``bias + bias_sigma * f(e_out)``, with
    ``f(x) = sign(x) sqrt(|x|)``. All samples of a batch share the noise, until ``reset_noise`` draws new noise.

    Means start as in ``nn.Linear``: uniform in ``+-1 / sqrt(in_features)``, as in the paper. As in the code of
    Kaixhin's Rainbow, which SEER extends, ``bias_sigma`` starts at ``sigma0 / sqrt(out_features)``; in the paper it is
    ``sigma0 / sqrt(in_features)``.

    :param in_features: numbers in an input
    :param out_features: numbers in an output
    :param sigma0: initial scale of the noise, divided by the square root of the layer's width
    """

    weight_noise: th.Tensor
    bias_noise: th.Tensor

    def __init__(self, in_features: int, out_features: int, sigma0: float = 0.5) -> None:
        super().__init__(in_features, out_features)
        self.weight_sigma = nn.Parameter(th.full_like(self.weight, sigma0 / math.sqrt(in_features)))
        self.bias_sigma = nn.Parameter(th.full_like(self.bias, sigma0 / math.sqrt(out_features)))
        # Not saved: drawn before each use
        self.register_buffer("weight_noise", th.zeros_like(self.weight), persistent=False)
        self.register_buffer("bias_noise", th.zeros_like(self.bias), persistent=False)
        self.noise_enabled = True
        reset_noise([self])

    def set_noise(self, noise_in: th.Tensor, noise_out: th.Tensor) -> None:
        """
        :param noise_in: ``f(e_in)``, shape ``(in_features,)``
        :param noise_out: ``f(e_out)``, shape ``(out_features,)``
        """
        self.bias_noise = noise_out
        self.weight_noise = th.outer(noise_out, noise_in)

    def forward(self, input: th.Tensor) -> th.Tensor:
        """
        :param input: shape ``(batch_size, in_features)``
        :return: shape ``(batch_size, out_features)``
        """
        if not self.noise_enabled:
            return super().forward(input)
        weight = th.addcmul(self.weight, self.weight_sigma, self.weight_noise)
        return F.linear(input, weight, th.addcmul(self.bias, self.bias_sigma, self.bias_noise))


def reset_noise(layers: Sequence[NoisyLinear]) -> None:
    """
    Draw new noise for all layers at once.

    :param layers: layers on one device
    """
    if not layers:
        return
    sizes = [size for layer in layers for size in (layer.in_features, layer.out_features)]
    noise = th.randn(sum(sizes), device=layers[0].weight.device)
    parts = iter((noise.sign() * noise.abs().sqrt()).split(sizes))
    for layer in layers:
        layer.set_noise(next(parts), next(parts))

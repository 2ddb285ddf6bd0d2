"""What optimizers remember, without the numbers that processors are slow at."""

import torch as th
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

# From one look at the optimizers to the next
GRADIENT_STEPS = 100


class NormalMoments(OffPolicyAlgorithm):
    """
    Mixin for an algorithm: on a CPU, what its optimizers remember is never subnormal (below 1.2e-38) for long.

    Adam multiplies the momentum of a weight without a gradient, as all weights of a dead unit are, by 0.9 in each step.
    It never gets to zero: the smallest numbers are rounded to themselves. A processor may need a hundred times as long for
    one of these, and after a thousand steps of ``SEERSAC`` without images, four momenta in ten were such. They are
    set to zero here, which changes no weight.
    """

    _moments_due = 0  # the gradient step after which to look again

    def _update_learning_rate(self, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer) -> None:
        # Each train() begins with this, those of SB3 too
        super()._update_learning_rate(optimizers)
        if self.device.type == "cpu" and self._n_updates >= self._moments_due:
            self._moments_due = self._n_updates + GRADIENT_STEPS
            for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
                _forget_subnormal(optimizer)


def _forget_subnormal(optimizer: th.optim.Optimizer) -> None:
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, th.Tensor) and value.is_floating_point():
                value.masked_fill_(value.abs() < th.finfo(value.dtype).tiny, 0.0)

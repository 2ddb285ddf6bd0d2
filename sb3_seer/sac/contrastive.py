import torch as th
from torch import nn
from torch.nn import functional as F


def contrastive_loss(anchors: th.Tensor, keys: th.Tensor, weight: th.Tensor) -> th.Tensor:
    """
    The InfoNCE loss with bilinear similarities (CURL, https://arxiv.org/abs/2004.04136, section 4.3): for each anchor, find
    its own key among the keys of the batch. The logits are ``anchors[i] @ weight @ keys[j]``, and the label of anchor i is i.

    :param anchors: shape ``(batch_size, n_features)``
    :param keys: same shape, ``keys[i]`` belongs to ``anchors[i]``
    :param weight: the bilinear form W, shape ``(n_features, n_features)``
    :return: the mean cross-entropy, a scalar
    """
    batch_size, n_features = anchors.shape
    # A wrong shape would broadcast silently
    assert keys.shape == (batch_size, n_features), f"anchors are {tuple(anchors.shape)}, keys {tuple(keys.shape)}"
    assert weight.shape == (n_features, n_features), f"features are {n_features}, the weight is {tuple(weight.shape)}"
    logits = anchors @ weight @ keys.T  # (batch_size, batch_size)
    return F.cross_entropy(logits, th.arange(batch_size, device=logits.device))


class ContrastiveDynamics(nn.Module):
    """
    Predicts the features of the next observation from those of the observation and the action, and is trained by the InfoNCE
    loss to tell the right next observation from the others of the batch (CPC: van den Oord et al. 2018,
    https://arxiv.org/abs/1807.03748; with actions, in control from pixels: TACO, Zheng et al. 2023,
    https://arxiv.org/abs/2306.13229, section 4, with one step and without its other two losses).

    Its gradient makes an encoder keep what tells next observations apart: positions and velocities, also those that the
    reward does not depend on yet.

    :param n_features: numbers in the features of an observation
    :param action_dim: numbers in an action
    :param hidden_size: units of the hidden layer
    """

    def __init__(self, n_features: int, action_dim: int, hidden_size: int = 256) -> None:
        super().__init__()
        self.predictor = nn.Sequential(
            nn.Linear(n_features + action_dim, hidden_size), nn.ReLU(), nn.Linear(hidden_size, n_features)
        )
        # Layer-normalised features have inner products of up to n_features: start with a soft distribution
        self.weight = nn.Parameter(0.1 * th.eye(n_features))

    def loss(self, features: th.Tensor, actions: th.Tensor, next_features: th.Tensor) -> th.Tensor:
        """
        :param features: shape ``(batch_size, n_features)``
        :param actions: shape ``(batch_size, action_dim)``
        :param next_features: of the target network, without a graph, shape ``(batch_size, n_features)``
        :return: the InfoNCE loss, a scalar
        """
        predictions = features + self.predictor(th.cat((features, actions), dim=1))
        return contrastive_loss(predictions, next_features, self.weight)

"""
An encoder trained elsewhere: here by an autoencoder, on images of a random policy. The agent has latents from the start:
no image is ever stored, and no gradient step touches a convolution. Half a minute on one core.

    python examples/pretrained_encoder.py [--total-timesteps 5000]
    python examples/pretrained_encoder.py --weights catch_encoder.pt
    python examples/pretrained_encoder.py --random
"""

import argparse
from pathlib import Path

import numpy as np
import torch as th
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from torch import nn
from torch.nn import functional as F

from own_environment import Catch, make_model
from sb3_seer import PretrainedEncoder


def make_encoder(n_outputs: int = 64) -> nn.Module:
    """
    :param n_outputs: numbers in a latent
    :return: the encoder, without its weights
    """
    return nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=5, stride=5),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 10 * 10, n_outputs),
    )


def random_images(n_images: int) -> th.Tensor:
    """:return: images of a random policy, from 0 to 1, shape ``(n_images, 1, 50, 50)``"""
    env, images = Catch(), []
    env.action_space.seed(0)
    image, _ = env.reset(seed=0)
    for _ in range(n_images):
        images.append(image)
        image, _, terminated, _, _ = env.step(env.action_space.sample())
        if terminated:
            image, _ = env.reset()
    return th.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255


def pretrain(weights: Path, n_updates: int) -> None:
    """
    :param weights: where to save the encoder's
    :param n_updates: gradient steps
    """
    th.manual_seed(0)
    images, encoder = random_images(2_000), make_encoder()
    decoder = nn.Sequential(nn.ReLU(), nn.Linear(64, 50 * 50), nn.Unflatten(1, (1, 50, 50)))
    optimizer = th.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3)
    for _ in range(n_updates):
        batch = images[th.randint(len(images), (128,))]
        loss = F.mse_loss(decoder(encoder(batch)), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"{n_updates} gradient steps: mean squared error {loss.item():.4f}, variance of a pixel {images.var():.4f}")
    th.save(encoder.state_dict(), weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--total-timesteps", type=int, default=5_000)
    parser.add_argument("--weights", type=Path, help="saved by an earlier run; by default the encoder is trained first")
    parser.add_argument("--random", action="store_true", help="to compare: random weights, frozen")
    args = parser.parse_args()

    weights = args.weights
    if weights is None and not args.random:
        weights = Path("catch_encoder.pt")
        pretrain(weights, n_updates=min(args.total_timesteps, 500))

    model = make_model(
        args.total_timesteps,
        freeze_after=0,
        policy_kwargs=dict(
            features_extractor_class=PretrainedEncoder,
            # A module of Python and a function in it that makes the encoder: a name that can stand in a YAML file, too
            features_extractor_kwargs=dict(module="pretrained_encoder:make_encoder", weights=weights, mean=None, std=None),
            net_arch=[128],
        ),
    )
    env = Monitor(Catch())
    before, _ = evaluate_policy(model, env, n_eval_episodes=20)
    model.learn(args.total_timesteps)
    after, _ = evaluate_policy(model, env, n_eval_episodes=20)
    print(f"caught of 10 balls: {before:.1f} before the training, {after:.1f} after it")
    print(f"the buffer holds {model.replay_buffer.stage}: up to {model.replay_buffer.buffer_size:,} transitions")


if __name__ == "__main__":
    main()

"""
How SEERSAC learns cartpole-swingup from an encoder that was trained elsewhere, frozen from the first step.

    python -m benchmarks.pretrained_encoder benchmarks.pretrained_encoder:o_net --one-by-one --input-size 48 --scale 0.5 \
        --weights facenet_pytorch/data/onet.pt
    python -m benchmarks.pretrained_encoder benchmarks.pretrained_encoder:pixel_encoder --weights pixel_encoder.pth

About two minutes each. Without ``--weights`` the encoder is random. Images have 50x50 pixels, and three frames are stacked.
"""

import argparse
from collections import OrderedDict

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecTransposeImage
from torch import nn

import sb3_seer.envs
from benchmarks.common import frozen_agent, learn_and_evaluate
from sb3_seer import PixelEncoder, PretrainedEncoder

N_STACK, SIZE = 3, 50


class FlattenColumns(nn.Module):
    """Flattens feature maps column by column, as the weights of ``o_net`` expect."""

    def forward(self, feature_maps: th.Tensor) -> th.Tensor:
        """:return: shape ``(batch_size, width * height * channels)``"""
        return feature_maps.permute(0, 3, 2, 1).flatten(start_dim=1)


def o_net() -> nn.Module:
    """
    The last network of MTCNN (Zhang et al. 2016, https://arxiv.org/abs/1604.02878), which looks for a face in 48x48 pixels,
    without its outputs. The package facenet-pytorch on PyPI holds its weights: ``data/onet.pt``, for pixels from -1 to 1.

    :return: 256 numbers for an image
    """
    sizes = [(3, 32, 3), (32, 64, 3), (64, 64, 3), (64, 128, 2)]  # channels in, channels out, kernel
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (n_in, n_out, kernel) in enumerate(sizes, start=1):
        layers[f"conv{i}"], layers[f"prelu{i}"] = nn.Conv2d(n_in, n_out, kernel), nn.PReLU(n_out)
        if i < 4:
            layers[f"pool{i}"] = nn.MaxPool2d(3 if i < 3 else 2, stride=2, ceil_mode=True)
    layers.update(flatten=FlattenColumns(), dense5=nn.Linear(1152, 256), prelu5=nn.PReLU(256))
    return nn.Sequential(layers)


def pixel_encoder() -> nn.Module:
    """
    The layers of ``PixelEncoder``. Weights of a trained model, for ``--weights``::

        encoder = SEERSAC.load("model.zip").critic.features_extractor
        th.save(nn.Sequential(encoder.trunk, encoder.projection).state_dict(), "pixel_encoder.pth")

    :return: 50 numbers for a stack of images
    """
    encoder = PixelEncoder(spaces.Box(0, 255, (3 * N_STACK, SIZE, SIZE), np.uint8))
    return nn.Sequential(encoder.trunk, encoder.projection)


def make_env() -> VecEnv:
    """:return: cartpole-swingup with the papers' action repeat"""

    def one() -> gym.Env:
        env = sb3_seer.envs.ActionRepeat(gym.make("dm_control/cartpole-swingup-v0"), repeat=8)
        return sb3_seer.envs.DMControlPixels(env, height=SIZE, width=SIZE, shadows=False)

    return VecTransposeImage(VecFrameStack(make_vec_env(one), N_STACK))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", help='"package.module:function" or "timm:NAME"')
    parser.add_argument("--weights", help="file of a state_dict")
    parser.add_argument("--one-by-one", action="store_true", help="encode the frames of a stack one by one")
    parser.add_argument("--input-size", type=int, help="images are resized to this height and width")
    parser.add_argument("--scale", type=float, help="mean and standard deviation of pixels that the module expects (0 to 1)")
    parser.add_argument("--steps", type=int, default=5000, help="of the agent, 8 of the environment each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    n_stack = N_STACK if args.one_by_one else 1
    scale = None if args.scale is None else [args.scale] * (3 * N_STACK // n_stack)
    kwargs = dict(module=args.module, weights=args.weights, input_size=args.input_size, mean=scale, std=scale, n_stack=n_stack)
    extractor = dict(features_extractor_class=PretrainedEncoder, features_extractor_kwargs=kwargs)
    model = frozen_agent(make_env(), args.steps, args.seed, **extractor)
    plan = model.replay_buffer.plan()
    print(f"{plan.record_bytes:,} bytes of latents a transition; of an image {plan.frame_bytes:,}", flush=True)
    learn_and_evaluate(model, make_env, args.steps)


if __name__ == "__main__":
    main()

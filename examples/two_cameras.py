"""
Two cameras of dm_control, each with an encoder of its own, and the joint positions: an agent trained through the freeze.

    python examples/two_cameras.py [--total-timesteps 600]
"""

import argparse
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

import sb3_seer.envs  # noqa: F401  # registers dm_control's environments
from sb3_seer import SEERSAC, MultiCameraEncoder, PixelEncoder

CAMERAS: dict[str, dict[str, int]] = dict(
    scene=dict(camera_id=0, height=64, width=64),
    body=dict(camera_id=1, height=40, width=40),
)


class TwoCameras(gym.ObservationWrapper):
    """
    A large image of the scene, a small one from another camera, and the state of the joints.

    :param env: an environment of dm_control
    """

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        n_joints = len(env.unwrapped.physics.data.qpos)  # type: ignore[attr-defined]
        parts: dict[str, spaces.Space] = {"joints": spaces.Box(-np.inf, np.inf, (n_joints,), np.float32)}
        for key, camera in CAMERAS.items():
            parts[key] = spaces.Box(0, 255, (camera["height"], camera["width"], 3), np.uint8)
        self.observation_space = spaces.Dict(parts)

    def observation(self, observation: Any) -> dict[str, np.ndarray]:
        physics = self.env.unwrapped.physics  # type: ignore[attr-defined]
        images = {key: physics.render(**camera) for key, camera in CAMERAS.items()}
        return {**images, "joints": physics.data.qpos.astype(np.float32)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--total-timesteps", type=int, default=600)
    n_steps = parser.parse_args().total_timesteps
    model = SEERSAC(
        "MultiInputPolicy",
        TwoCameras(gym.make("dm_control/cartpole-swingup-v0")),
        buffer_size=n_steps // 2,
        freeze_after=n_steps // 2,
        learning_starts=n_steps // 6,
        batch_size=32,
        augmentation="random_shift",
        policy_kwargs=dict(
            features_extractor_class=MultiCameraEncoder,
            features_extractor_kwargs=dict(encoders=dict(scene=PixelEncoder, body=(PixelEncoder, dict(latent_dim=20)))),
        ),
        verbose=1,
    )
    model.learn(n_steps)
    print(
        f"{model.replay_buffer.stage}: {model.replay_buffer.size()} transitions, latents of shape {model.policy.latent_shape}"
    )

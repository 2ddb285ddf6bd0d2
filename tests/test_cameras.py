"""Several cameras, each with an encoder of its own."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import NatureCNN
from torch import nn

from sb3_seer import SEERDQN, SEERTQC, MultiCameraEncoder, PixelEncoder, SplitExtractor
from tests.dict_helpers import make_env, make_model
from tests.helpers import TinyEncoder, encoder_state

SPACE = spaces.Dict(
    front=spaces.Box(0, 255, (3, 16, 16), np.uint8),
    vector=spaces.Box(-1, 1, (2,), np.float32),
    wrist=spaces.Box(0, 255, (1, 36, 36), np.uint8),
)


def test_each_camera_has_its_encoder_and_the_other_keys_come_last():
    encoders = dict(front=TinyEncoder, wrist=(NatureCNN, dict(features_dim=5)))
    encoder = MultiCameraEncoder(SPACE, encoders)
    assert encoder.latent_dim == 8 + 5 and encoder.features_dim == 8 + 5 + 2
    observations = {key: th.rand(4, *space.shape) for key, space in SPACE.spaces.items()}
    images = {key: observations[key] for key in ("front", "wrist")}
    latents = encoder.encode(images)
    front = encoder.projection["front"](encoder.trunk["front"](observations["front"]))
    wrist = encoder.trunk["wrist"](observations["wrist"])
    assert isinstance(encoder.trunk["wrist"], NatureCNN)
    th.testing.assert_close(latents, th.cat([front, wrist], dim=1))
    features = th.cat([encoder.head["front"](front), wrist, observations["vector"]], dim=1)
    th.testing.assert_close(encoder(observations), features)


def test_a_key_that_is_no_image_is_refused():
    with pytest.raises(ValueError, match="must be for images among front, wrist, got vector"):
        MultiCameraEncoder(SPACE, dict(vector=TinyEncoder))


@pytest.mark.parametrize("encoder", ["PixelEncoder", (PixelEncoder,), (PixelEncoder, 20)])
def test_what_is_no_encoder_is_refused(encoder):
    with pytest.raises(ValueError, match=r"must be classes, or pairs of a class and its arguments, got .* for 'front'"):
        MultiCameraEncoder(SPACE, dict(front=encoder))


def test_an_image_alone_is_refused():
    with pytest.raises(ValueError, match="`observation_space` must be a Dict with images, got Box"):
        MultiCameraEncoder(SPACE["front"])


def test_a_camera_frozen_in_part_is_refused():
    with pytest.raises(ValueError, match="must be frozen as a whole, got freeze_at='conv2' for 'front'"):
        MultiCameraEncoder(SPACE, dict(front=(PixelEncoder, dict(freeze_at="conv2"))))


def test_it_is_trained_if_all_parts_are_and_batch_statistics_are_no_obstacle():
    class Normalised(TinyEncoder):
        is_trained = True

        def __init__(self, observation_space: spaces.Box) -> None:
            super().__init__(observation_space)
            self.trunk = nn.Sequential(self.trunk, nn.BatchNorm1d(self.projection.in_features))

    encoder = MultiCameraEncoder(SPACE, dict(front=Normalised, wrist=Normalised))
    assert encoder.is_trained and encoder.training and encoder.trunk["front"].training
    assert not MultiCameraEncoder(SPACE, dict(front=Normalised)).is_trained


def test_cameras_of_any_size_have_trunks_that_end_in_feature_maps():
    class Maps(SplitExtractor):
        def __init__(self, observation_space: spaces.Box) -> None:
            super().__init__(observation_space, 8)
            self.trunk = nn.Conv2d(observation_space.shape[0], 4, 3, stride=2)
            n_pixels = self.trunk(th.zeros(1, *observation_space.shape))[0].numel()
            self.projection, self.head = nn.Sequential(nn.Flatten(), nn.Linear(n_pixels, 8)), nn.Identity()

    encoder = MultiCameraEncoder(SPACE, dict(front=Maps, wrist=Maps))
    images = {key: th.rand(4, *SPACE[key].shape) for key in ("front", "wrist")}
    expected = [encoder.projection[key](encoder.trunk[key](images[key])) for key in images]
    th.testing.assert_close(encoder.encode(images), th.cat(expected, dim=1))


@pytest.mark.parametrize("algorithm", [SEERTQC, SEERDQN])
def test_an_agent_learns_from_all_of_them_through_the_freeze(algorithm, capsys):
    encoders = dict(image=TinyEncoder, map=(TinyEncoder, dict(latent_dim=6)))
    model = make_model(
        algorithm,
        MultiCameraEncoder,
        env=make_env(algorithm),
        policy_kwargs=dict(features_extractor_kwargs=dict(encoders=encoders)),
        freeze_after=40,
        verbose=1,
    )
    assert "(1,056 bytes each: image 256 + map 800)" in capsys.readouterr().out
    assert model.policy.latent_shape == (2 if algorithm is SEERTQC else 1, 14)
    before = encoder_state(model)
    model.learn(39)
    for key in ("image", "map"):
        moved = [name for name, value in encoder_state(model).items() if f"trunk.{key}" in name and "target" not in name]
        assert moved and not any(th.equal(encoder_state(model)[name], before[name]) for name in moved)
    model.learn(20, reset_num_timesteps=False)
    assert model.replay_buffer.stage == "latents" and model.replay_buffer.size() == 59


def test_keys_may_come_in_another_order_than_the_spaces():
    """As from an environment that returns a dict in an order of its own: a VecEnv sorts it, predict() is given it as it is."""
    space = spaces.Dict(dict(a=spaces.Box(-1, 1, (2,), np.float32), b=SPACE["front"], c=spaces.Box(-1, 1, (2,), np.float32)))
    extractor = MultiCameraEncoder(space, dict(b=TinyEncoder))
    observation = {key: th.as_tensor(space[key].sample()[None]).float() for key in space}
    turned = dict(reversed(observation.items()))
    th.testing.assert_close(extractor(turned), extractor(observation), rtol=0, atol=0)

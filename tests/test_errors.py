"""Bad input: one clear ValueError at construction, which names the parameter, what was given and what is allowed."""

import warnings
from functools import partial

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import DQN, SAC, HerReplayBuffer
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, NatureCNN
from stable_baselines3.common.vec_env import (
    VecEnvWrapper,
    VecExtractDictObs,
    VecFrameStack,
    VecNormalize,
    VecTransposeImage,
)
from stable_baselines3.dqn.policies import CnnPolicy as DQNPolicy
from torch import nn

from sb3_seer import (
    SEERCURL,
    SEERDQN,
    SEERQRDQN,
    SEERSAC,
    SEERTD3,
    SEERTQC,
    DataEfficientCNN,
    FreezeEncoderCallback,
    LatentReplayBuffer,
    PrioritizedReplayBuffer,
    Rainbow,
    SEERCrossQ,
    SplitExtractor,
)
from sb3_seer.sac import MultiInputPolicy
from tests.dict_helpers import make_env
from tests.helpers import DialEnv, LightEnv, TinyEncoder, make_model


class ToFloats(th.nn.Module):
    """Pixels from 0 to 255 as floats would be divided by 255 a second time by a loss that looks at them again."""

    def forward(self, images: th.Tensor) -> th.Tensor:
        return images.float()


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(freeze_after=-1), r"`freeze_after` must be .* got -1"),
        (dict(freeze_after=0.0), r"`freeze_after` must be .* got 0\.0"),
        (dict(freeze_after=1.5), r"`freeze_after` must be .* got 1\.5"),
        (dict(freeze_after="soon"), "`freeze_after` must be .* got 'soon'"),
        (dict(freeze_after=True), "`freeze_after` must be .* got True"),
        (dict(n_augmentations=0, augmentation="random_shift"), "n_augmentations.*0"),
        (dict(n_augmentations=2.5, augmentation="random_shift"), "n_augmentations.*2.5"),
        (dict(n_augmentations=4), "`n_augmentations` must be 1 without an augmentation, got 4"),
        (
            dict(augmentation="random_crop", augmentation_kwargs=dict(size=84)),
            "`size` of a random crop must be <= 16 .*got 84",
        ),
        (dict(augmentation="flip"), "`augmentation` must be one of .*random_crop.*random_shift.*got 'flip'"),
        (dict(augmentation=th.nn.Flatten()), "`augmentation` must return images of shape"),
        (dict(latent_dtype="float64"), "`latent_dtype` must be one of .*float32.* got 'float64'"),
        (dict(augmentation=["random_crop"]), "`augmentation` must be one of"),
        (dict(augmentation=ToFloats()), "`augmentation` must return images of dtype torch.uint8, got torch.float32"),
        (dict(augmentation=th.nn.ZeroPad2d(2)), "`augmentation` must return .*up to 16, up to 16.*got .*20, 20"),
        (dict(latent_dtype="uint8", freeze_after=0), "`latent_dtype` must be .* with freeze_after=0, got .uint8"),
        (dict(max_latent_buffer_size=10), "max_latent_buffer_size.*10"),
        (dict(max_latent_buffer_size="large"), "max_latent_buffer_size.*large"),
        (dict(replay_buffer_class="HerReplayBuffer"), "replay_buffer_class` must be LatentReplayBuffer, .*HerReplayBuffer"),
        (
            dict(replay_buffer_class=HerReplayBuffer),
            "replay_buffer_class` must be LatentReplayBuffer, .*got HerReplayBuffer. For hindsight",
        ),
        (dict(replay_buffer_class=ReplayBuffer), "replay_buffer_class` must be LatentReplayBuffer, .*got ReplayBuffer"),
        (dict(replay_buffer_class=NStepReplayBuffer), r"got NStepReplayBuffer\. For n-step returns, set n_steps"),
        (dict(replay_buffer_class=PrioritizedReplayBuffer), r"got PrioritizedReplayBuffer\. .*dict\(prioritized=True\)"),
        (dict(batch_size_after_freeze=0), "`batch_size_after_freeze` must be None or an integer >= 1, got 0"),
        (dict(batch_size_after_freeze=-1), "`batch_size_after_freeze` must be None or an integer >= 1, got -1"),
        (dict(batch_size_after_freeze=True), "`batch_size_after_freeze` must be None or an integer >= 1, got True"),
        (dict(gradient_steps_after_freeze=0), "`gradient_steps_after_freeze` must be None or -1 or an integer >= 1, got 0"),
        (
            dict(gradient_steps_after_freeze=1.5),
            "`gradient_steps_after_freeze` must be None or -1 or an integer >= 1, got 1.5",
        ),
    ],
)
def test_parameters(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_model(SEERDQN, **kwargs)


def test_parameters_are_checked_when_a_model_is_loaded(tmp_path):
    make_model(SEERDQN).save(tmp_path / "model")
    before = (tmp_path / "model.zip").read_bytes()
    with pytest.raises(ValueError, match=r"`freeze_after` must be .* got -5"):
        SEERDQN.load(tmp_path / "model", freeze_after=-5)
    assert (tmp_path / "model.zip").read_bytes() == before


def test_a_latent_larger_than_the_image_says_what_would_change_it():
    """Images of 256 bytes; a latent of 200 float32 numbers has 800, of float16 400, of uint8 200."""
    with pytest.raises(ValueError, match="larger") as error:
        SEERQRDQN(
            "CnnPolicy", LightEnv(), buffer_size=1000, device="cpu",
            policy_kwargs=dict(features_extractor_class=TinyEncoder, features_extractor_kwargs=dict(latent_dim=200)),
        )  # fmt: skip
    for part in ("800", "256", "1,000", "320", "'uint8'", "1,280"):
        assert part in str(error.value), part
    assert "'float16'" not in str(error.value)  # 640 are too few


def test_small_grey_images_need_a_smaller_latent():
    with pytest.raises(ValueError, match=r"a features extractor whose latent has 400 numbers holds 100\.$"):
        make_model(SEERDQN, NatureCNN, size=40, buffer_size=100)


def test_without_a_freeze_a_large_latent_is_no_error_until_it_is_asked_for():
    kwargs = dict(features_extractor_class=TinyEncoder, features_extractor_kwargs=dict(latent_dim=200))
    model = SEERQRDQN("CnnPolicy", LightEnv(), buffer_size=100, freeze_after=None, device="cpu", policy_kwargs=kwargs)
    with pytest.raises(ValueError, match="larger"):
        model.learn(30, callback=FreezeEncoderCallback(20))
    assert model.num_timesteps == 0
    model.learn(30)
    with pytest.raises(ValueError, match="larger"):
        model.freeze_encoder()
    assert not model.encoder_frozen and model.replay_buffer.stage == "images"
    assert all(parameter.requires_grad for parameter in model.policy.parameters())


class Split(SplitExtractor):
    """Takes the second argument for the size of the features, as in SB3. It is the size of a latent."""

    def __init__(self, observation_space: spaces.Space, latent_dim: int = 4, features_dim: int = 4) -> None:
        super().__init__(observation_space, features_dim)
        self.trunk, self.projection = nn.Flatten(), nn.Linear(256, latent_dim)
        self.head = nn.Linear(latent_dim, features_dim)


class Centred(Split):
    def encode(self, images: th.Tensor) -> th.Tensor:
        return super().encode(images - 0.5)


class Scaled(Split):
    def forward(self, observations: th.Tensor) -> th.Tensor:
        return super().forward(observations * 2)


def test_a_latent_has_the_size_that_its_extractor_says():
    with pytest.raises(ValueError, match=r"A latent of Split must have latent_dim=8 numbers, got shape \(4,\)"):
        make_model(SEERDQN, Split, policy_kwargs=dict(features_extractor_kwargs=dict(features_dim=8)))


@pytest.mark.parametrize("extractor", [Centred, Scaled])
def test_methods_of_an_extractor_that_are_not_called_must_not_be_overridden(extractor):
    with pytest.raises(ValueError, match=rf"{extractor.__name__} must not override forward\(\) or encode\(\)"):
        make_model(SEERDQN, extractor)


def test_an_extractor_must_join_the_keys_that_are_not_images():
    with pytest.raises(ValueError, match=r"Split must override features\(\) to join the keys of Dict"):
        SEERSAC(
            "MultiInputPolicy", make_env(SEERSAC), buffer_size=10, policy_kwargs=dict(features_extractor_class=Split)
        )  # fmt: skip


def test_a_cnn_policy_without_images():
    with pytest.raises(ValueError, match=r"`observation_space` must have images .* with CnnPolicy, got"):
        SEERDQN("CnnPolicy", "CartPole-v1")


def test_normalised_images():
    env = VecNormalize(make_vec_env(LightEnv), norm_obs=True)
    with pytest.raises(ValueError, match="`norm_obs` of VecNormalize must be False with images, got True"):
        SEERQRDQN("CnnPolicy", env, buffer_size=10, policy_kwargs=dict(features_extractor_class=TinyEncoder))


@pytest.mark.parametrize("wrapper", [VecTransposeImage, partial(VecFrameStack, n_stack=2)])
def test_wrappers_that_change_images_outside_of_vec_normalize(wrapper):
    """VecNormalize hands on the images that it was given, and they would be stored."""

    class WideEnv(LightEnv):
        def __init__(self) -> None:
            super().__init__()
            self.observation_space = spaces.Box(0, 255, (16, 16, 3), np.uint8)

    env = wrapper(VecNormalize(make_vec_env(WideEnv), norm_obs=False))
    with pytest.raises(ValueError, match=r"must wrap images of \([36], 16, 16\), got \(16, 16, 3\)"):
        SEERQRDQN("CnnPolicy", env, buffer_size=10, policy_kwargs=dict(features_extractor_class=TinyEncoder))


def test_a_wrapper_that_takes_an_image_out_of_a_dict_outside_of_vec_normalize():
    class CameraEnv(LightEnv):
        def __init__(self) -> None:
            super().__init__()
            self.observation_space = spaces.Dict(camera=self.observation_space)

    env = VecExtractDictObs(VecNormalize(make_vec_env(CameraEnv), norm_obs=False), "camera")
    with pytest.raises(ValueError, match=r"must wrap images of (\(.+\)), got \1 under 'camera'"):
        SEERQRDQN("CnnPolicy", env, buffer_size=10, policy_kwargs=dict(features_extractor_class=TinyEncoder))


@pytest.mark.filterwarnings("ignore:.*no encoder to freeze")
@pytest.mark.parametrize("algorithm", [SEERSAC, SEERCURL, SEERTD3, SEERTQC, SEERCrossQ])
def test_priorities_that_the_updates_would_not_look_at(algorithm):
    with pytest.raises(ValueError, match=rf"got PrioritizedReplayBuffer: the updates of {algorithm.__name__} do not use"):
        algorithm("MlpPolicy", "Pendulum-v1", buffer_size=10, replay_buffer_class=PrioritizedReplayBuffer)
    if algorithm not in (SEERSAC, SEERCURL):
        with pytest.raises(ValueError, match=f"got LatentReplayBuffer: the updates of {algorithm.__name__} do not use"):
            make_model(algorithm, replay_buffer_kwargs=dict(prioritized=True))


@pytest.mark.parametrize("n_stack", [None, 1])
def test_stacks_that_do_not_move_on_by_a_frame_are_named(n_stack):
    """They are stored all the same, with all of their frames."""

    class Noisy(VecEnvWrapper):
        def reset(self):
            return self.venv.reset()

        def step_wait(self):
            obs, *others = self.venv.step_wait()
            return np.random.randint(0, 256, obs.shape).astype(np.uint8), *others

    model = SEERQRDQN(
        "CnnPolicy", Noisy(VecFrameStack(make_vec_env(LightEnv), 4, "first")), buffer_size=100, learning_starts=1000,
        device="cpu", policy_kwargs=dict(features_extractor_class=TinyEncoder), freeze_after=None,
        replay_buffer_kwargs={} if n_stack is None else dict(n_stack=n_stack),
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model.learn(100, log_interval=1)
    messages = {str(warning.message) for warning in said}
    assert any("half as much memory" in message and "n_stack=1" in message for message in messages) == (n_stack is None)


def test_nothing_to_freeze():
    with pytest.warns(UserWarning, match="no encoder to freeze"):
        model = SEERSAC("MlpPolicy", "Pendulum-v1")
    with pytest.raises(ValueError, match="no encoder"):
        model.freeze_encoder()
    with pytest.raises(ValueError, match="no encoder"):
        model.encode(np.zeros(3, dtype=np.float32))


def test_a_model_of_sb3_is_no_seer_model(tmp_path):
    SAC("CnnPolicy", DialEnv(size=36), buffer_size=10, device="cpu").save(tmp_path / "sac")
    with pytest.warns(UserWarning, match=r"To start from a model that SB3 saved, add pretrained_encoder=<its file>"):
        SEERSAC.load(tmp_path / "sac", env=DialEnv(size=36), device="cpu")
    model = SEERSAC("CnnPolicy", DialEnv(size=36), freeze_after=None, device="cpu", pretrained_encoder=tmp_path / "sac.zip")
    assert model.policy.encoder_networks


def test_a_callback_without_an_encoder_says_so_before_the_training():
    with pytest.warns(UserWarning, match="no encoder to freeze"):
        model = SEERSAC("MlpPolicy", "Pendulum-v1", buffer_size=10)
    with pytest.raises(ValueError, match="no encoder"):
        model.learn(5, callback=FreezeEncoderCallback(200))
    assert model.num_timesteps == 0


def test_images_that_are_normalised_later_are_refused():
    class FloatEnv(LightEnv):
        def __init__(self) -> None:
            super().__init__()
            self.observation_space = spaces.Box(0, 255, (1, 16, 16), np.float32)

        def _draw(self, lamp: int) -> np.ndarray:
            return self.np_random.random((1, 16, 16), dtype=np.float32)

    model = make_model(SEERDQN, env=FloatEnv())
    model.set_env(VecNormalize(make_vec_env(FloatEnv)))
    with pytest.raises(ValueError, match="`norm_obs` of VecNormalize must be False"):
        model.learn(10)


def test_a_buffer_of_images_does_not_normalize_them_for_other_algorithms_either():
    settings: dict = dict(buffer_size=50, learning_starts=10, replay_buffer_class=LatentReplayBuffer, device="cpu")
    env = VecNormalize(make_vec_env(lambda: LightEnv(size=36)))
    with pytest.raises(ValueError, match="`norm_obs` of VecNormalize must be False with images"):
        Rainbow("CnnPolicy", env, **settings)
    with pytest.raises(ValueError, match="`norm_obs` of VecNormalize must be False with images"):
        DQN("CnnPolicy", env, policy_kwargs=dict(normalize_images=False), **settings).learn(20)


class Mixes(BaseFeaturesExtractor):
    """Mixes an image with another key."""

    def __init__(self, observation_space: spaces.Dict) -> None:
        super().__init__(observation_space, 1)

    def forward(self, observations: dict[str, th.Tensor]) -> th.Tensor:
        return observations["image"].mean(dim=(1, 2, 3))[:, None] * observations["vector"][:, :1]


def test_a_policy_whose_own_extractor_mixes_keys_is_refused():
    class Policy(MultiInputPolicy):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **{**kwargs, "features_extractor_class": Mixes})

    with pytest.raises(ValueError, match="must be CombinedExtractor or a SplitExtractor with Dict observations, got Mixes"):
        SEERSAC(Policy, make_env(SEERSAC), buffer_size=10)


@pytest.mark.filterwarnings("ignore:.*no encoder to freeze")
def test_crossq_without_an_encoder_has_no_dict_observations():
    with pytest.raises(ValueError, match="SEERCrossQ needs an encoder to freeze"):
        SEERCrossQ(
            "MultiInputPolicy", make_env(SEERCrossQ), buffer_size=10, policy_kwargs=dict(features_extractor_class=Mixes)
        )


@pytest.mark.filterwarnings("ignore:.*no encoder to freeze")
def test_a_policy_of_sb3_trains_with_our_buffer_as_in_sb3():
    policy_kwargs = dict(features_extractor_class=TinyEncoder)
    model = SEERDQN(
        DQNPolicy, LightEnv(), buffer_size=50, learning_starts=10, replay_buffer_class=LatentReplayBuffer,
        policy_kwargs=policy_kwargs, device="cpu",
    )  # fmt: skip
    assert model.learn(30)._n_updates > 0


def test_an_encoder_of_one_image_names_the_one_for_several():
    space = spaces.Dict(image=spaces.Box(0, 255, (1, 84, 84), np.uint8))
    with pytest.raises(ValueError, match=r"DataEfficientCNN must be a Box of images, got Dict.*MultiCameraEncoder"):
        DataEfficientCNN(space)


@pytest.mark.filterwarnings("ignore:.*no encoder to freeze")
def test_a_warning_does_not_need_the_name_of_a_module():
    exec("from sb3_seer import SEERSAC\nSEERSAC('MlpPolicy', 'Pendulum-v1', buffer_size=10)", {})


@pytest.mark.parametrize("freeze_after", [-1, 1.5, "soon", None])
def test_callback(freeze_after):
    with pytest.raises(ValueError, match=r"`freeze_after` .*must be"):
        FreezeEncoderCallback(freeze_after)


def test_a_buffer_that_the_memory_does_not_hold_is_named():
    model = make_model(SEERDQN, buffer_size=10**15, freeze_after=None)
    with pytest.raises(MemoryError, match=r"buffer_size=1,000,000,000,000,000 images take 256000000\.0 GB"):
        model.learn(1)


@pytest.mark.parametrize(
    "policy, env, policy_kwargs, message",
    [
        ("MlpPolicy", "Pendulum-v1", {}, "has no encoder to freeze"),
        ("CnnPolicy", DialEnv(size=48), dict(share_features_extractor=False), "has no effect with NatureCNN"),
    ],
)
def test_warnings_point_at_the_line_of_the_user(policy, env, policy_kwargs, message, tmp_path):
    with pytest.warns(UserWarning, match=message) as caught:
        model = SEERSAC(policy, env, policy_kwargs=policy_kwargs, buffer_size=50, freeze_after=None)
    model.save(tmp_path / "model")
    (tmp_path / "folder.zip").mkdir()
    with pytest.warns(UserWarning, match=message) as caught_again:
        SEERSAC.load(tmp_path / "model")
    with pytest.warns(UserWarning, match="is a folder") as caught_saving:
        model.save(tmp_path / "folder")
    for warning in (*caught, *caught_again, *caught_saving):
        assert warning.filename == __file__

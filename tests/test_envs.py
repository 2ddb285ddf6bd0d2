"""Wrappers of environments, and images of dm_control and MuJoCo. Drawn through EGL, without a display."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack

from sb3_seer.envs import ActionRepeat, DMControlPixels, MujocoPixels, ResizeImages, register_dm_control


class CountingEnv(gym.Env):
    """The observation is the number of the step, each reward is 1, and an episode ends after 10 steps."""

    observation_space = spaces.Box(0, 100, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, terminates: bool = False) -> None:
        self.terminates = terminates

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.t += 1
        done = self.t == 10
        return np.full(1, self.t, np.float32), 1.0, done and self.terminates, done and not self.terminates, {"t": self.t}


@pytest.mark.parametrize("terminates", [False, True])
def test_action_repeat_sums_rewards_and_stops_with_the_episode(terminates: bool) -> None:
    env = ActionRepeat(CountingEnv(terminates), repeat=4)
    env.reset()
    steps = [env.step(0) for _ in range(3)]
    assert [float(obs[0]) for obs, *_ in steps] == [4, 8, 10]
    assert [reward for _, reward, *_ in steps] == [4.0, 4.0, 2.0]
    assert [(terminated, truncated) for *_, terminated, truncated, _ in steps] == [
        (False, False),
        (False, False),
        (terminates, not terminates),
    ]
    assert steps[-1][-1] == {"t": 10}


@pytest.mark.parametrize("repeat", [0, -1, 1.5, "2"])
def test_action_repeat_refuses_other_numbers(repeat: Any) -> None:
    with pytest.raises(ValueError, match="`repeat` must be an integer >= 1, got"):
        ActionRepeat(CountingEnv(), repeat=repeat)


class CameraEnv(CountingEnv):
    """An image that is 10 on its left and 30 on its right, in all channels; alone, or beside a number."""

    def __init__(self, is_dict: bool, n_channels: int) -> None:
        super().__init__()
        self.box = spaces.Box(0, 255, (40, 60, n_channels), np.uint8)
        number = CountingEnv.observation_space
        self.is_dict, self.observation_space = is_dict, spaces.Dict(t=number, camera=self.box) if is_dict else self.box

    def reset(self, **kwargs: Any) -> tuple[Any, dict]:
        return self._see(super().reset(**kwargs)[0]), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        t, *others = super().step(action)
        return self._see(t), *others

    def _see(self, t: np.ndarray) -> Any:
        image = np.full(self.box.shape, 10, np.uint8)
        image[:, 30:] = 30
        return dict(t=t, camera=image) if self.is_dict else image


@pytest.mark.parametrize("n_channels", [3, 9])
@pytest.mark.parametrize("grayscale", [False, True])
@pytest.mark.parametrize("is_dict", [False, True])
def test_images_are_resized_and_other_keys_stay(is_dict: bool, grayscale: bool, n_channels: int) -> None:
    channels = 1 if grayscale else n_channels
    env = ResizeImages(CameraEnv(is_dict, n_channels), height=4, width=2, grayscale=grayscale)
    check_env(env)
    env.reset()
    observation, *_ = env.step(0)
    image = observation["camera"] if is_dict else observation
    assert image.shape == (4, 2, channels)
    assert np.array_equal(image, np.broadcast_to(np.array([[10], [30]], np.uint8), (4, 2, channels)))
    if is_dict:
        assert observation["t"] == [1.0]


def test_channels_first_are_not_resized() -> None:
    env = CameraEnv(False, 3)
    env.observation_space = spaces.Box(0, 255, (4, 64, 64), np.uint8)
    with pytest.raises(ValueError, match="must have their channels last, got Box"):
        ResizeImages(env, height=4, width=4)


def test_without_images_there_is_nothing_to_resize() -> None:
    with pytest.raises(ValueError, match="`env` must have images, got observations of Box"):
        ResizeImages(CountingEnv(), height=4, width=4)


def test_pixels_refuse_another_environment() -> None:
    with pytest.raises(ValueError, match="`env` must be an environment of dm_control, got"):
        DMControlPixels(CountingEnv())


@pytest.mark.parametrize("display, expected", [("", "egl"), (":0", None)])
@pytest.mark.skipif(sys.platform != "linux", reason="Elsewhere dm_control draws without a display as it is")
def test_egl_where_there_is_no_display(display: str, expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISPLAY", display)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setenv("MUJOCO_GL", "")  # so that it is restored
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.delitem(sys.modules, "dm_control", raising=False)
    register_dm_control()
    assert os.environ.get("MUJOCO_GL") == expected


def run(code: str) -> str:
    """Run Python in its own process, and give back what it printed and warned of."""
    result = subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True)
    return result.stdout + result.stderr


def test_importing_changes_no_warnings() -> None:
    code = (
        "import warnings, gymnasium, sb3_seer; filters = list(warnings.filters); import sb3_seer.envs; "
        "print(warnings.filters == filters, 'dm_control/walker-walk-v0' in gymnasium.registry)"
    )
    assert run(code).split() == ["True", "True"]


@pytest.mark.parametrize(
    "failure, warning",
    [
        ("sys.modules['dm_control'] = None", ""),  # it is not installed
        ("os.environ['MUJOCO_GL'] = 'nonsense'", "The environments of dm_control are not registered: RuntimeError"),
    ],
)
def test_without_dm_control_the_other_wrappers_are_there(failure: str, warning: str) -> None:
    output = run(f"import os, sys; {failure}; from sb3_seer.envs import ActionRepeat; print('imported')")
    assert "imported" in output and warning in output
    assert ("Warning" in output) == bool(warning)


@pytest.fixture(scope="module")
def make_env() -> Callable[..., gym.Env]:
    """Makes cartpole-swingup, and nothing that the tests below need may be missing where CI is set."""

    def make(repeat: int = 4, **kwargs: Any) -> DMControlPixels:
        return DMControlPixels(ActionRepeat(gym.make("dm_control/cartpole-swingup-v0", **kwargs), repeat))

    try:
        make().reset()
    except Exception as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"Nothing can be drawn on this machine: {error!r}")
    return make


def test_pixels_are_a_valid_environment_for_sb3(make_env: Callable[..., gym.Env]) -> None:
    env = make_env()
    assert env.observation_space == spaces.Box(0, 255, (100, 100, 3), np.uint8)
    check_env(env, skip_render_check=True)


def test_one_step_is_the_sum_of_the_repeated_ones_and_one_image(
    make_env: Callable[..., gym.Env], monkeypatch: pytest.MonkeyPatch
) -> None:
    env, oracle = make_env(repeat=4), gym.make("dm_control/cartpole-swingup-v0")
    env.reset(seed=1)
    oracle.reset(seed=1)
    physics = env.unwrapped.physics
    n_images = 0
    render = physics.render

    def count(**kwargs: Any) -> np.ndarray:
        nonlocal n_images
        n_images += 1
        return render(**kwargs)

    monkeypatch.setattr(physics, "render", count)
    action = np.array([0.7])
    obs, reward, terminated, truncated, _ = env.step(action)

    rewards = [oracle.step(action)[1] for _ in range(4)]
    expected = oracle.unwrapped.physics.render(height=100, width=100, camera_id=0)
    assert n_images == 1
    assert reward == pytest.approx(sum(rewards), rel=1e-12)
    assert not terminated and not truncated
    np.testing.assert_array_equal(obs, expected)
    assert len(np.unique(obs)) > 10  # there is something to see


def test_the_time_limit_is_a_truncation_and_frames_are_stacked(make_env: Callable[..., gym.Env]) -> None:
    # 1000 steps of the environment: 10 steps of 100
    venv = VecFrameStack(DummyVecEnv([lambda: make_env(repeat=100)]), n_stack=3)
    venv.seed(1)
    observations = [venv.reset()]
    assert observations[0].shape == (1, 100, 100, 9)
    assert not observations[0][..., :6].any()
    for _ in range(9):
        obs, _, dones, _ = venv.step(np.array([[1.0]]))
        assert not dones[0]
        np.testing.assert_array_equal(obs[..., :6], observations[-1][..., 3:])
        observations.append(obs)
    assert not np.array_equal(observations[-1][..., 6:], observations[-2][..., 6:])
    _, _, dones, infos = venv.step(np.array([[1.0]]))
    assert dones[0]
    assert infos[0]["TimeLimit.truncated"]
    assert infos[0]["terminal_observation"].shape == (100, 100, 9)
    venv.close()


def test_the_seed_decides_the_episode(make_env: Callable[..., gym.Env]) -> None:
    def images(seed: int) -> np.ndarray:
        env = make_env()
        first, _ = env.reset(seed=seed)
        return np.stack([first] + [env.step(np.array([0.5]))[0] for _ in range(3)])

    np.testing.assert_array_equal(images(3), images(3))
    assert not np.array_equal(images(3), images(4))


def test_a_video_shows_what_it_shows_without_the_pixels(make_env: Callable[..., gym.Env]) -> None:
    env = make_env(render_mode="rgb_array")
    obs, _ = env.reset(seed=1)
    frame = env.render()
    assert isinstance(frame, np.ndarray)
    assert obs.shape == (100, 100, 3)
    assert frame.shape == (240, 320, 3)


def test_shadows_can_be_left_out():
    env = gym.make("dm_control/cartpole-swingup-v0")
    wrapped = [DMControlPixels(env, height=40, width=40, shadows=shadows) for shadows in (True, False)]
    env.reset(seed=0)
    with_shadows, without = (wrapper.observation(None).astype(int) for wrapper in wrapped)
    # Darker in a few places, and hardly brighter anywhere
    assert (with_shadows - without).min() < -30 and (with_shadows - without).max() < 20
    assert (abs(with_shadows - without) > 8).mean() < 0.05


def test_mujoco_is_seen_as_gymnasium_renders_it(make_env: Callable[..., gym.Env]) -> None:
    camera = dict(distance=0.6, elevation=-90, azimuth=90, lookat=np.zeros(3))
    oracle = gym.make("Reacher-v5", render_mode="rgb_array", width=50, height=40, default_camera_config=camera)
    env = MujocoPixels(gym.make("Reacher-v5"), height=40, width=50, camera={**camera, "lookat": [0, 0, 0]})
    assert env.observation_space == spaces.Box(0, 255, (40, 50, 3), np.uint8)
    images = [env.reset(seed=1)[0]]
    oracle.reset(seed=1)
    expected: list[Any] = [oracle.render()]
    for _ in range(3):
        images.append(env.step(np.array([0.5, -0.5]))[0])
        oracle.step(np.array([0.5, -0.5]))
        expected.append(oracle.render())
    assert len(np.unique(images[0])) > 10  # there is something to see
    assert not np.array_equal(images[0], images[1])  # an image is not overwritten by the next one
    np.testing.assert_array_equal(np.stack(images), np.stack(expected))
    env.close()


def test_mujoco_by_the_name_of_a_camera_and_without_one(make_env: Callable[..., gym.Env]) -> None:
    images = []
    for camera in ("track", 0, None):
        env = MujocoPixels(gym.make("HalfCheetah-v5"), height=40, width=40, camera=camera)
        check_env(env, skip_render_check=True)
        images.append(env.reset(seed=1)[0])
        env.close()
        assert np.array_equal(env.reset(seed=1)[0], images[-1]) and env.camera == camera
        env.close()
    assert np.array_equal(images[0], images[1]) and not np.array_equal(images[0], images[2])


def test_mujoco_shows_the_goal_that_gymnasium_robotics_marks_when_it_renders(make_env: Callable[..., gym.Env]) -> None:
    env = MujocoPixels(gym.make("Reacher-v5"), height=40, width=40, camera=dict(distance=0.6, elevation=-90))
    simulation: Any = env.unwrapped
    unmarked = env.reset(seed=1)[0]
    simulation._render_callback = lambda: simulation.model.geom("target").rgba.__setitem__(slice(3), (0, 1, 0))
    marked = env.reset(seed=1)[0]
    env.close()
    red, green, _ = (marked.astype(int) - unmarked).reshape(-1, 3)[np.any(marked != unmarked, axis=2).ravel()].T
    assert len(red) > 0 and (red < 0).all() and (green > 0).all()


def test_mujoco_pixels_refuse_another_environment() -> None:
    with pytest.raises(ValueError, match="`env` must be a MuJoCo environment of gymnasium, got"):
        MujocoPixels(CountingEnv())

"""What the encoder has learned: the measures, on data whose answer is known, and the commands on a run with checkpoints."""

import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import yaml
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecFrameStack
from torch import nn

from sb3_seer import SEERDQN, SEERSAC, PixelEncoder, PretrainedEncoder, SEERRainbow
from sb3_seer.analysis import AnalysedRun, Episodes, debiased_cka, held_out_r2, plot_similarity, spatial_attention, svcca
from sb3_seer.analysis.__main__ import main
from sb3_seer.analysis.run import feature_maps, latents, layer_samples, newest_frames
from sb3_seer.common.observations import map_parts
from sb3_seer.common.regression import linear_predictability
from tests import dict_helpers
from tests.helpers import ALGORITHMS, DialEnv, LightEnv, TinyEncoder, make_model

# ---- measures ----


def gaussians(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def test_cka_of_equal_and_of_independent_representations() -> None:
    x = gaussians(300, 400)
    rotation, _ = np.linalg.qr(gaussians(400, 400, seed=1))
    assert debiased_cka(x, 3 * x @ rotation + 5) == pytest.approx(1)
    # Biased, it would be 0.57
    assert debiased_cka(x, gaussians(300, 400, seed=2)) == pytest.approx(0, abs=0.02)


def test_cka_is_equation_5_of_its_paper() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 7)) + 3, rng.normal(size=(50, 70))
    y[:, 0] += x[:, 0]
    n, ones = 50, np.ones(50)

    def hsic(k: np.ndarray, other: np.ndarray) -> float:
        middle = (ones @ k @ ones) * (ones @ other @ ones) / ((n - 1) * (n - 2))
        return float(np.trace(k @ other) + middle - 2 / (n - 2) * (ones @ k @ other @ ones)) / (n * (n - 3))

    grams = [z @ z.T - np.diag((z**2).sum(axis=1)) for z in (x - x.mean(axis=0), y - y.mean(axis=0))]
    expected = hsic(*grams) / np.sqrt(hsic(grams[0], grams[0]) * hsic(grams[1], grams[1]))
    assert debiased_cka(x, y) == pytest.approx(expected)


def test_svcca_of_equal_and_of_independent_representations() -> None:
    x = gaussians(2000, 10)
    assert svcca(x, x @ gaussians(10, 10, seed=1) + 5) == pytest.approx(1)
    assert svcca(x, gaussians(2000, 10, seed=2)) < 0.1
    # Half of the directions are the same
    assert svcca(x, np.hstack([x[:, :5], gaussians(2000, 5, seed=2)])) == pytest.approx(0.5, abs=0.05)
    # Directions of little variance do not count
    assert svcca(x, np.hstack([x, 0.01 * gaussians(2000, 10, seed=2)])) == pytest.approx(1)


def test_a_direction_with_most_of_the_variance_decides_cka_but_not_svcca() -> None:
    shared = 30 * gaussians(2000, 1)
    x, y = (np.hstack([shared, gaussians(2000, 20, seed=seed)]) for seed in (1, 2))
    assert debiased_cka(x, y) > 0.95
    assert svcca(x, y, variance=0.9999) < 0.2


def test_a_constant_representation_has_no_similarity() -> None:
    assert np.isnan(debiased_cka(np.ones((20, 3)), gaussians(20, 3)))
    assert np.isnan(svcca(np.ones((20, 3)), gaussians(20, 3)))


def test_attention_is_where_activations_are_large() -> None:
    maps = np.zeros((2, 3, 4, 5))
    maps[0, :, 1, 2], maps[1, 1, 3, 4] = -9.0, 9.0
    attention = spatial_attention(maps)
    np.testing.assert_allclose(attention.sum(axis=(1, 2)), 1)
    assert np.unravel_index(attention[0].argmax(), (4, 5)) == (1, 2)
    np.testing.assert_allclose(attention[1, 3, 4] / attention[1, 0, 0], np.exp(9 / 3))


def test_r2_of_what_latents_have_and_of_what_they_have_not() -> None:
    x = gaussians(400, 50)
    linear = 7 + x @ gaussians(50, 1, seed=1)[:, 0]
    noise = gaussians(400, seed=2)
    half = x[:, 0] + noise  # as much variance again that cannot be read
    r2 = held_out_r2(x, np.stack([linear, half, noise], axis=1))
    assert r2[0] > 0.999
    assert r2[1] == pytest.approx(0.5, abs=0.15)
    assert r2[2] == pytest.approx(0, abs=0.15)


def test_there_is_no_r2_of_what_does_not_vary() -> None:
    x = gaussians(400, 5)
    stops = np.minimum(np.arange(400.0), 250)
    assert np.isnan(held_out_r2(x, np.stack([stops, np.full(400, 0.1)], axis=1))).all()
    assert 0 <= linear_predictability(x, stops[:, None]) <= 1


# ---- a run ----


class LampEnv(gym.Wrapper):
    """Tells which lamp is lit, in ``info``; the innermost environment gives the image."""

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = self.env.step(action)
        lamp = self.get_wrapper_attr("lamp")
        return obs, reward, terminated, truncated, {**info, "lamp": np.array([lamp // 2, lamp % 2]), "constant": 1}


class PixelsOfState(gym.ObservationWrapper):
    """A white bar, as high as an angle of Pendulum says: the state is the observation of the innermost environment."""

    observation_space = gym.spaces.Box(0, 255, (1, 36, 36), np.uint8)

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        image = np.zeros((1, 36, 36), np.uint8)
        image[0, : int(18 * (1 + observation[0]))] = 255
        return image


gym.register("LampWithInfo-v0", lambda **kwargs: LampEnv(LightEnv()))
gym.register("DialWithInfo-v0", lambda **kwargs: LampEnv(DialEnv()))


def make_run(folder: Path, cls: type, env_id: str, n_steps: int = 60, wrapper: type | None = None, **kwargs: Any) -> Path:
    """What ``python -m rl_zoo3.train --save-freq 20`` leaves, as far as it is read."""
    policy_kwargs: dict[str, Any] = dict(
        net_arch=[16], features_extractor_class=TinyEncoder, **kwargs.pop("policy_kwargs", {})
    )
    settings: dict[str, Any] = dict(buffer_size=100, learning_starts=10, batch_size=8, train_freq=1, seed=0, device="cpu")
    env = make_vec_env(env_id, wrapper_class=wrapper)
    model = cls("CnnPolicy", env, policy_kwargs=policy_kwargs, **settings, **kwargs)
    model.learn(n_steps, callback=CheckpointCallback(20, str(folder), name_prefix="rl_model"))
    (folder / env_id).mkdir()
    (folder / env_id / "args.yml").write_text(yaml.dump(OrderedDict(env=env_id, env_kwargs=None)))
    config = OrderedDict(policy="CnnPolicy")
    if wrapper is not None:
        config["env_wrapper"] = f"{wrapper.__module__}.{wrapper.__name__}"
    (folder / env_id / "config.yml").write_text(yaml.dump(config))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Frozen between the second checkpoint and the third."""
    logs = tmp_path_factory.mktemp("logs")
    return make_run(
        logs / "sac_seer" / "DialWithInfo-v0_1", SEERSAC, "DialWithInfo-v0", freeze_after=45, n_steps=80, learning_rate=0.01
    )


def table(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    return [line.split(",") for line in capsys.readouterr().out.splitlines() if "," in line]


def test_a_frozen_layer_is_equal_to_itself(folder: Path) -> None:
    run = AnalysedRun(folder)
    _, (header, *rows) = plot_similarity(run, run.play(100))
    assert header == ("step", "next_step", "layer", "cka", "svcca")
    assert {row[:2] for row in rows} == {(20, 40), (40, 60), (60, 80)}
    # The layers of the critics and of the actor, which shares the convolution, but none of the target
    convolution, names = "critic.features_extractor.trunk.0", {str(row[2]) for row in rows}
    assert {convolution, "critic.features_extractor.projection", "critic.qf0.0", "actor.features_extractor.projection"} < names
    assert not any(name.startswith(("critic_target", "actor.features_extractor.trunk")) for name in names)
    scores = {(row[0], row[2]): row[3:] for row in rows}
    assert scores[60, convolution] == pytest.approx((1, 1), abs=1e-12)
    # What learns changes
    for step, name in ((20, convolution), (60, "critic.qf0.2")):
        cka, _ = scores[step, name]
        assert isinstance(cka, float) and 0 < cka < 1 - 1e-9


def test_similarities_are_drawn_and_printed(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "similarity.png"
    main(["similarity", str(folder), "-n", "20", "-o", str(output)])
    assert output.read_bytes().startswith(b"\x89PNG")
    header, row, *_ = table(capsys)
    assert header == ["step", "next_step", "layer", "cka", "svcca"]
    assert row[:3] == ["20", "40", "critic.features_extractor.trunk.0"]


def test_attention_maps_are_drawn(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "attention.png"
    main(["attention", str(folder), "-n", "20", "-o", str(output), "--layer", "critic.features_extractor.trunk.0"])
    assert output.read_bytes().startswith(b"\x89PNG") and str(output) in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["attention", str(folder), "-n", "20", "--layer", "conv7"])
    assert "`layer` must be one of critic.features_extractor.trunk.0, " in capsys.readouterr().err


def test_the_probe_reads_info(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["probe", str(folder), "-n", "300", "-o", str(tmp_path / "probe.png")])
    rows = table(capsys)[1:]
    assert {row[1] for row in rows} == {"lamp[0]", "lamp[1]"}  # not what is constant
    assert all(float(row[2]) > 0.5 for row in rows)  # a random encoder sees this, too
    main(["probe", str(folder), "-n", "20", "-o", str(tmp_path / "probe.png"), "--quantities", "lamp[1]"])
    assert {row[1] for row in table(capsys)[1:]} == {"lamp[1]"}
    with pytest.raises(SystemExit):
        main(["probe", str(folder), "-n", "20", "--quantities", "lamp[1]", "speed"])
    assert "`quantities` must be among" in (error := capsys.readouterr().err) and "lamp[0], lamp[1], got speed" in error
    for arguments, message in (
        (["probe", str(folder), "-n", "2"], "`--n-steps` must be >= 20, got 2"),
        (["probe", str(folder), "--layer", "conv1"], "`--layer` is only for attention"),
        (["similarity", str(folder), "--quantities", "lamp[0]"], "`--quantities` is only for probe"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err


def test_the_probe_reads_the_state_under_the_pixels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(
        tmp_path / "sac_seer" / "Pendulum-v1_1", SEERSAC, "Pendulum-v1", wrapper=PixelsOfState, n_steps=20, freeze_after=None
    )
    main(["probe", str(folder), "-n", "200", "-o", str(tmp_path / "probe.png")])
    r2 = {row[1]: float(row[2]) for row in table(capsys)[1:]}
    # The cosine is drawn
    assert set(r2) == {"observation[0]", "observation[1]", "observation[2]"}
    assert r2["observation[0]"] > 0.8 > r2["observation[2]"]


def test_samples_are_those_of_the_same_observations_for_each_model(folder: Path) -> None:
    run = AnalysedRun(folder)
    episodes = run.play(70)
    first, again = (layer_samples(run.load(60), episodes) for _ in range(2))
    for name, samples in first.items():
        np.testing.assert_array_equal(samples, again[name])
    frozen, model = layer_samples(run.load(80), episodes), run.load(80)
    projection = frozen["critic.features_extractor.projection"]
    np.testing.assert_allclose(projection, model.encode(episodes.observations)[:, 0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(projection, latents(model, episodes.observations), rtol=1e-4, atol=1e-5)
    assert len(frozen["critic.features_extractor.trunk.0"]) == 2 * 70


@pytest.mark.parametrize("cls, name", [(SEERRainbow, "rainbow_seer"), (DQN, "dqn")])
def test_other_algorithms(cls: type, name: str, tmp_path: Path) -> None:
    run = AnalysedRun(make_run(tmp_path / name / "LampWithInfo-v0_1", cls, "LampWithInfo-v0"))
    episodes = run.play(30)
    _, rows = plot_similarity(run, episodes)
    assert len(rows) > 2
    if cls is SEERRainbow:  # explores with the noise of its layers
        played = run.load(40)
        greedy = np.stack([played.predict(obs, deterministic=True)[0] for obs in episodes.observations])
        assert (greedy != episodes.actions).any()
    model = run.load(40)
    # Layers without their noise
    for samples, again in zip(*(layer_samples(model, episodes).values() for _ in range(2)), strict=True):
        np.testing.assert_array_equal(samples, again)
    assert feature_maps(model, episodes.observations).shape == (30, 8, 4, 4)
    assert latents(model, episodes.observations).shape == (30, 8)


def test_cropped_images_are_shown_as_the_network_sees_them(tmp_path: Path) -> None:
    kwargs: dict[str, Any] = dict(augmentation="random_crop", augmentation_kwargs=dict(size=12))
    run = AnalysedRun(
        make_run(
            tmp_path / "sac_seer" / "DialWithInfo-v0_1", SEERSAC, "DialWithInfo-v0", n_steps=20, freeze_after=None, **kwargs
        )
    )
    model, episodes = run.load(20), run.play(5)
    frames = newest_frames(model, episodes.observations)
    np.testing.assert_array_equal(frames[..., 0], np.asarray(episodes.observations)[:, 0, 2:14, 2:14])


def test_maps_of_a_convolution_are_taken_after_its_relu() -> None:
    policy_kwargs = dict(features_extractor_class=PixelEncoder, net_arch=[16])
    model = SEERSAC("CnnPolicy", DialEnv(size=36), buffer_size=10, policy_kwargs=policy_kwargs, device="cpu")
    maps = feature_maps(model, np.random.default_rng(0).integers(0, 255, (4, 1, 36, 36), dtype=np.uint8))
    assert maps.shape == (4, 32, 11, 11)
    assert maps.min() == 0 < maps.max()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_has_layers_maps_and_latents(algorithm: type) -> None:
    check_layers(make_model(algorithm, freeze_after=None), (16, 16))


def test_an_encoder_in_bfloat16_has_layers_maps_and_latents() -> None:
    check_layers(make_model(SEERDQN, freeze_after=None, policy_kwargs=dict(encoder_dtype="bfloat16")), (16, 16))


def test_of_a_stack_that_is_encoded_frame_by_frame_the_newest_is_shown() -> None:
    module = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 7 * 7, 8))
    policy_kwargs = dict(
        features_extractor_class=PretrainedEncoder,
        features_extractor_kwargs=dict(module=module, mean=[0.0], std=[1.0], n_stack=3),
    )
    env = VecFrameStack(make_vec_env(LightEnv), 3)
    model = SEERDQN("CnnPolicy", env, buffer_size=20, freeze_after=0, policy_kwargs=policy_kwargs, device="cpu")
    observations = np.random.default_rng(0).integers(0, 256, (5, 3, 16, 16), dtype=np.uint8)
    maps = feature_maps(model, observations)
    expected = module[:2](th.as_tensor(observations)[:, -1:] / 255)
    np.testing.assert_allclose(maps, expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("algorithm", [SEERSAC, SEERDQN])
def test_of_dict_observations_the_last_image_is_shown(algorithm: type) -> None:
    check_layers(dict_helpers.make_model(algorithm, freeze_after=None), (20, 20))


def check_layers(model: Any, size: tuple[int, int]) -> None:
    model.policy.set_training_mode(False)
    observations = map_parts(lambda part: np.repeat(part, 6, axis=0), model.get_env().reset())
    actions = np.stack([model.action_space.sample() for _ in range(6)])
    layers = list(layer_samples(model, Episodes(observations, actions, {})))
    assert any(name.endswith("projection") for name in layers) and not any("target" in name for name in layers)
    assert newest_frames(model, observations).shape == (6, *size, 1)
    assert feature_maps(model, observations).shape == (6, 8, size[0] // 4, size[1] // 4)
    np.testing.assert_allclose(latents(model, observations), model.encode(observations)[:, 0], rtol=1e-4, atol=1e-5)


def test_packages_that_make_the_environment_known_are_imported(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lamps.py").write_text(
        "import gymnasium as gym\ngiven = []\nmake = gym.spec('DialWithInfo-v0').entry_point\n"
        "gym.register('Lamp-v3', lambda **kwargs: (given.append(kwargs), make())[1])"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    mine = tmp_path / "sac_seer" / "Lamp-v3_1"
    (mine / "Lamp-v3").mkdir(parents=True)
    (mine / "rl_model_20_steps.zip").symlink_to(folder / "rl_model_20_steps.zip")
    config = yaml.load((folder / "DialWithInfo-v0" / "config.yml").read_text(), Loader=yaml.UnsafeLoader)
    (mine / "Lamp-v3" / "config.yml").write_text(yaml.dump(OrderedDict(config, env_kwargs=dict(brightness=2))))
    args = OrderedDict(env="Lamp-v3", env_kwargs=None, gym_packages=["lamps"])
    (mine / "Lamp-v3" / "args.yml").write_text(yaml.dump(args))
    assert len(AnalysedRun(mine).play(5).actions) == 5
    assert sys.modules["lamps"].given[0]["brightness"] == 2  # as in the file of hyperparameters


# ---- bad input ----


def test_episodes_of_one_step_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gym.register("OneStep-v0", LightEnv, kwargs=dict(length=1))
    run = make_run(tmp_path / "dqn_seer" / "OneStep-v0_1", SEERDQN, "OneStep-v0", freeze_after=30)
    with pytest.raises(SystemExit):
        main(["similarity", str(run), "-n", "20"])
    assert "Episodes of OneStep-v0 must have more than one step" in capsys.readouterr().err


def test_without_images_there_are_no_frames() -> None:
    model = DQN("MlpPolicy", "CartPole-v1", buffer_size=10, device="cpu")
    with pytest.raises(ValueError, match="`observations` must have images, got Box"):
        newest_frames(model, np.zeros((2, 4), np.float32))


def test_an_on_policy_algorithm_is_refused() -> None:
    model = PPO("CnnPolicy", LightEnv(), policy_kwargs=dict(features_extractor_class=TinyEncoder), device="cpu")
    with pytest.raises(ValueError, match="`model` must be an off-policy algorithm, got PPO"):
        latents(model, np.zeros((2, *LightEnv().observation_space.shape), np.uint8))


def test_runs_that_cannot_be_analysed(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refuses(path: Path, message: str, what: str = "probe") -> None:
        with pytest.raises(SystemExit):
            main([what, str(path), "-n", "20"])
        assert message in capsys.readouterr().err

    refuses(
        tmp_path / "nowhere", f"{tmp_path}/nowhere has no checkpoints (rl_model_<steps>_steps.zip). Train with --save-freq"
    )
    mine = tmp_path / "mine" / "DialWithInfo-v0_1"
    mine.mkdir(parents=True)
    (mine / "rl_model_20_steps.zip").symlink_to(folder / "rl_model_20_steps.zip")
    refuses(mine, "must be one of")
    known = mine.parent.rename(tmp_path / "sac_seer") / mine.name
    refuses(known, "with DialWithInfo-v0/args.yml")
    (known / "DialWithInfo-v0").symlink_to(folder / "DialWithInfo-v0")
    refuses(known, "must have two checkpoints or more, got one, of step 20", "similarity")

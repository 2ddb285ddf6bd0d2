"""What a replay buffer holds after the freeze, as a data set for models that are trained offline."""

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from torch.utils.data import DataLoader

from sb3_seer import SEERDQN, SEERSAC
from tests import dict_helpers
from tests.helpers import DialEnv, LightEnv, make_model


@pytest.mark.parametrize("wraps", [False, True])
def test_items_are_the_transitions_of_each_env_in_their_order(wraps):
    """The oracle: what was given to add()."""
    env = make_vec_env(LightEnv, n_envs=2, seed=0, env_kwargs=dict(terminates=True))
    model = make_model(SEERDQN, env=env, freeze_after=None, buffer_size=60 if wraps else 400, learning_starts=1000)
    buffer, added = model.replay_buffer, []
    add = buffer.add
    buffer.add = lambda obs, next_obs, action, reward, done, infos: (
        added.append([np.copy(part) for part in (obs, next_obs, action, reward, done)]),
        add(obs, next_obs, action, reward, done, infos),
    )
    model.learn(90)
    with pytest.warns(UserWarning, match="before its first gradient step"):
        model.freeze_encoder()
    model.learn(30, reset_num_timesteps=False)

    dataset = buffer.latents_dataset()
    held = added[-buffer.size() :]
    assert len(dataset) == 2 * len(held) == 2 * (45 if wraps else 60)
    for env_index in range(2):
        for step, (obs, next_obs, action, reward, done) in enumerate(held):
            item = dataset[env_index * len(held) + step]
            for name, images in (("latents", obs), ("next_latents", next_obs)):
                th.testing.assert_close(item[name], model.encode(images[env_index])[:, None][0], rtol=1e-4, atol=1e-5)
            assert item["actions"].item() == action[env_index] and item["rewards"].item() == reward[env_index]
            assert item["dones"].item() == done[env_index] and item["timeouts"].item() == 0
            is_last = step == len(held) - 1
            assert item["continues"].item() == (not done[env_index] and not is_last)
    assert th.equal(dataset[-1]["latents"], dataset[len(dataset) - 1]["latents"])
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_a_loader_makes_batches_of_all_copies_and_keys():
    kwargs = dict(augmentation="random_shift", augmentation_kwargs=dict(pad=1), n_augmentations=3, latent_dtype="uint8")
    model = dict_helpers.make_model(SEERSAC, freeze_after=30, **kwargs).learn(40)
    batch = next(iter(DataLoader(model.replay_buffer.latents_dataset(), batch_size=16, shuffle=True)))
    assert batch["latents"].shape == batch["next_latents"].shape == (16, 3, 2, 8)
    assert batch["latents"].dtype == th.float32
    assert batch["actions"].shape == (16, 2) and batch["rewards"].shape == batch["timeouts"].shape == (16,)
    assert batch["vector_obs"]["vector"].shape == batch["next_vector_obs"]["vector"].shape == (16, 2)


def test_images_are_refused():
    model = make_model(SEERSAC, env=DialEnv(), freeze_after=None).learn(20)
    with pytest.raises(ValueError, match="must hold latents, got 20 transitions in the stage 'images'"):
        model.replay_buffer.latents_dataset()

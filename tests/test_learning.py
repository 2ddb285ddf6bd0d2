"""
Learning is the final test: agents learn from pixels through the freeze, and go on learning after it. Rainbow's is in
``test_rainbow.py``, CURL's in ``test_curl.py``.

An episode is worth 2.5 (LightEnv) or 0 (DialEnv) to an agent that does not look, and 10 to one that does; of PuckEnv, 14 to
one that sees no velocity and 47 to one that does.
"""

from typing import Any

import numpy as np
import pytest
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import VecFrameStack

from sb3_seer import SEERDQN, SEERQRDQN, SEERSAC, SEERTD3, SEERTQC, SEERCrossQ
from tests.helpers import DialEnv, LightEnv, PuckEnv, TinyEncoder, is_continuous, make_puck_model

# The last step at which a freeze finds half-trained heads, and where the run ends
FREEZE_AFTER, TOTAL_TIMESTEPS = 700, 2000


class EvaluateAtFreeze(BaseCallback):
    """Evaluates once, just before the freeze."""

    mean_return: float | None = None

    def __init__(self, env: Any) -> None:
        super().__init__()
        self.eval_env = env

    def _on_step(self) -> bool:
        if self.num_timesteps == FREEZE_AFTER:
            assert not self.model.encoder_frozen
            self.mean_return = mean_return(self.model, self.eval_env)
        return True


def mean_return(model, env) -> float:
    return evaluate_policy(model, env, n_eval_episodes=20)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "algorithm, latent_dtype",
    [
        *((algorithm, "float32") for algorithm in (SEERSAC, SEERTD3, SEERTQC, SEERCrossQ, SEERQRDQN, SEERDQN)),
        *((algorithm, "uint8") for algorithm in (SEERSAC, SEERDQN)),
    ],
)
def test_learns_through_the_freeze(algorithm, latent_dtype):
    env_class = DialEnv if is_continuous(algorithm) else LightEnv
    env = Monitor(env_class())
    env.reset(seed=1)
    kwargs: dict[str, Any] = dict(learning_rate=1e-3, batch_size=32, gamma=0.5, learning_starts=100)
    if algorithm is SEERTD3:
        kwargs.update(action_noise=NormalActionNoise(np.zeros(2), np.full(2, 0.3)))
    elif is_continuous(algorithm):
        kwargs.update(ent_coef="auto_0.1")
    else:
        kwargs.update(train_freq=1, target_update_interval=100, exploration_fraction=0.2)
    policy_kwargs: dict[str, Any] = dict(features_extractor_class=TinyEncoder, net_arch=[64])
    if algorithm is SEERQRDQN:
        policy_kwargs["n_quantiles"] = 20
    model = algorithm(
        "CnnPolicy",
        env_class(),
        buffer_size=1000,
        freeze_after=FREEZE_AFTER,
        augmentation="random_shift",
        augmentation_kwargs=dict(pad=1),
        n_augmentations=2,
        latent_dtype=latent_dtype,
        policy_kwargs=policy_kwargs,
        seed=0,
        device="cpu",
        **kwargs,
    )
    evaluation = EvaluateAtFreeze(env)
    model.learn(TOTAL_TIMESTEPS, callback=evaluation)
    final = mean_return(model, env)
    print(algorithm.__name__, latent_dtype, evaluation.mean_return, final)
    assert model.encoder_frozen
    # More than the buffer held before the freeze, in the same bytes
    assert model.replay_buffer.size() == TOTAL_TIMESTEPS
    assert evaluation.mean_return > 4
    assert final > 8.5
    assert final > evaluation.mean_return - 0.5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The encoder is frozen at step 200, before its first gradient step")
@pytest.mark.parametrize("freeze_after, total_timesteps", [(800, 1500), (200, 1000)])
def test_control_needs_an_encoder_that_has_learned_velocities(freeze_after, total_timesteps):
    """The settings of ``hyperparams/sac_seer.yml`` in small. An encoder that is frozen before its first update is no good."""
    learning_starts = 200
    env = VecFrameStack(make_vec_env(PuckEnv, seed=0), 2)
    model = make_puck_model(env, buffer_size=freeze_after, freeze_after=freeze_after, learning_starts=learning_starts)
    model.learn(total_timesteps)
    final = mean_return(model, VecFrameStack(make_vec_env(PuckEnv, seed=50), 2))
    print(freeze_after, final)
    assert model.encoder_frozen
    if freeze_after == learning_starts:
        assert final < 20
    else:
        assert final > 35

from typing import Any, SupportsFloat

import gymnasium as gym
from gymnasium.core import ActType, ObsType


class ActionRepeat(gym.Wrapper[ObsType, ActType, ObsType, ActType], gym.utils.RecordConstructorArgs):
    """
    Take each action several times, and sum the rewards. An episode that ends in the middle of it ends there.

    Unlike SB3's ``MaxAndSkipEnv`` it returns the last observation as it is, whatever its type.

    :param env: environment to wrap
    :param repeat: how often to take each action
    :raises ValueError: if ``repeat`` is not an integer >= 1
    """

    def __init__(self, env: gym.Env[ObsType, ActType], repeat: int) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, repeat=repeat)
        super().__init__(env)
        if not isinstance(repeat, int) or repeat < 1:
            raise ValueError(f"`repeat` must be an integer >= 1, got {repeat!r}")
        self.repeat = repeat

    def step(self, action: ActType) -> tuple[ObsType, SupportsFloat, bool, bool, dict[str, Any]]:
        total_reward = 0.0
        for _ in range(self.repeat):
            observation, reward, terminated, truncated, info = self.env.step(action)
            total_reward += float(reward)
            if terminated or truncated:
                break
        return observation, total_reward, terminated, truncated, info

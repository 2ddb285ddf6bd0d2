from sb3_seer.envs.dmc import DMControlPixels, register_dm_control
from sb3_seer.envs.wrappers import ActionRepeat

__all__ = ["ActionRepeat", "DMControlPixels", "register_dm_control"]

# So that gym.make("dm_control/...") works: shimmy's ids are only there once shimmy is imported, which takes a second
register_dm_control()

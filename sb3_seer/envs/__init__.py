import warnings

from sb3_seer.envs.dmc import DMControlPixels, register_dm_control
from sb3_seer.envs.mujoco import MujocoPixels
from sb3_seer.envs.wrappers import ActionRepeat, ResizeImages

__all__ = ["ActionRepeat", "DMControlPixels", "MujocoPixels", "ResizeImages", "register_dm_control"]

# So that gym.make("dm_control/...") works
try:
    register_dm_control()
except ModuleNotFoundError:
    pass  # the extra "dmc" is not installed
except Exception as error:
    warnings.warn(f"The environments of dm_control are not registered: {error!r}", stacklevel=2)

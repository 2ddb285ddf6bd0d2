from sb3_seer.rainbow.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_seer.rainbow.rainbow import Rainbow
from sb3_seer.rainbow.seer_rainbow import SEERRainbow

__all__ = ["CnnPolicy", "MlpPolicy", "MultiInputPolicy", "Rainbow", "SEERRainbow"]

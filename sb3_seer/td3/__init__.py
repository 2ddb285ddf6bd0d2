from sb3_seer.td3.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_seer.td3.td3 import SEERTD3

__all__ = ["SEERTD3", "CnnPolicy", "MlpPolicy", "MultiInputPolicy"]

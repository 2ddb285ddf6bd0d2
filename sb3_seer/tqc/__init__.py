from sb3_seer.tqc.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_seer.tqc.tqc import SEERTQC

__all__ = ["SEERTQC", "CnnPolicy", "MlpPolicy", "MultiInputPolicy"]

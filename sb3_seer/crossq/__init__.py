from sb3_seer.crossq.crossq import SEERCrossQ
from sb3_seer.crossq.policies import CnnPolicy, MlpPolicy, MultiInputPolicy

__all__ = ["CnnPolicy", "MlpPolicy", "MultiInputPolicy", "SEERCrossQ"]

from sb3_seer.curl.curl import SEERCURL
from sb3_seer.curl.policies import CnnPolicy, MlpPolicy, MultiInputPolicy

__all__ = ["SEERCURL", "CnnPolicy", "MlpPolicy", "MultiInputPolicy"]

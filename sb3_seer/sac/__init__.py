from sb3_seer.sac.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_seer.sac.sac import SEERSAC

__all__ = ["SEERSAC", "CnnPolicy", "MlpPolicy", "MultiInputPolicy"]

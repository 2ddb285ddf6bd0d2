from sb3_seer.dqn.dqn import SEERDQN
from sb3_seer.dqn.policies import CnnPolicy, MlpPolicy, MultiInputPolicy

__all__ = ["SEERDQN", "CnnPolicy", "MlpPolicy", "MultiInputPolicy"]

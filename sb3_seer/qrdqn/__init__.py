from sb3_seer.qrdqn.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_seer.qrdqn.qrdqn import SEERQRDQN

__all__ = ["SEERQRDQN", "CnnPolicy", "MlpPolicy", "MultiInputPolicy"]

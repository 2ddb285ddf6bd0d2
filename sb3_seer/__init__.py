from sb3_seer.common.callbacks import FreezeEncoderCallback
from sb3_seer.common.cameras import MultiCameraEncoder
from sb3_seer.common.encoders import DataEfficientCNN, ImpalaCNN, PixelEncoder
from sb3_seer.common.extractors import SplitExtractor
from sb3_seer.common.pretrained import PretrainedEncoder
from sb3_seer.common.priorities import PrioritizedReplayBuffer
from sb3_seer.common.replay import LatentReplayBuffer
from sb3_seer.crossq import SEERCrossQ
from sb3_seer.curl import SEERCURL
from sb3_seer.dqn import SEERDQN
from sb3_seer.qrdqn import SEERQRDQN
from sb3_seer.rainbow import Rainbow, SEERRainbow
from sb3_seer.sac import SEERSAC
from sb3_seer.td3 import SEERTD3
from sb3_seer.tqc import SEERTQC

__version__ = "0.2.0"

__all__ = [
    "SEERCURL",
    "SEERDQN",
    "SEERQRDQN",
    "SEERSAC",
    "SEERTD3",
    "SEERTQC",
    "DataEfficientCNN",
    "FreezeEncoderCallback",
    "ImpalaCNN",
    "LatentReplayBuffer",
    "MultiCameraEncoder",
    "PixelEncoder",
    "PretrainedEncoder",
    "PrioritizedReplayBuffer",
    "Rainbow",
    "SEERCrossQ",
    "SEERRainbow",
    "SplitExtractor",
    "__version__",
]

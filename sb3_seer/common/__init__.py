import sys

from sb3_seer.common import encoding

# Models that version 0.1.0 saved after the freeze have a LatentCodec from here
sys.modules[f"{__name__}.codec"] = encoding

"""What a SEER algorithm asks of its arguments, beyond what SB3 does."""

from typing import Any

from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import CombinedExtractor

from sb3_seer.common.extractors import can_split
from sb3_seer.common.observations import image_spaces
from sb3_seer.common.policies import SEERPolicy
from sb3_seer.common.replay import LatentReplayBuffer
from sb3_seer.common.transfer import PRETRAINED_PARTS


def missing_encoder(policy_class: type[BasePolicy], space: spaces.Space, policy_kwargs: dict[str, Any]) -> str | None:
    """
    :param policy_class: class of the policy
    :param space: of the observations
    :param policy_kwargs: arguments of the policy
    :return: why there is no encoder to freeze, what comes of it, and what would have one; None if there is one
    """
    advice = "To store latents, there must be images."
    if not issubclass(policy_class, SEERPolicy):
        reason = f"with the policy {policy_class.__module__}.{policy_class.__name__}"
        advice = "To store latents, there must be images, and a policy that encodes them: CnnPolicy or MultiInputPolicy."
    elif isinstance(space, spaces.Dict) and not image_spaces(space):
        reason = f"in observations of {space}"
    elif not can_split(extractor := policy_kwargs.get("features_extractor_class", CombinedExtractor), space):
        reason = f"in a {extractor.__name__}, which does not tell images from the other keys"
        advice = "Use SB3's CombinedExtractor, or write a SplitExtractor, to store latents."
    else:
        return None
    return f"{reason}: it trains as the SB3 class does. {advice}"


def check_arguments(model: Any) -> None:
    """
    :param model: a SEER algorithm with an encoder, before its policy and its buffer are made
    :raises ValueError: for arguments that do not go together with images
    """
    policy, space, buffer_class = model.policy_class.__name__, model.observation_space, model.replay_buffer_class
    images = image_spaces(space)
    if not images:
        raise ValueError(f"{policy} needs images (a Box of 3 dimensions), not observations of {space}")
    normalize = model.get_vec_normalize_env()
    if normalize is not None and normalize.norm_obs and (set(images) & set(normalize.norm_obs_keys or images)):
        allowed = f"norm_obs_keys without {', '.join(images)}" if isinstance(space, spaces.Dict) else "norm_obs=False"
        raise ValueError(f"VecNormalize(norm_obs=True) cannot be used with images: use VecNormalize(env, {allowed})")
    if normalize is not None:
        inner = image_spaces(normalize.observation_space)
        if any(key not in inner or inner[key].shape != box.shape for key, box in images.items()):
            given, wanted = (
                ", ".join(f"{box.shape} under {key!r}" if key else str(box.shape) for key, box in boxes.items())
                for boxes in (inner, images)
            )
            raise ValueError(
                f"VecNormalize(env) was given where env has images of {given}, not yet of {wanted}: give VecNormalize an env "
                "that has its wrappers already, such as VecTransposeImage and VecFrameStack"
            )
    if buffer_class not in (None, LatentReplayBuffer):
        given = getattr(buffer_class, "__name__", repr(buffer_class))
        raise ValueError(f"replay_buffer_class must be LatentReplayBuffer or None with {policy}, not {given}")
    if model.pretrained_part not in PRETRAINED_PARTS:
        allowed = " or ".join(map(repr, PRETRAINED_PARTS))
        raise ValueError(f"pretrained_part must be {allowed}, not {model.pretrained_part!r}")
    if model.freeze_after == 0 and model.latent_dtype == "uint8" and not model.encoder_frozen:
        raise ValueError(
            'latent_dtype="uint8" is fitted on the observations that are stored at the freeze, and freeze_after=0 leaves '
            'none: allowed with it are "float32" and "float16"'
        )

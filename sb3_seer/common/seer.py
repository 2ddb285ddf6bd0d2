"""SEERMixin turns an SB3 off-policy algorithm into a SEER one."""

import pathlib
import time
from functools import partial
from typing import Any

import psutil
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import CombinedExtractor
from stable_baselines3.common.type_aliases import MaybeCallback
from torch import nn

from sb3_seer.common.augmentations import make_augmentation
from sb3_seer.common.auto_freeze import AutoFreeze
from sb3_seer.common.buffer_file import load_buffer, warn_of_other_sizes
from sb3_seer.common.callbacks import FreezeEncoderCallback, check_freeze_after, has_callback
from sb3_seer.common.encoding import LatentCodec
from sb3_seer.common.extractors import can_split
from sb3_seer.common.flops import FlopsCallback, find_passes
from sb3_seer.common.observations import check_images_are_not_normalized, find_n_stack, image_spaces
from sb3_seer.common.off_policy import OffPolicyMixin
from sb3_seer.common.policies import SEERPolicy
from sb3_seer.common.priorities import PrioritizedReplayBuffer, is_prioritized
from sb3_seer.common.process import multiplies_bfloat16, return_freed_memory
from sb3_seer.common.replay import LatentReplayBuffer
from sb3_seer.common.save_util import PathOrFile
from sb3_seer.common.transfer import PRETRAINED_PARTS, load_pretrained
from sb3_seer.common.type_aliases import Observations
from sb3_seer.common.utils import check_positive_int, warn

# What to suggest in place of another replay buffer, by a part of its class name
OTHER_BUFFERS = {
    "NStep": "For n-step returns, set n_steps",
    "Prioritized": "For priorities, set replay_buffer_kwargs=dict(prioritized=True)",
    "Her": "For hindsight experience replay, use the SB3 algorithm",
}


class SEERMixin(OffPolicyMixin):
    """
    Stored Embeddings for Efficient Reinforcement Learning (SEER), on top of an SB3 off-policy algorithm.

    Paper: Chen et al. 2021, https://arxiv.org/abs/2103.02886, Algorithm 1.

    While the encoder learns, the replay buffer holds images. At step T_f (``freeze_after``) the encoder is frozen,
    every stored image becomes K latents in place, and the same bytes hold more transitions. From then on
    a gradient step never touches a convolution, and each step of the environments runs the encoder once (once more at the
    start of an episode, to act).

    Of ``Dict`` observations (``MultiInputPolicy``), the images become latents and the other keys stay as they are.
    Without images (``MlpPolicy``) there is no encoder: the algorithm trains as the SB3 class, and warns once.

    :param args: as for the SB3 class
    :param freeze_after: T_f: an integer number of steps, a float fraction in (0, 1] of ``learn()``, ``"auto"`` (experimental)
        for once the encoder has settled (:class:`~sb3_seer.common.auto_freeze.AutoFreeze`), or None for never.
        To train in several calls of ``learn()``, give a number of steps
    :param n_augmentations: K, stored copies of each observation, each augmented differently
        (1 without augmentation)
    :param augmentation: ``"random_crop"``, ``"random_shift"``, a module from images ``(batch_size, channels, H, W)``
        to images, or None. Images are augmented when they are sampled. Where nothing is augmented (acting, evaluation),
        an image larger than the augmented ones is cropped to its middle
    :param augmentation_kwargs: arguments of the named augmentation: ``dict(size=84)``, ``dict(pad=4)``
    :param latent_dtype: dtype of a stored number: ``"float32"``, ``"float16"`` or ``"uint8"``
    :param max_latent_buffer_size: most transitions held as latents, None for as many as fit
    :param batch_size_after_freeze: takes the place of ``batch_size`` at the freeze, None to keep it
    :param gradient_steps_after_freeze: takes the place of ``gradient_steps`` at the freeze, None to keep it
    :param pretrained_encoder: path of a saved model of this algorithm or another, frozen or not, to take the initial encoder
        from (section 5.4 of the paper). With ``freeze_after=0`` the encoder never learns and images are never stored.
        The file is read when a new model is made, not when a saved one is loaded
    :param pretrained_part: ``"encoder"`` for the part that a freeze takes, as in the paper across domains, or ``"policy"``
        for all networks, as in the paper for another task of the same domain
    :param kwargs: as for the SB3 class. With images, ``replay_buffer_class`` must be ``LatentReplayBuffer``, a subclass, or
        None, and ``optimize_memory_usage`` has no effect: an observation is always stored once
    :raises ValueError: for an invalid parameter; if a latent is larger than the image that it replaces; for a
        ``VecNormalize`` that normalises images; for a pretrained model of another architecture
    :raises FileNotFoundError: if there is no pretrained model at the path
    """

    policy: Any  # a SEERPolicy with images
    replay_buffer: Any  # a LatentReplayBuffer with images

    def __init__(
        self,
        *args: Any,
        freeze_after: int | float | str | None = 0.2,
        n_augmentations: int = 1,
        augmentation: str | nn.Module | None = None,
        augmentation_kwargs: dict[str, Any] | None = None,
        latent_dtype: str = "float32",
        max_latent_buffer_size: int | None = None,
        batch_size_after_freeze: int | None = None,
        gradient_steps_after_freeze: int | None = None,
        pretrained_encoder: str | pathlib.Path | None = None,
        pretrained_part: str = "encoder",
        **kwargs: Any,
    ) -> None:
        self.freeze_after = freeze_after
        self.n_augmentations = n_augmentations
        self.augmentation = augmentation
        self.augmentation_kwargs = augmentation_kwargs
        self.latent_dtype = latent_dtype
        self.max_latent_buffer_size = max_latent_buffer_size
        self.batch_size_after_freeze = batch_size_after_freeze
        self.gradient_steps_after_freeze = gradient_steps_after_freeze
        self.pretrained_encoder = pretrained_encoder
        self.pretrained_part = pretrained_part
        self._pretrained = False  # whether pretrained_encoder is loaded
        self._is_new = True  # False in a model that is loaded, whose weights are the saved ones
        self.encoder_frozen = False
        self.freeze_seconds = 0.0  # how long the freeze took
        self.auto_freeze: AutoFreeze | None = None  # from the first step to the freeze, with freeze_after="auto"
        self.n_stack = 1
        # With the range of uint8 latents. Saved with the model, which may be loaded without its buffer
        self._latent_codec: LatentCodec | None = None
        super().__init__(*args, **kwargs)

    # ---- setup ----

    def _setup_model(self) -> None:
        self.freeze_after = check_freeze_after(self.freeze_after)
        why_not = self._why_no_encoder()
        if why_not is not None:
            self._set_up_without_encoder(why_not)
            return
        self._check_arguments()
        if self.env is not None:
            self.n_stack = find_n_stack(self.env)
        self.optimize_memory_usage = False
        if self.replay_buffer is None:
            self.replay_buffer = self._make_replay_buffer(self._make_augmentation())
        self.replay_buffer_class = type(self.replay_buffer)
        # The policy needs image_size, which the user's policy_kwargs must not keep
        policy_kwargs = {key: value for key, value in self.policy_kwargs.items() if key != "image_size"}
        image_size = self.replay_buffer.encoder.image_size
        self.policy_kwargs = {**policy_kwargs, "image_size": image_size} if image_size else policy_kwargs
        super()._setup_model()
        self.policy_kwargs = policy_kwargs
        self.policy.check_latent_dim()
        if self.policy.encoder_dtype == "bfloat16" and self.device.type == "cpu" and not multiplies_bfloat16():
            warn('encoder_dtype="bfloat16" is several times slower than "float32" on a CPU without instructions for it')
        if self.pretrained_encoder is not None and self._is_new:
            load_pretrained(self.policy, self.pretrained_encoder, self.pretrained_part)
            self._pretrained = True
        elif self.pretrained_encoder is not None and not self._pretrained:
            warn(
                f"pretrained_encoder={str(self.pretrained_encoder)!r} has no effect: a loaded model keeps its weights. "
                "To start from that file, make a new model"
            )
        self._is_new = False

        self._check_priorities()
        self.replay_buffer.set_encoder(self.policy)
        if self.freeze_after is not None:
            self.replay_buffer.plan().check_capacity()
        if self.env is not None:  # without, it will only predict
            self._announce_memory()
        if self.encoder_frozen:
            for name in ("batch_size", "gradient_steps"):
                given, after = getattr(self, name), getattr(self, f"{name}_after_freeze")
                if after is not None and given != after:
                    warn(f"{name}={given} has no effect: the encoder is frozen, and {name}_after_freeze={after} replaces it")
            if isinstance(self.freeze_after, int) and self.freeze_after > self.num_timesteps:
                warn(f"freeze_after={self.freeze_after} has no effect: the encoder is frozen already")
            self._freeze()

    def _why_no_encoder(self) -> str | None:
        """:return: the end of the warning that there is no encoder, None if there is one"""
        space = self.observation_space
        if not issubclass(self.policy_class, SEERPolicy):
            remedy = "use images, and CnnPolicy or MultiInputPolicy"
            if image_spaces(space):
                remedy = (
                    'make a new model with the name "CnnPolicy" or "MultiInputPolicy" as policy. To start from a model that '
                    "SB3 saved, add pretrained_encoder=<its file>"
                )
            return f"with the policy {self.policy_class.__module__}.{self.policy_class.__name__}. To store latents, {remedy}"
        if isinstance(space, spaces.Dict) and not image_spaces(space):
            return f"with observations of {space}. To store latents, use images"
        extractor_class = self.policy_kwargs.get("features_extractor_class", CombinedExtractor)
        if not can_split(extractor_class, space):
            return (
                f"with the features extractor {extractor_class.__name__}, which may mix images with other keys. "
                "To store latents, use SB3's CombinedExtractor, or a SplitExtractor"
            )
        return None

    def _set_up_without_encoder(self, why_not: str) -> None:
        if self.freeze_after == "auto":
            raise ValueError(f'`freeze_after` must not be "auto" where there is no encoder to freeze, got "auto" {why_not}')
        warn(
            f"{type(self).__name__} has no encoder to freeze {why_not}. The agent trains as the SB3 class. "
            "Only the parameters of the SB3 class have an effect"
        )
        for name in ("pretrained_encoder", "batch_size_after_freeze", "gradient_steps_after_freeze"):
            if getattr(self, name) is not None:
                raise ValueError(f"`{name}` must be None where there is no encoder to freeze, got {getattr(self, name)!r}")
        if issubclass(self.policy_class, SEERPolicy):
            # The SB3 class that it extends
            bases = (base for base in self.policy_class.__mro__ if issubclass(base, BasePolicy))
            self.policy_class = next(base for base in bases if not issubclass(base, SEERPolicy))
        super()._setup_model()
        self._check_priorities()
        if isinstance(self.replay_buffer, PrioritizedReplayBuffer) and "gamma" not in self.replay_buffer_kwargs:
            self.replay_buffer.gamma = self.gamma

    def _check_priorities(self) -> None:
        """:raises ValueError: for a prioritised replay buffer, if the updates have no weights and no priorities"""
        if is_prioritized(self.replay_buffer) and not getattr(self, "uses_priorities", False):
            raise ValueError(
                f"`replay_buffer_class` and `replay_buffer_kwargs` must be without priorities, got "
                f"{type(self.replay_buffer).__name__}: the updates of {type(self).__name__} do not use them"
            )

    def _check_arguments(self) -> None:
        """:raises ValueError: for arguments that are not allowed with images"""
        policy, images = self.policy_class.__name__, image_spaces(self.observation_space)
        if not images:
            raise ValueError(
                f"`observation_space` must have images (a Box of 3 dimensions) with {policy}, got {self.observation_space}"
            )
        self._check_vec_normalize(images)
        check_positive_int("n_augmentations", self.n_augmentations)
        for name, value in self.replay_buffer_kwargs.items():
            if name != "n_stack" and name in vars(self) and vars(self)[name] != value:
                raise ValueError(
                    f"`{name}` of replay_buffer_kwargs must be {vars(self)[name]!r}, as in this algorithm, got {value!r}"
                )
        buffer_class = self.replay_buffer_class
        if buffer_class is not None and not (isinstance(buffer_class, type) and issubclass(buffer_class, LatentReplayBuffer)):
            name = getattr(buffer_class, "__name__", repr(buffer_class))
            remedies = [remedy for part, remedy in OTHER_BUFFERS.items() if part in name]
            message = f"`replay_buffer_class` must be LatentReplayBuffer, a subclass, or None with {policy}, got {name}"
            raise ValueError(". ".join([message, *remedies]))
        if self.pretrained_part not in PRETRAINED_PARTS:
            allowed = " or ".join(map(repr, PRETRAINED_PARTS))
            raise ValueError(f"`pretrained_part` must be {allowed}, got {self.pretrained_part!r}")
        if self.pretrained_part != "encoder" and self.pretrained_encoder is None:
            warn(f"pretrained_part={self.pretrained_part!r} has no effect without a pretrained_encoder")
        if self.freeze_after == 0 and self.latent_dtype == "uint8" and not self.encoder_frozen:
            raise ValueError(
                '`latent_dtype` must be "float32" or "float16" with freeze_after=0, got "uint8": its range is fitted on the '
                "observations that are stored at the freeze"
            )
        check_positive_int("batch_size_after_freeze", self.batch_size_after_freeze, None)
        check_positive_int("gradient_steps_after_freeze", self.gradient_steps_after_freeze, None, -1)

    def _check_vec_normalize(self, images: dict[str, spaces.Box]) -> None:
        """:raises ValueError: for a ``VecNormalize`` of images, or one inside of wrappers that change images"""
        env = self.get_vec_normalize_env()
        check_images_are_not_normalized(env, images)
        if env is None:
            return
        inner = image_spaces(env.observation_space)
        if any(key not in inner or inner[key].shape != box.shape for key, box in images.items()):
            given, wanted = (
                ", ".join(f"{box.shape} under {key!r}" if key else str(box.shape) for key, box in boxes.items())
                for boxes in (inner, images)
            )
            raise ValueError(
                f"VecNormalize must wrap images of {wanted}, got {given}. Give it an env that has its wrappers already, such "
                "as VecTransposeImage and VecFrameStack"
            )

    def _make_augmentation(self) -> nn.Module | None:
        augmentation = make_augmentation(self.augmentation, self.augmentation_kwargs)
        return None if augmentation is None else augmentation.to(self.device)

    def _make_replay_buffer(self, augmentation: nn.Module | None, **overrides: Any) -> LatentReplayBuffer:
        kwargs = dict(
            buffer_size=self.buffer_size,
            device=self.device,
            n_envs=self.n_envs,
            n_steps=self.n_steps,
            gamma=self.gamma,
            n_stack=self.n_stack,
            n_augmentations=self.n_augmentations,
            latent_dtype=self.latent_dtype,
            max_latent_buffer_size=self.max_latent_buffer_size,
        )
        kwargs |= self.replay_buffer_kwargs | overrides
        buffer_class: Any = self.replay_buffer_class or LatentReplayBuffer
        buffer: LatentReplayBuffer = buffer_class(
            observation_space=self.observation_space, action_space=self.action_space, augmentation=augmentation, **kwargs
        )
        if buffer.priorities is not None:
            buffer.priorities.progress_remaining = self._current_progress_remaining
        if self._latent_codec is not None and self._latent_codec.dtype == self.latent_dtype:
            buffer.encoder.codec = self._latent_codec
        return buffer

    def _announce_memory(self) -> None:
        """Print the memory that the replay buffer will take, and warn if there is not as much."""
        plan = self.replay_buffer.plan()
        if self.verbose >= 1:
            print(plan)
        available = psutil.virtual_memory().available
        if plan.total_bytes > available:
            warn(
                "This system does not have apparently enough memory to store the complete "
                f"replay buffer {plan.total_bytes / 1e9:.2f}GB > {available / 1e9:.2f}GB"
            )

    # ---- the freeze ----

    def freeze_encoder(self) -> None:
        """
        Freeze the encoder now, and turn the images of the replay buffer into latents. A second call does nothing.

        :raises ValueError: if the policy has no encoder; if a latent is larger than the image that it replaces
        """
        self._check_has_encoder()
        if self.encoder_frozen:
            return
        self.replay_buffer.set_encoder(self.policy)  # the buffer of a copied model has no encoder
        networks = self.policy.encoder_networks
        is_trained = self._pretrained or all(getattr(net.features_extractor, "is_trained", False) for net in networks)
        if self._n_updates == 0 and not is_trained:
            warn(
                f"The encoder is frozen at step {self.num_timesteps}, before its first gradient step: "
                f"freeze_after should be larger than learning_starts={self.learning_starts}"
            )
        self._freeze()

    def _freeze(self) -> None:
        start = time.perf_counter()
        # The conversion may be interrupted, so it comes first. An encoder gives the same latents before and after it is frozen
        self.replay_buffer.to_latents()
        self.policy.freeze_encoder()
        self._latent_codec = self.replay_buffer.encoder.codec
        self.encoder_frozen, self.auto_freeze = True, None
        # learn() reads both before each update
        if self.batch_size_after_freeze is not None:
            self.batch_size = int(self.batch_size_after_freeze)
        if self.gradient_steps_after_freeze is not None:
            self.gradient_steps = int(self.gradient_steps_after_freeze)
        return_freed_memory()  # no gradient step will need as much again
        self.freeze_seconds = time.perf_counter() - start

    def encode(self, observations: Observations) -> th.Tensor:
        """
        Encode observations without augmentation: larger images are cropped to their middle.

        :param observations: one observation of the environment, or a batch
        :return: float32 latents, shape ``(batch_size, N, L)``
        :raises ValueError: if the policy has no encoder
        """
        self._check_has_encoder()
        return self.policy.encode_observations(observations)

    def _check_has_encoder(self) -> None:
        if not isinstance(self.policy, SEERPolicy):
            raise ValueError(f"{type(self.policy).__name__} has no encoder to freeze: use CnnPolicy with images")

    # ---- learning ----

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        # torch.compile(policy) wraps it, which makes no difference: its networks are called one by one
        self.policy = getattr(self.policy, "_orig_mod", self.policy)
        if isinstance(self.policy, SEERPolicy):
            for name, module in (*self.policy.named_children(), *vars(self).items()):
                if isinstance(module, nn.Module) and hasattr(module, "_orig_mod"):
                    raise ValueError(f"`{name}` must not be the result of torch.compile(). Use {name}.compile(), in place")
            self._check_vec_normalize(image_spaces(self.observation_space))  # set_env() may have brought another
            if not isinstance(self.replay_buffer, LatentReplayBuffer):
                raise ValueError(
                    f"`replay_buffer` must be a LatentReplayBuffer, got {type(self.replay_buffer).__name__}. "
                    "load_replay_buffer() turns one of SB3, saved as a file, into it"
                )
            self._check_latents()
            self.replay_buffer.set_encoder(self.policy)  # the buffer of a copied model has no encoder
            if self.encoder_frozen:
                self.replay_buffer.to_latents()  # one that was put in its place may hold images
        return super()._setup_learn(*args, **kwargs)

    def _check_latents(self) -> None:
        """:raises ValueError: if the replay buffer was filled, or its range of uint8 fitted, with another encoder"""
        buffer, ours = self.replay_buffer, self.policy.encoder_fingerprint()
        if buffer.stage == "latents" and buffer.size() > 0 and buffer.encoder_fingerprint != ours:
            raise ValueError(
                f"The replay buffer holds latents of encoder {buffer.encoder_fingerprint}, but the weights are of encoder "
                f"{ours}. Call replay_buffer.reset() to go on with another encoder"
            )
        codec = buffer.encoder.codec
        fitted_on = None if codec is None else codec.encoder_fingerprint
        if fitted_on not in (None, ours):
            raise ValueError(
                f"The range of latent_dtype={self.latent_dtype!r} was fitted on encoder {fitted_on}, but the weights are of "
                "another one. load() the model that has these weights, or use float latents"
            )
        self.policy.has_loaded_weights = False

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        if isinstance(callback, BaseCallback):
            callback = [callback]
        elif not isinstance(callback, list):
            callback = [] if callback is None else [ConvertCallback(callback)]
        has_encoder = isinstance(self.policy, SEERPolicy)
        if self.freeze_after is not None and has_encoder and not has_callback(callback, FreezeEncoderCallback):
            callback = [*callback, FreezeEncoderCallback(self.freeze_after, verbose=self.verbose)]
        if has_encoder and find_passes(self) is not None and not has_callback(callback, FlopsCallback):
            callback = [*callback, FlopsCallback()]
        return super()._init_callback(callback, progress_bar)

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """The updates of the SB3 class. A policy whose networks share convolutions encodes each batch before them."""
        encode_batch = getattr(self.policy, "encode_batch", None)
        if encode_batch is None:
            super().train(gradient_steps, batch_size)
            return
        self.replay_buffer.encode_batch = encode_batch
        try:
            super().train(gradient_steps, batch_size)
        finally:
            self.replay_buffer.encode_batch = None

    def _update_learning_rate(self, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer) -> None:
        super()._update_learning_rate(optimizers)
        if getattr(self.policy, "has_loaded_weights", False):
            self._check_latents()

    def dump_logs(self) -> None:
        """Write log data, and what the replay buffer holds under ``seer/``."""
        buffer = self.replay_buffer
        if isinstance(buffer, LatentReplayBuffer):
            buffer.check_extra_frames()
            self.logger.record("seer/encoder_frozen", int(self.encoder_frozen))
            self.logger.record("seer/transitions", buffer.size() * self.n_envs)
            self.logger.record("seer/capacity", buffer.buffer_size * self.n_envs)
            self.logger.record("seer/bytes", buffer.nbytes)
            self.logger.record("seer/extra_bytes", buffer.extra_bytes)
            # Numbers of latents outside the range of latent_dtype, so far
            self.logger.record("seer/clipped", buffer.encoder.n_clipped)
        super().dump_logs()

    # ---- loading ----

    def load_replay_buffer(self, path: PathOrFile, truncate_last_traj: bool = True) -> None:
        """
        Load a replay buffer. If the encoder is frozen, stored images become latents.

        :param path: path to a replay buffer that ``save_replay_buffer`` wrote, or that the SB3 class pickled
        :param truncate_last_traj: no effect with images: the last trajectory counts as truncated unless it is continued
        :raises ValueError: if the file is damaged or of a later version; if the buffer is of another kind or shape, holds
            the latents of another encoder, or holds latents while this model's encoder still learns. The model keeps
            the buffer that it had
        """
        policy = self.policy if isinstance(self.policy, SEERPolicy) else None
        if policy is None and not issubclass(self.replay_buffer_class or ReplayBuffer, LatentReplayBuffer):
            super().load_replay_buffer(path, truncate_last_traj)
            return
        ours = getattr(self, "replay_buffer", None)  # users drop it to free its memory
        augmentation = self._make_augmentation() if ours is None else ours.encoder.augmentation
        make_buffer = partial(self._make_replay_buffer, augmentation)
        replay_buffer = load_buffer(path, make_buffer, policy, self.encoder_frozen, self.verbose)
        warn_of_other_sizes(path, make_buffer(), replay_buffer)
        if self.encoder_frozen:
            replay_buffer.to_latents()
        if policy is not None and self.freeze_after is not None:
            replay_buffer.plan().check_capacity()
        self.replay_buffer = replay_buffer

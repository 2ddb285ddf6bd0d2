"""SEERMixin turns an SB3 off-policy algorithm into a SEER one."""

import pathlib
import warnings
from typing import Any

import psutil
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import MaybeCallback
from torch import nn

from sb3_seer.common.augmentations import make_augmentation
from sb3_seer.common.callbacks import FreezeEncoderCallback, check_freeze_after, has_callback
from sb3_seer.common.checks import check_arguments, missing_encoder
from sb3_seer.common.encoding import LatentCodec
from sb3_seer.common.flops import FlopsCallback, find_passes
from sb3_seer.common.memory import MemoryPlan
from sb3_seer.common.observations import find_n_stack
from sb3_seer.common.policies import SEERPolicy
from sb3_seer.common.priorities import is_prioritized
from sb3_seer.common.process import return_freed_memory, zero_subnormals
from sb3_seer.common.replay import LatentReplayBuffer
from sb3_seer.common.seer_saving import SEERSaving
from sb3_seer.common.transfer import load_pretrained
from sb3_seer.common.type_aliases import Observations


class SEERMixin(SEERSaving):
    """
    Stored Embeddings for Efficient Reinforcement Learning (SEER), on top of an SB3 off-policy algorithm.

    Paper: Chen et al. 2021, https://arxiv.org/abs/2103.02886, Algorithm 1.

    While the encoder learns, the replay buffer holds images. At step T_f (``freeze_after``) the encoder is frozen,
    every stored image becomes K latents in place, and the same bytes hold more transitions. From then on
    a gradient step never touches a convolution, and each step of the environments runs the encoder once.

    Of ``Dict`` observations (``MultiInputPolicy``), the images become latents and the other keys stay as they are.
    Without images (``MlpPolicy``) there is nothing to freeze: the algorithm is then that of the SB3 class, and says so once.

    :param args: as for the SB3 class
    :param freeze_after: T_f: an integer number of steps, a float fraction in (0, 1] of ``learn()``, or None for never.
        A fraction is one of each call: give a number of steps to train in several
    :param n_augmentations: K, stored copies of each observation, each with an augmentation of its own
        (1 without augmentation)
    :param augmentation: ``"random_crop"``, ``"random_shift"``, a module from images ``(batch_size, channels, H, W)``
        to images, or None. A batch of images is augmented once when it is sampled; where nothing is augmented
        (acting, evaluation) an image larger than the augmented ones is cropped to its middle
    :param augmentation_kwargs: arguments of the named augmentation: ``dict(size=84)``, ``dict(pad=4)``
    :param latent_dtype: how a stored number is held: ``"float32"``, ``"float16"`` or ``"uint8"``
    :param max_latent_buffer_size: the most transitions to hold once they are latents, None for as many as fit
    :param pretrained_encoder: path of a saved model to start with the encoder of (section 5.4 of the paper): of this
        algorithm or another, frozen or not. With ``freeze_after=0`` the encoder never learns and images are never stored.
        Read once, when the model is made: a saved and loaded model does not need the file
    :param pretrained_part: ``"encoder"`` for what a freeze takes, as in the paper across domains, or ``"policy"`` for the
        weights of all networks, as in the paper for another task of the same domain
    :param kwargs: as for the SB3 class. ``replay_buffer_class`` must be ``LatentReplayBuffer`` or None with images;
        ``optimize_memory_usage`` is always on with them, and needs no other setting
    :raises ValueError: for a parameter outside of what is said here; when a latent is larger than the image that
        it replaces; for a ``VecNormalize`` that normalises images; for a pre-trained model of another architecture
    :raises FileNotFoundError: if there is no pre-trained model at the path
    """

    policy: Any  # a SEERPolicy if there is an encoder to freeze
    replay_buffer: LatentReplayBuffer | None

    def __init__(
        self,
        *args: Any,
        freeze_after: int | float | None = 0.2,
        n_augmentations: int = 1,
        augmentation: str | nn.Module | None = None,
        augmentation_kwargs: dict[str, Any] | None = None,
        latent_dtype: str = "float32",
        max_latent_buffer_size: int | None = None,
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
        self.pretrained_encoder = pretrained_encoder
        self.pretrained_part = pretrained_part
        self._pretrained = False  # whether that is loaded
        self.encoder_frozen = False
        self.n_stack: int | None = None
        # What uint8 latents mean: saved with the model, which may go on without its buffer
        self._latent_codec: LatentCodec | None = None
        super().__init__(*args, **kwargs)

    def _setup_model(self) -> None:
        self.freeze_after = check_freeze_after(self.freeze_after)
        if not self._has_encoder():
            if self.pretrained_encoder is not None:
                raise ValueError(f"pretrained_encoder must be None where there is no encoder, not {self.pretrained_encoder!r}")
            super()._setup_model()
            return

        self._check_arguments()
        if self.env is not None:
            self.n_stack = find_n_stack(self.env)
        augmentation = make_augmentation(self.augmentation, self.augmentation_kwargs)
        if augmentation is not None:
            augmentation.to(self.device)
        # Always so: an observation is stored once
        self.optimize_memory_usage = False
        if self.replay_buffer is None:
            self.replay_buffer = self._make_replay_buffer(augmentation)
        policy_kwargs, n_steps = self.policy_kwargs, self.n_steps
        self.policy_kwargs = {
            **policy_kwargs,
            "image_size": self.replay_buffer.encoder.image_size,
        }
        # The buffer knows its n_steps already: SB3 would warn of them, and has none for Dict observations
        self.replay_buffer_class, self.n_steps = LatentReplayBuffer, 1
        super()._setup_model()
        # What is saved is what was given
        self.policy_kwargs, self.n_steps = policy_kwargs, n_steps
        if self.pretrained_encoder is not None and not self._pretrained:
            load_pretrained(self.policy, self.pretrained_encoder, self.pretrained_part)
            self._pretrained = True

        self.replay_buffer.set_encoder(self.policy)
        if self.freeze_after is not None or self.encoder_frozen:
            self.replay_buffer.check_capacity()
        if self.env is not None:  # without, it will only predict
            self._announce(self.replay_buffer.plan())
        if self.encoder_frozen:
            if self._latent_codec is not None and self._latent_codec.dtype == self.latent_dtype:
                self.replay_buffer.encoder.codec = self._latent_codec
            self._freeze()

    def _announce(self, plan: MemoryPlan) -> None:
        """Say how much memory the replay buffer will take, and warn if there is not as much."""
        if self.verbose >= 1:
            print(plan)
        available = psutil.virtual_memory().available
        if plan.total_bytes > available:
            warnings.warn(
                "This system does not have apparently enough memory to store the complete "
                f"replay buffer {plan.total_bytes / 1e9:.2f}GB > {available / 1e9:.2f}GB",
                stacklevel=4,
            )

    def _has_encoder(self) -> bool:
        """:return: whether there is an encoder to freeze; if not, says so and makes sure that the policy is SB3's"""
        why_not = missing_encoder(self.policy_class, self.observation_space, self.policy_kwargs)
        if why_not is None:
            return True
        warnings.warn(f"{type(self).__name__} has no encoder to freeze {why_not}", stacklevel=3)
        if issubclass(self.policy_class, SEERPolicy):
            bases = (base for base in self.policy_class.__mro__ if issubclass(base, BasePolicy))
            self.policy_class = next(base for base in bases if not issubclass(base, SEERPolicy))
        return False

    def _check_arguments(self) -> None:
        """:raises ValueError: for arguments that do not go together with images"""
        check_arguments(self)

    def _make_replay_buffer(self, augmentation: nn.Module | None, **overrides: Any) -> LatentReplayBuffer:
        kwargs: dict[str, Any] = dict(
            buffer_size=self.buffer_size, n_steps=self.n_steps, gamma=self.gamma, n_stack=self.n_stack or 1
        )
        buffer = LatentReplayBuffer(
            observation_space=self.observation_space,
            action_space=self.action_space,
            device=self.device,
            n_envs=self.n_envs,
            n_augmentations=self.n_augmentations,
            augmentation=augmentation,
            latent_dtype=self.latent_dtype,
            max_latent_buffer_size=self.max_latent_buffer_size,
            **{**kwargs, **self.replay_buffer_kwargs, **overrides},
        )
        if buffer.priorities is not None:
            buffer.priorities.progress_remaining = self._current_progress_remaining
        return buffer

    def freeze_encoder(self) -> None:
        """
        Freeze the encoder now, and turn the images of the replay buffer into latents. A second call does nothing.

        :raises ValueError: if the policy has no encoder; if a latent is larger than the image that it replaces
        """
        replay_buffer = self._latent_buffer()
        if self.encoder_frozen:
            return
        replay_buffer.check_capacity()
        if self._n_updates == 0 and not self._pretrained:
            warnings.warn(
                f"The encoder is frozen at step {self.num_timesteps}, before its first gradient step: "
                f"freeze_after should be larger than learning_starts={self.learning_starts}",
                stacklevel=2,
            )
        self._freeze()

    def _freeze(self) -> None:
        assert self.replay_buffer is not None
        # First what can be interrupted. An encoder gives the same latents before and after it is frozen
        self.replay_buffer.set_encoder(self.policy)
        self.replay_buffer.to_latents()
        self.policy.freeze_encoder()
        self._latent_codec = self.replay_buffer.encoder.codec
        self.encoder_frozen = True
        return_freed_memory()  # no gradient step will need as much again

    def _latent_buffer(self) -> LatentReplayBuffer:
        """
        :return: the replay buffer
        :raises ValueError: if there is no encoder, so it is no buffer for latents
        """
        if not isinstance(self.replay_buffer, LatentReplayBuffer):
            raise ValueError(f"{type(self.policy).__name__} has no encoder to freeze: use CnnPolicy with images")
        return self.replay_buffer

    def encode(self, observations: Observations) -> th.Tensor:
        """
        What the encoder says of observations of the environment, without augmentation: larger images are cropped
        to their middle.

        :param observations: one observation, or a batch of them
        :return: float32 latents, shape ``(batch_size, N, L)``
        :raises ValueError: if the policy has no encoder
        """
        self._latent_buffer()
        return self.policy.encode_observations(observations)

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        super()._update_current_progress_remaining(num_timesteps, total_timesteps)
        replay_buffer: Any = self.replay_buffer
        if is_prioritized(replay_buffer):
            replay_buffer.priorities.progress_remaining = self._current_progress_remaining

    def _update_learning_rate(self, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer) -> None:
        super()._update_learning_rate(optimizers)
        zero_subnormals(self, optimizers)  # each train() begins with this call

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        if isinstance(self.replay_buffer, LatentReplayBuffer):
            self.replay_buffer.set_encoder(self.policy)  # a copy of the model has a buffer without
        return super()._setup_learn(*args, **kwargs)

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        if isinstance(callback, BaseCallback):
            callback = [callback]
        elif not isinstance(callback, list):
            callback = [] if callback is None else [ConvertCallback(callback)]
        has_encoder = isinstance(self.replay_buffer, LatentReplayBuffer)
        if self.freeze_after is not None and has_encoder and not has_callback(callback, FreezeEncoderCallback):
            callback = [*callback, FreezeEncoderCallback(self.freeze_after, verbose=self.verbose)]
        if has_encoder and find_passes(self) is not None and not has_callback(callback, FlopsCallback):
            callback = [*callback, FlopsCallback()]
        return super()._init_callback(callback, progress_bar)

    def dump_logs(self) -> None:
        """Write log data, with what the replay buffer holds under ``seer/``."""
        if isinstance(self.replay_buffer, LatentReplayBuffer):
            self.replay_buffer.check_extra_frames()
            self.logger.record("seer/encoder_frozen", int(self.encoder_frozen))
            self.logger.record("seer/transitions", self.replay_buffer.size() * self.n_envs)
            self.logger.record("seer/capacity", self.replay_buffer.buffer_size * self.n_envs)
            self.logger.record("seer/bytes", self.replay_buffer.nbytes)
            self.logger.record("seer/extra_bytes", self.replay_buffer.extra_bytes)
            # Numbers of latents outside the range of latent_dtype, so far
            self.logger.record("seer/clipped", self.replay_buffer.encoder.n_clipped)
        super().dump_logs()

from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.utils import ConstantSchedule
from stable_baselines3.dqn import DQN
from torch.nn import functional as F

from sb3_seer.common.buffer_file import load_buffer, warn_of_other_sizes
from sb3_seer.common.observations import check_images_are_not_normalized, find_n_stack, image_spaces
from sb3_seer.common.off_policy import OffPolicyMixin
from sb3_seer.common.priorities import PrioritizedReplayBuffer, PrioritizedReplayBufferSamples
from sb3_seer.common.q_learning import WeightedUpdates
from sb3_seer.common.replay import LatentReplayBuffer
from sb3_seer.common.save_util import PathOrFile
from sb3_seer.common.utils import check_bool
from sb3_seer.rainbow.categorical import categorical_projection
from sb3_seer.rainbow.policies import CnnPolicy, MlpPolicy, MultiInputPolicy, RainbowNetwork, RainbowPolicy


class Rainbow(OffPolicyMixin, WeightedUpdates, DQN):
    """
    Rainbow: DQN with double Q-learning, dueling networks, value distributions (C51), noisy layers, n-step returns and,
    if wanted, prioritised replay.

    Paper: Hessel et al. 2018, https://arxiv.org/abs/1710.02298. Code: https://github.com/Kaixhin/Rainbow, and what the
    authors of SEER (https://arxiv.org/abs/2103.02886) made of it. Each part can be switched off:

    =======================  ==============================================================
    double Q-learning        ``double_q=False``
    dueling networks         ``policy_kwargs=dict(dueling=False)``
    value distributions      ``policy_kwargs=dict(n_atoms=1)``: values, and the Huber loss
    noisy layers             ``policy_kwargs=dict(noisy=False)``: epsilon-greedy exploration
    n-step returns           ``n_steps=1``
    prioritised replay       ``prioritized_replay=False``, as by default
    =======================  ==============================================================

    Without all of them it is SB3's :class:`~stable_baselines3.dqn.DQN`. The defaults of these parts are the paper's
    (except for the priorities, which data-efficient Rainbow in SEER does not use), all others are the defaults of ``DQN``.
    ``hyperparams/rainbow.yml`` has the settings of data-efficient Rainbow.

    Noise is drawn before each action that is not deterministic (the same for all envs), and before each update: once
    for the online network, whose values of the current and of the next observations share it, and once for the target
    network. ``predict(deterministic=True)`` has no noise, and no epsilon (0.001 in the code). In the code, an update has the
    noise of the action before it; here it draws its own, as in the paper of noisy networks
    (https://arxiv.org/abs/1706.10295, Algorithm 1), so that several updates in a row do not share it.

    Differences from the code: a window does not bootstrap if the episode terminates in it (in the code, also if it terminates
    in the step after it), windows end at the write head of the replay buffer, and one Adam optimizes all weights (in the code,
    one each for convolutions and linear layers, which is the same). The error of a prioritised transition is the
    cross-entropy, as in the code: the paper's KL divergence plus the entropy of the target.

    All parameters of ``DQN``, and these:

    :param args: as for ``DQN``
    :param n_steps: steps of the n-step returns. Of SB3's replay buffers, the one for ``Dict`` observations has 1 only.
    :param double_q: whether the online network chooses the action of which the target network gives the value
    :param prioritized_replay: whether to sample by priority, with the exponents ``alpha`` (0.5, as in the paper) and ``beta``
        (0.4, 1 at the end of the training) of ``replay_buffer_kwargs``
    :param kwargs: as for ``DQN``. With ``replay_buffer_class=LatentReplayBuffer`` images take a fraction of the memory; it and
        ``PrioritizedReplayBuffer`` are given ``n_steps`` and ``gamma``, and the number of stacked frames is found in the
        wrappers. ``exploration_*`` have no effect with noisy layers. ``policy_kwargs``: see
        :class:`~sb3_seer.rainbow.policies.RainbowPolicy`
    :raises ValueError: for an invalid parameter; for priorities that the replay buffer does not support; for n-step returns
        of ``Dict`` observations. (SB3 warns of any other replay buffer without n-step returns.)
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    q_net: RainbowNetwork
    q_net_target: RainbowNetwork
    policy: RainbowPolicy

    def __init__(
        self, *args: Any, n_steps: int = 3, double_q: bool = True, prioritized_replay: bool = False, **kwargs: Any
    ) -> None:
        check_bool("double_q", double_q)
        check_bool("prioritized_replay", prioritized_replay)
        self.double_q = double_q
        self.prioritized_replay = prioritized_replay
        self.n_stack = 1
        super().__init__(*args, n_steps=n_steps, **kwargs)  # type: ignore[misc]  # not among the positional ones

    def _setup_model(self) -> None:
        # What is saved is what was given, not what follows from n_steps and prioritized_replay: load() may change them
        given = self.replay_buffer_class
        if self.replay_buffer is None:
            self._setup_replay_buffer()
        super()._setup_model()
        self.replay_buffer_class = given
        if self.policy.q_net.noisy:
            self.exploration_schedule = ConstantSchedule(0.0)

    def _setup_replay_buffer(self) -> None:
        """
        Make the replay buffer if its class takes ``n_steps``. SB3 makes any other.

        :raises ValueError: for priorities that the replay buffer does not support; for n-step returns of ``Dict`` observations
        """
        buffer_class = self.replay_buffer_class
        if buffer_class is None and self.prioritized_replay:
            buffer_class = PrioritizedReplayBuffer
        elif buffer_class is None and self.n_steps > 1:
            buffer_class = NStepReplayBuffer
        if buffer_class is None:
            return
        takes_images = issubclass(buffer_class, LatentReplayBuffer)
        if self.prioritized_replay and not issubclass(buffer_class, (PrioritizedReplayBuffer, LatentReplayBuffer)):
            raise ValueError(
                "`replay_buffer_class` must be PrioritizedReplayBuffer, LatentReplayBuffer or None with "
                f"prioritized_replay=True, got {buffer_class.__name__}"
            )
        if not issubclass(buffer_class, (NStepReplayBuffer, PrioritizedReplayBuffer, LatentReplayBuffer)):
            return
        if isinstance(self.observation_space, spaces.Dict) and not takes_images:
            raise ValueError(
                f"`n_steps` must be 1 and `prioritized_replay` False with Dict observations, got {self.n_steps} and "
                f"{self.prioritized_replay}. With images among them, LatentReplayBuffer has both"
            )
        if takes_images and self.env is not None:
            check_images_are_not_normalized(self.get_vec_normalize_env(), image_spaces(self.observation_space))
            self.n_stack = find_n_stack(self.env)
        if takes_images:  # with True, SB3 would end an episode where each learn() begins
            self.optimize_memory_usage = False
        self.replay_buffer_class = buffer_class
        self.replay_buffer = self._new_replay_buffer()

    def _new_replay_buffer(self, **overrides: Any) -> Any:
        """:return: an empty replay buffer of ``replay_buffer_class``, which takes ``n_steps``"""
        buffer_class: Any = self.replay_buffer_class
        kwargs = dict(
            buffer_size=self.buffer_size,
            device=self.device,
            n_envs=self.n_envs,
            optimize_memory_usage=self.optimize_memory_usage,
            n_steps=self.n_steps,
            gamma=self.gamma,
        )
        if issubclass(buffer_class, LatentReplayBuffer):
            kwargs["n_stack"] = self.n_stack
        kwargs |= self._priority_kwargs(buffer_class) | self.replay_buffer_kwargs | overrides
        return buffer_class(observation_space=self.observation_space, action_space=self.action_space, **kwargs)

    def _priority_kwargs(self, buffer_class: type[ReplayBuffer]) -> dict[str, Any]:
        """:return: arguments of a replay buffer of this class that follow from ``prioritized_replay``"""
        if not self.prioritized_replay:
            return {}
        kwargs: dict[str, Any] = dict(alpha=0.5)
        if issubclass(buffer_class, LatentReplayBuffer):
            kwargs["prioritized"] = True
        return kwargs

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        """
        Sample the replay buffer and do the updates (gradient descent), with the weights of the transitions if the replay
        buffer is prioritised.

        :param gradient_steps: number of gradient steps
        :param batch_size: transitions in a batch
        """
        self._train_on_losses(gradient_steps, batch_size)

    def _losses(self, batch: ReplayBufferSamples | PrioritizedReplayBufferSamples) -> tuple[th.Tensor, th.Tensor]:
        discounts = batch.discounts if batch.discounts is not None else self.gamma
        discounts = (1 - batch.dones) * discounts  # [batch_size, 1]
        online, target = self.q_net, self.q_net_target
        online.reset_noise()
        target.reset_noise()
        features = online.extract_features(batch.observations, online.features_extractor)
        with th.no_grad():
            next_features = target.extract_features(batch.next_observations, target.features_extractor)
            next_logits = target.logits(next_features)  # [batch_size, n_actions, n_atoms]
        if self.double_q:
            with th.no_grad():
                next_features = online.extract_features(batch.next_observations, online.features_extractor)
            # In one pass: adding noise to the weights takes as long as using them
            logits, choice = online.logits(th.cat((features, next_features))).chunk(2)
        else:
            logits, choice = online.logits(features), next_logits
        logits = gather_actions(logits, batch.actions.long().squeeze(dim=1))  # [batch_size, n_atoms]
        next_logits = gather_actions(next_logits, online.q_values(choice.detach()).argmax(dim=1))

        if online.n_atoms == 1:
            target_q_values = batch.rewards + discounts * next_logits  # [batch_size, 1]
            losses = F.smooth_l1_loss(logits, target_q_values, reduction="none")
            return losses.squeeze(dim=1), (target_q_values - logits).abs().squeeze(dim=1)
        next_values = batch.rewards + discounts * online.support  # [batch_size, n_atoms]
        target_probabilities = categorical_projection(next_logits.softmax(dim=1), next_values, online.support)
        losses = F.cross_entropy(logits, target_probabilities, reduction="none")
        return losses, losses

    def load_replay_buffer(self, path: PathOrFile, truncate_last_traj: bool = True) -> None:
        """
        Load a replay buffer.

        :param path: path to a replay buffer that ``save_replay_buffer`` wrote
        :param truncate_last_traj: no effect, as in SB3 without hindsight
        :raises ValueError: if a ``LatentReplayBuffer``'s file is damaged, of another shape, or holds latents
        """
        buffer_class = self.replay_buffer_class
        if buffer_class is not None and issubclass(buffer_class, LatentReplayBuffer):
            self.replay_buffer = load_buffer(path, self._new_replay_buffer, None, False, self.verbose)
            warn_of_other_sizes(path, self._new_replay_buffer(), self.replay_buffer)
        else:
            super().load_replay_buffer(path, truncate_last_traj)


def gather_actions(logits: th.Tensor, actions: th.Tensor) -> th.Tensor:
    """
    :param logits: shape ``(batch_size, n_actions, n_atoms)``
    :param actions: shape ``(batch_size,)``
    :return: logits of these actions, shape ``(batch_size, n_atoms)``
    """
    return logits[th.arange(len(actions), device=actions.device), actions]

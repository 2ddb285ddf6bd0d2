"""An oracle for the replay buffer: a list of whole transitions, searched naively."""

import pickle
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from torch import nn

from sb3_seer.common.buffer_file import load_buffer, save_buffer
from sb3_seer.common.observations import crop_to_middle, map_parts
from sb3_seer.common.replay import LatentReplayBuffer
from sb3_seer.common.type_aliases import Latents

Step = dict[str, Any]

GAMMA = 0.5


class Stream:
    """
    The transitions of one environment of small random images, with every way in which an episode can end.

    :param rng: source of all that is random
    :param n_stack: frames in an observation
    :param padding: the frames before the first of an episode: "zeros", "repeat" (of the first frame), or
        "broken" (no observation is the last one moved on by a frame)
    :param frame_shape: (channels, height, width) of a frame
    :param dtype: of the images
    """

    def __init__(
        self,
        rng: np.random.RandomState,
        n_stack: int,
        padding: str,
        frame_shape: tuple[int, int, int] = (2, 6, 6),
        dtype: str = "uint8",
    ):
        self.rng, self.n_stack, self.padding = rng, n_stack, padding
        self.frame_shape, self.dtype = frame_shape, dtype
        # Resets that no done announces; stacks that are not the last one moved on
        self.reset_unannounced = self.break_stacks = True
        self.obs = self.reset()

    def frame(self) -> np.ndarray:
        # Half of the frames come from a few only, so that neighbours are often equal
        if self.rng.rand() < 0.5:
            return np.full(self.frame_shape, self.rng.randint(2), dtype=self.dtype)
        return self.rng.randint(0, 256, size=self.frame_shape).astype(self.dtype)

    def reset(self) -> np.ndarray:
        frame = self.frame()
        before = [np.zeros_like(frame) if self.padding == "zeros" else frame] * (self.n_stack - 1)
        return np.concatenate([*before, frame])

    def next(self) -> np.ndarray:
        # Now and then a stack is not the last one moved on, whatever the padding
        if self.padding == "broken" or (self.break_stacks and self.rng.rand() < 0.03):
            return np.concatenate([self.frame() for _ in range(self.n_stack)])
        return np.concatenate([self.obs[self.frame_shape[0] :], self.frame()])

    def step(self) -> Step:
        """:return: a transition; an episode may end in it, or be left after it without any sign"""
        event = self.rng.rand()
        step = dict(obs=self.obs, next_obs=self.next(), reward=np.float32(self.rng.randint(1, 9)))
        step["done"] = event < 0.2
        # A time limit as some wrappers say it too: without a done
        step["timeout"] = event < 0.1 or 0.2 < event < 0.22
        self.obs = step["next_obs"]
        if step["done"]:
            self.obs = self.reset()
        elif event > 0.95 and self.reset_unannounced:
            self.obs = self.reset()
        return step


class DictStream(Stream):
    """Two images of different sizes and dtypes, and three other keys."""

    def __init__(self, rng: np.random.RandomState, n_stack: int, padding: str, dtype: str):
        self.images = dict(
            image=Stream(rng, n_stack, padding, (1, 6, 6)),
            map=Stream(rng, n_stack, padding, (2, 7, 5), dtype),
        )
        super().__init__(rng, n_stack, padding)

    def observe(self) -> Any:
        return dict(
            {key: stream.obs for key, stream in self.images.items()},
            vector=self.rng.randn(2),
            level=np.int64(self.rng.randint(3)),
            flags=self.rng.randint(2, size=4).astype(np.int8),
        )

    def reset(self) -> Any:
        # Some resets show in the other keys only
        if self.rng.rand() < 0.7:
            for stream in self.images.values():
                stream.obs = stream.reset()
        return self.observe()

    def next(self) -> Any:
        for stream in self.images.values():
            stream.obs = stream.next()
        return self.observe()


def batch_of(observations: list[Any]) -> Any:
    """:return: a batch of observations as SB3 hands it on"""
    return map_parts(lambda *parts: np.stack(parts), *observations)


def by_key(observations: Any) -> dict[str, Any]:
    """:return: parts of observations, under "" where they have no keys"""
    return observations if isinstance(observations, dict) else {"": observations}


class Oracle:
    """
    Adds the steps of some streams to a buffer, and remembers the last ones that it must hold.

    :param buffer: a LatentReplayBuffer, or one of SB3's; its action space is a Box of one number
    :param streams: one for each env
    :param views: part of the observations that are views of images with channels last, as from ``VecTransposeImage``
    """

    def __init__(self, buffer: Any, streams: list[Stream], views: float = 0.0):
        self.buffer, self.streams, self.views = buffer, streams, views
        self.rng = np.random.RandomState(0)
        self.steps: list[list[Step]] = []
        self.n_held = 0
        # By the name of a transition: new ones get the largest so far
        self.priorities: dict[int, float] = {}
        self.max_priority = 1.0

    def add(self, n_steps: int = 1) -> None:
        for _ in range(n_steps):
            steps = [stream.step() for stream in self.streams]
            # The action is the name of a transition
            names = np.arange(len(steps), dtype=np.float32) + len(self.steps) * len(steps)
            self.steps.append(steps)
            self.priorities.update({int(name): self.max_priority for name in names})
            self.buffer.add(
                self.batch([step["obs"] for step in steps]),
                self.batch([step["next_obs"] for step in steps]),
                names.reshape(-1, 1),
                np.array([step["reward"] for step in steps]),
                np.array([step["done"] for step in steps]),
                [{"TimeLimit.truncated": step["timeout"]} for step in steps],
            )
            # All that was held, and this: a ring that has just grown forgets nothing until it is full again
            self.n_held = min(self.n_held + 1, self.buffer.buffer_size)

    def batch(self, observations: list[Any]) -> Any:
        stacked = batch_of(observations)
        if self.rng.rand() < self.views:
            channels_last = np.ascontiguousarray(stacked.transpose(0, 2, 3, 1))
            if self.rng.rand() < 0.2:  # what is left of images with one channel more
                channels_last = np.concatenate((channels_last[..., :1], channels_last), axis=3)[..., 1:]
            return channels_last.transpose(0, 3, 1, 2)
        return stacked

    def clear(self) -> None:
        self.buffer.reset()
        self.n_held = 0
        self.max_priority = 1.0

    def names(self) -> set[int]:
        """:return: names of the transitions that the buffer must hold, and no others"""
        n_envs = len(self.streams)
        return set(range((len(self.steps) - self.n_held) * n_envs, len(self.steps) * n_envs))

    def expected(self, name: int, n_steps: int, gamma: float) -> Step:
        """:return: the (n-step) transition of that name"""
        start, env = divmod(name, len(self.streams))
        total = np.float64(0.0)
        for i in range(n_steps):
            step = self.steps[start + i][env]
            total += gamma**i * step["reward"]
            if step["done"] or step["timeout"] or start + i + 1 == len(self.steps):
                break
            next_parts, parts = by_key(step["next_obs"]), by_key(self.steps[start + i + 1][env]["obs"])
            if not all(np.array_equal(part, parts[key]) for key, part in next_parts.items()):
                break
        return dict(
            obs=self.steps[start][env]["obs"],
            next_obs=step["next_obs"],
            done=float(step["done"] and not step["timeout"]),
            reward=total,
            discount=gamma ** (i + 1),
        )


class StubEncoder:
    """
    An encoder whose latents are whole numbers, so that they are the same however they are batched.

    :param image_shape: of its input
    :param latent_shape: (N, L)
    """

    device = th.device("cpu")

    def __init__(self, image_shape: tuple[int, int, int], latent_shape: tuple[int, int] = (2, 2)):
        self.image_shape, self.latent_shape = image_shape, latent_shape
        self.n_inputs: list[int] = []  # of each call
        self.cached: tuple[th.Tensor, th.Tensor] | None = None
        size = (int(np.prod(image_shape)), int(np.prod(latent_shape)))
        self.weights = th.as_tensor(np.random.RandomState(0).randint(-9, 10, size=size)).float()

    def center_crop(self, images: th.Tensor) -> th.Tensor:
        return crop_to_middle(images, self.image_shape[1:])

    def encode(self, images: th.Tensor) -> th.Tensor:
        assert images.shape[1:] == self.image_shape
        self.n_inputs.append(len(images))
        return (images.float().flatten(1) @ self.weights).reshape(-1, *self.latent_shape)

    def cache_latents(self, images: np.ndarray, latents: th.Tensor) -> None:
        self.cached = th.as_tensor(images).clone(), latents

    def encoder_fingerprint(self) -> str:
        return "stub"


class DictStubEncoder:
    """A stub encoder for each image, their latents side by side."""

    device = th.device("cpu")

    def __init__(self, shapes: dict[str, tuple[int, int, int]]):
        self.encoders = {key: StubEncoder(shape) for key, shape in shapes.items()}
        self.latent_shape = (2, 2 * len(shapes))

    def center_crop(self, images: dict[str, th.Tensor]) -> dict[str, th.Tensor]:
        return {key: self.encoders[key].center_crop(part) for key, part in images.items()}

    def encode(self, images: dict[str, th.Tensor]) -> th.Tensor:
        assert set(images) == set(self.encoders)
        return th.cat([encoder.encode(images[key]) for key, encoder in self.encoders.items()], dim=2)

    def cache_latents(self, images: dict[str, th.Tensor], latents: th.Tensor) -> None:
        assert set(images) == set(self.encoders)

    def encoder_fingerprint(self) -> str:
        return "stub"


class CycledCrop(nn.Module):
    """
    A known crop for each image: the one of image i starts at row and column i % n.

    :param n: how many crops there are
    """

    def __init__(self, n: int):
        super().__init__()
        self.n = n

    def crop(self, image: Any, i: int) -> Any:
        size, start = image.shape[-1] - self.n, i % self.n
        return image[..., start : start + size, start : start + size]

    def forward(self, images: th.Tensor) -> th.Tensor:
        return th.stack([self.crop(image, i) for i, image in enumerate(images)])


def image_space(n_stack: int, frame_shape: tuple[int, int, int] = (2, 6, 6), dtype: str = "uint8") -> spaces.Box:
    """:return: the space of stacked frames"""
    shape = (n_stack * frame_shape[0], *frame_shape[1:])
    return spaces.Box(0, 255, shape=shape, dtype=np.dtype(dtype).type)


def name_space() -> spaces.Box:
    """:return: an action space whose actions can name transitions"""
    return spaces.Box(0, 2**20, shape=(1,), dtype=np.float32)


def make_oracle(
    buffer_size: int = 24,
    n_envs: int = 1,
    n_stack: int = 3,
    padding: str = "zeros",
    n_augmentations: int = 1,
    crop: bool = False,
    seed: int = 0,
    dtype: str = "uint8",
    views: float = 0.0,
    is_dict: bool = False,
    **kwargs: Any,
) -> Oracle:
    """:return: an oracle around an empty buffer that has a stub encoder"""
    if is_dict:
        images = dict(image=image_space(n_stack, (1, 6, 6)), map=image_space(n_stack, (2, 7, 5), dtype))
        others = dict(vector=spaces.Box(-9, 9, (2,), np.float64), level=spaces.Discrete(3), flags=spaces.MultiBinary(4))
        space: Any = spaces.Dict({**images, **others})
    else:
        images = {"": image_space(n_stack, dtype=dtype)}
        space = images[""]
    augmentation = CycledCrop(n_augmentations) if crop else None
    buffer = LatentReplayBuffer(
        buffer_size,
        space,
        name_space(),
        device="cpu",
        n_envs=n_envs,
        n_stack=n_stack,
        gamma=GAMMA,
        n_augmentations=n_augmentations,
        augmentation=augmentation,
        **kwargs,
    )
    # The crops are square, and as much narrower than the images as there are crops
    shapes: Any = {
        key: (box.shape[0], *2 * (box.shape[2] - n_augmentations,)) if crop else box.shape for key, box in images.items()
    }
    encoder: Any = DictStubEncoder(shapes) if is_dict else StubEncoder(shapes[""])
    buffer.set_encoder(encoder)
    rng = np.random.RandomState(seed)
    make_stream = DictStream if is_dict else Stream
    return Oracle(buffer, [make_stream(rng, n_stack, padding, dtype=dtype) for _ in range(n_envs)], views)


def sample_all(buffer: LatentReplayBuffer, which: int = 0) -> Any:
    """:return: one sample of each transition held, all with the same augmented copy"""
    indices = np.arange(buffer.size() * buffer.n_envs)
    rows, envs = np.divmod(indices, buffer.n_envs)
    answers = [rows, envs, np.full_like(rows, which)]
    with pytest.MonkeyPatch.context() as patch:
        if buffer.priorities is not None:
            # Every transition that is held has a priority, and no other
            patch.setattr(buffer.priorities, "sample", lambda _: buffer.priorities.values.nonzero()[0])
            answers = answers[2:]
        iterator = iter(answers)
        patch.setattr(np.random, "randint", lambda *_, **__: next(iterator))
        return buffer.sample(len(rows))


def saved(oracle: Oracle, path: str | None = None, frozen: bool | None = None, prioritized: bool | None = None) -> None:
    """The buffer is saved to a file and loaded, or loaded from the file that is given."""
    buffer, encoder = oracle.buffer, oracle.buffer.encoder.policy
    kwargs = {name: getattr(buffer, name) for name in ("n_envs", "n_steps", "gamma", "latent_dtype")}
    kwargs["prioritized"] = buffer.priorities is not None if prioritized is None else prioritized
    kwargs.update({name: getattr(buffer.encoder, name) for name in ("n_augmentations", "augmentation")}, device="cpu")
    make_buffer = partial(
        LatentReplayBuffer, observation_space=buffer.observation_space, action_space=buffer.action_space, **kwargs
    )
    with TemporaryDirectory() as folder:
        save_buffer(buffer, f"{folder}/buffer")
        frozen = buffer.stage == "latents" if frozen is None else frozen
        oracle.buffer = load_buffer(path or f"{folder}/buffer", make_buffer, encoder, frozen)


def pickled(oracle: Oracle) -> None:
    """The buffer is saved and loaded."""
    encoder = oracle.buffer.encoder.policy
    oracle.buffer = pickle.loads(pickle.dumps(oracle.buffer))
    with pytest.raises(RuntimeError, match="set_encoder"):
        _ = oracle.buffer.encoder.policy
    oracle.buffer.set_encoder(encoder)


def check(oracle: Oracle) -> None:
    """The buffer holds the last transitions, all of them, each as it was added."""
    buffer = oracle.buffer
    assert buffer.size() == oracle.n_held and buffer.full == (oracle.n_held == buffer.buffer_size)
    for which in range(buffer.encoder.n_augmentations if buffer.stage == "latents" else 1):
        samples = sample_all(buffer, which)
        names = samples.actions[:, 0].long().tolist()
        assert len(names) == len(set(names)) and set(names) == oracle.names()
        wanted = [oracle.expected(name, buffer.n_steps, GAMMA) for name in names]
        for name, got in (("obs", samples.observations), ("next_obs", samples.next_observations)):
            parts = by_key(batch_of([step[name] for step in wanted]))
            images = {key: part for key, part in parts.items() if part.ndim == 4}
            if buffer.encoder.augmentation is not None:
                for key, part in images.items():
                    copies = [which] * len(part) if buffer.stage == "latents" else range(len(part))
                    images[key] = np.stack([buffer.encoder.augmentation.crop(o, i) for o, i in zip(part, copies, strict=True)])
            if buffer.stage == "latents":
                assert isinstance(got, Latents)
                # A stored latent equals encode(augmented image)
                tensors = {key: th.as_tensor(part) for key, part in images.items()}
                np.testing.assert_array_equal(got.values, buffer.encoder.policy.encode(tensors.get("", tensors)))
                got = got.vector_obs
            else:
                got = dict(by_key(got))
                for key, part in images.items():
                    np.testing.assert_array_equal(got.pop(key), part, strict=True)
            assert set(got) == set(parts) - set(images)
            for key, tensor in got.items():
                part = parts[key].reshape(len(names), -1)  # SB3 samples a number as an array of one
                expected = part.astype(np.float32) if part.dtype == np.float64 else part
                np.testing.assert_array_equal(tensor.numpy(), expected, strict=True)
        np.testing.assert_array_equal(samples.dones[:, 0], [step["done"] for step in wanted])
        np.testing.assert_array_equal(samples.rewards[:, 0], [step["reward"] for step in wanted])
        if buffer.n_steps == 1:
            assert samples.discounts is None
        else:
            np.testing.assert_array_equal(samples.discounts[:, 0], [step["discount"] for step in wanted])
        if buffer.priorities is not None:
            held = [oracle.priorities[name] for name in names]
            np.testing.assert_allclose(buffer.priorities.values[samples.indices], held, rtol=1e-12)

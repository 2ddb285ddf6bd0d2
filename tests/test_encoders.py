import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import NatureCNN
from torch.nn import functional as F

from sb3_seer import DataEfficientCNN, ImpalaCNN, PixelEncoder
from sb3_seer.common.augmentations import (
    RandomCrop,
    RandomShift,
    _cut_at_once,
    _cut_one_by_one,
    make_augmentation,
)
from sb3_seer.common.extractors import split
from sb3_seer.common.observations import crop_to_middle


def image_space(*shape: int) -> spaces.Box:
    return spaces.Box(0, 255, shape, np.uint8)


def numbered_images(batch_size: int, channels: int, height: int, width: int) -> th.Tensor:
    """Each pixel says where it is: an image identifies the window that was cut out of it."""
    return th.arange(batch_size * channels * height * width).reshape(batch_size, channels, height, width)


def test_pixel_encoder_is_the_papers():
    encoder = PixelEncoder(image_space(9, 84, 84))
    # Counted from the layers of the released code
    assert sum(p.numel() for p in encoder.parameters()) == 1_990_518
    assert encoder.projection.in_features == 39_200
    assert encoder.latent_dim == encoder.features_dim == 50
    images = th.rand(2, 9, 84, 84)
    latents = encoder.encode(images)
    assert latents.shape == (2, 50)
    th.testing.assert_close(encoder(images), F.layer_norm(latents, (50,)))


def test_pixel_encoder_starts_delta_orthogonal():
    convolution = PixelEncoder(image_space(9, 84, 84)).trunk[1]
    centre = convolution.weight[:, :, 1, 1]
    th.testing.assert_close(centre.T @ centre, 2 * th.eye(9))
    assert convolution.weight.count_nonzero() == centre.count_nonzero()


def test_pixel_encoder_can_start_orthogonal_as_drqs():
    first, second = (PixelEncoder(image_space(9, 84, 84), conv_init="orthogonal").trunk[i] for i in (1, 3))
    for convolution in (first, second):
        rows = convolution.weight.flatten(1)
        th.testing.assert_close(rows @ rows.T, 2 * th.eye(32))
        assert (convolution.weight != 0).all()
    with pytest.raises(ValueError, match=r'`conv_init` must be "delta_orthogonal" or "orthogonal", got \'xavier\''):
        PixelEncoder(image_space(9, 84, 84), conv_init="xavier")


def test_data_efficient_encoder_is_the_papers():
    encoder = DataEfficientCNN(image_space(4, 84, 84))
    assert encoder.latent_dim == encoder.features_dim == 576
    images = th.rand(2, 4, 84, 84)
    th.testing.assert_close(encoder(images), encoder.encode(images))
    assert (encoder(images) >= 0).all()


def test_impala_encoder_is_the_papers():
    encoder = ImpalaCNN(image_space(9, 84, 84))
    assert sum(isinstance(module, th.nn.Conv2d) for module in encoder.modules()) == 15
    # By hand: 84x84 pixels are halved three times, to 42, 21 and 11
    stages = [(9, 16), (16, 32), (32, 32)]
    n_convolutions = sum(9 * n_in * n + n + 4 * (9 * n * n + n) for n_in, n in stages)
    assert sum(p.numel() for p in encoder.parameters()) == n_convolutions + 32 * 11 * 11 * 256 + 256 == 1_089_952
    assert encoder.latent_dim == encoder.features_dim == 256
    images = th.rand(2, 9, 84, 84)
    latents = encoder.encode(images)
    assert (latents < 0).any()
    th.testing.assert_close(encoder(images), latents.clamp(min=0))
    small = ImpalaCNN(image_space(1, 16, 16), latent_dim=5, n_filters=[2, 3])  # two stages: 8x8, then 4x4
    assert small.encode(th.rand(1, 1, 16, 16)).shape == (1, 5)
    assert small.projection.in_features == 3 * 4 * 4


@pytest.mark.parametrize("freeze_at, size", [("conv1", 41), ("conv2", 39), ("conv3", 37), ("conv4", 35)])
def test_feature_maps_of_the_paper_as_latents(freeze_at, size):
    """FACTS of the released code: 32 maps of 41x41, 39x39, 37x37 and 35x35 numbers."""
    encoder = PixelEncoder(image_space(9, 84, 84), freeze_at=freeze_at)
    assert encoder.latent_dim == 32 * size**2
    assert encoder.features_dim == 50
    assert sum(p.numel() for p in encoder.parameters()) == 1_990_518


def test_channels_last_changes_no_result():
    """Oracle: the same convolutions called one after the other on the usual layout."""
    encoder = PixelEncoder(image_space(9, 84, 84))
    images = features = th.rand(3, 9, 84, 84)
    for layer in encoder.trunk[1:]:
        features = layer(features)
    th.testing.assert_close(encoder.trunk(images), features, rtol=1e-4, atol=1e-5)


def test_another_extractor_is_all_encoder():
    extractor = NatureCNN(image_space(4, 84, 84), features_dim=32)
    images = th.rand(2, 4, 84, 84)
    parts = split(extractor)
    assert parts.latent_dim == 32
    th.testing.assert_close(parts.features(parts.projection(parts.trunk(images)), {}), extractor(images))


@pytest.mark.parametrize("dtype", [th.uint8, th.float32])
def test_random_crop_cuts_one_window_of_all_channels(dtype):
    images = numbered_images(200, 2, 7, 8).to(th.int64)
    values = images.to(dtype) if dtype != th.uint8 else (images % 251).to(dtype)
    th.manual_seed(0)
    crops = RandomCrop(5)(values)
    assert crops.shape == (200, 2, 5, 5)
    assert crops.dtype == dtype
    seen = set()
    for image, crop in zip(values, crops, strict=True):
        windows = {(i, j): image[:, i : i + 5, j : j + 5] for i in range(3) for j in range(4)}
        place = [place for place, window in windows.items() if th.equal(window, crop)]
        assert len(place) == 1
        seen.add(place[0])
    assert len(seen) == 12  # every place is drawn


def test_windows_are_the_same_however_they_are_cut():
    images = th.arange(3 * 2 * 9 * 8, dtype=th.uint8).view(3, 2, 9, 8)
    places = th.tensor([0, 2, 4]), th.tensor([3, 0, 1])
    windows = _cut_one_by_one(images, *places, 5, 4)
    assert th.equal(windows, _cut_at_once(images, *places, 5, 4))
    assert th.equal(windows[2], images[2, :, 4:9, 1:5])
    assert RandomCrop(5)(images[:0]).shape == (0, 2, 5, 5)


def test_random_shift_moves_and_repeats_the_border():
    images = numbered_images(300, 2, 4, 6)
    th.manual_seed(0)
    shifted = RandomShift(2)(images)
    assert shifted.shape == images.shape
    seen = set()
    padded = th.as_tensor(np.pad(images.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)), mode="edge"))
    for image, result in zip(padded, shifted, strict=True):
        place = [(i, j) for i in range(5) for j in range(5) if th.equal(image[:, i : i + 4, j : j + 6], result)]
        assert len(place) == 1
        seen.add(place[0])
    assert len(seen) == 25


def test_center_crop():
    images = numbered_images(1, 1, 100, 100)
    assert th.equal(crop_to_middle(images, (84, 84)), images[..., 8:92, 8:92])
    assert th.equal(crop_to_middle(images, (100, 100)), images)


def test_augmentations_by_name():
    assert make_augmentation(None, None) is None
    assert make_augmentation("random_crop", dict(size=64)).size == 64
    assert make_augmentation("random_shift", None).pad == 4
    module = th.nn.Identity()
    assert make_augmentation(module, None) is module


@pytest.mark.parametrize(
    "augmentation, kwargs, message",
    [
        ("random_flip", None, "random_flip.*|random_crop"),
        ("random_crop", dict(pad=4), "random_crop"),
        ("random_crop", dict(size=0), "`size` must be an integer >= 1, got 0"),
        ("random_shift", dict(pad=2.5), "`pad` must be an integer >= 1, got 2.5"),
        (None, dict(size=84), "augmentation_kwargs"),
    ],
)
def test_bad_augmentations(augmentation, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_augmentation(augmentation, kwargs)

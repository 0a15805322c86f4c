"""Every network of the table: parameter counts, names, shapes, initialisation, image sizes."""

import pytest
import torch
from torch import nn

from kd.models import MODELS, build
from kd.models.normalized import Normalized
from kd.spec import KnownError

# name: parameters for 10 and for 100 classes, entries of the state_dict
PUBLISHED = {
    "plane2": (13_082, 215_172, 16),
    "plane4": (37_338, 475_652, 30),
    "plane6": (82_778, 1_107_204, 44),
    "plane8": (327_962, 1_246_276, 60),
    "plane10": (2_487_850, 2_931_460, 74),
    "resnet8": (78_042, 83_892, 56),
    "resnet14": (175_258, 181_108, 92),
    "resnet20": (272_474, 278_324, 128),
    "resnet26": (369_690, 375_540, 164),
    "resnet32": (466_906, 472_756, 200),
    "resnet44": (661_338, 667_188, 272),
    "resnet56": (855_770, 861_620, 344),
    "resnet110": (1_730_714, 1_736_564, 668),
}


def test_every_network_is_checked() -> None:
    assert PUBLISHED.keys() == MODELS.keys()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("classes", "column"), [(10, 0), (100, 1)])
def test_counts_and_shape(name: str, classes: int, column: int) -> None:
    network = build(name, num_classes=classes)
    assert sum(p.numel() for p in network.parameters()) == PUBLISHED[name][column]
    if classes == 10:
        assert len(network.state_dict()) == PUBLISHED[name][2]
    network.eval()
    with torch.inference_mode():
        assert network(torch.zeros(2, 3, 32, 32)).shape == (2, classes)


def names(name: str, classes: int = 10) -> set[str]:
    return {key.rsplit(".", 1)[0] for key in build(name, num_classes=classes).state_dict()}


def test_names_of_the_cifar_resnet() -> None:
    first = {f"layer1.0.{part}" for part in ("conv1", "bn1", "conv2", "bn2")}
    rest = {
        f"layer{i}.0.{part}"
        for i in (2, 3)
        for part in ("conv1", "bn1", "conv2", "bn2", "downsample.0", "downsample.1")
    }
    assert names("resnet8") == {"conv1", "bn1", "fc"} | first | rest
    assert "layer3.17.bn2" in names("resnet110")
    assert "layer3.18.bn2" not in names("resnet110")


def test_names_of_plane_count_relu_and_pooling() -> None:
    assert names("plane2") == {f"conv_layers.{i}" for i in (0, 1, 4, 5)} | {"fc_layers.0"}
    assert {key for key in names("plane10") if key.startswith("fc")} == {"fc_layers.0", "fc_layers.2"}


def test_plane6_of_100_classes_ends_without_pooling() -> None:
    pools = [sum(isinstance(m, nn.MaxPool2d) for m in build("plane6", num_classes=c).modules()) for c in (10, 100)]
    assert pools == [3, 2]


def test_initialisation_of_the_cifar_resnet() -> None:
    torch.manual_seed(0)
    network = build("resnet110", num_classes=10)
    weight = network.get_parameter("layer3.5.conv1.weight")
    assert weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
    assert network.get_parameter("bn1.weight").eq(1).all()


@pytest.mark.parametrize("name", MODELS)
def test_other_image_sizes(name: str) -> None:
    for size in (16, 64):
        with torch.device("meta"):
            assert build(name, num_classes=10, image_size=size)(torch.zeros(2, 3, size, size)).shape == (2, 10)


@pytest.mark.parametrize(("name", "least"), [("plane2", 4), ("plane6", 8), ("plane10", 16)])
def test_images_that_are_pooled_away(name: str, least: int) -> None:
    build(name, num_classes=10, image_size=least)
    with pytest.raises(KnownError, match=f"{name} .*at least {least} pixels wide \\(got {least - 1}\\)"):
        build(name, num_classes=10, image_size=least - 1)


def test_normalized_takes_both_kinds_of_images() -> None:
    network = Normalized(nn.Flatten(), (0.5, 0.25, 0.0), (0.5, 0.5, 1.0))
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    torch.testing.assert_close(network(images), network(images.float() / 255))
    torch.testing.assert_close(network(images), network(images.double() / 255))
    assert network(images)[0, 0].item() == pytest.approx((images[0, 0, 0, 0].item() / 255 - 0.5) / 0.5)
    assert not network.state_dict()  # statistics are no weights
    for wrong in (images[:, :1], images[0], images.long()):
        with pytest.raises(ValueError, match="images should be"):
            network(wrong)

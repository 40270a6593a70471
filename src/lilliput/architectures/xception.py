"""Xception: Inception with every convolution separable into depthwise and pointwise.

Paper: Xception: Deep Learning with Depthwise Separable Convolutions (Chollet; CVPR 2017; arXiv 1610.02357)

36 convolutions in 14 modules (figure 5). A separable convolution is a 3x3 convolution of each channel by
itself and a 1x1 convolution across channels, with *nothing between them* (section 4.7: a nonlinearity
there costs accuracy); batch normalization follows the pointwise one. Modules 2 to 13 are residual: where
their shape changes, the shortcut is a 1x1 convolution with stride 2 and batch normalization.

Faithful: figure 5. Differs: weights are He-normal; poolings and strided convolutions pad both sides
alike, where Keras pads right and below first, which tells where maps have an even number of pixels. Names
and shapes of the tensors are those of timm's ``legacy_xception``, whose published weights load: there
``conv1`` of a separable convolution is the depthwise one, and ``rep`` holds the layers of a module beside
its shortcut.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..core.registry import architecture
from ._checks import check_counts, check_probabilities
from ._images import SMALL, ImageNetwork
from ._initialize import he_normal


@architecture
def xception(
    classes: int = 1000,
    channels: int = 3,
    middle: int = 8,
    dropout: float = 0.0,
    small_images: bool = False,
) -> nn.Module:
    """Xception for 299x299 images, 22,855,952 parameters.

    Input ``(N, channels, height, width)``, output logits ``(N, classes)``; 8,357,403,496 multiply-adds for
    299x299 pixels.

    Args:
        classes: number of outputs.
        channels: of an image.
        middle: modules of the middle flow, each with 1,613,976 parameters.
        dropout: probability before the last layer; 0.5 for ImageNet in the paper.
        small_images: the first two strides are 1, so that 32x32 pixels become 4x4 and not 1x1. Tensors keep
            their shapes.

    Raises:
        InputError: a count is below 1, or the dropout no probability below 1.

    Example:
        >>> sum(p.numel() for p in xception().parameters())
        22855952
    """
    check_counts("xception", classes=classes, channels=channels, middle=middle)
    check_probabilities("xception", dropout=dropout)
    return _Xception(classes, channels, middle, dropout, small_images)


class _Separable(nn.Module):
    """Depthwise, then pointwise."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, before, 3, padding=1, groups=before, bias=False)
        self.pointwise = nn.Conv2d(before, after, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.pointwise(self.conv1(x))
        return out


class _Module(nn.Module):
    """Separable convolutions of the given widths, pooling where there is a stride, and the shortcut.

    Args:
        widths: of the input, and of each separable convolution.
        stride: of the pooling and the shortcut.
        relu_first: whether a ReLU is the first layer.
    """

    def __init__(self, widths: list[int], stride: int = 1, relu_first: bool = True) -> None:
        super().__init__()
        self.rep = nn.Sequential()
        for number in range(1, len(widths)):
            if number > 1 or relu_first:
                self.rep.append(nn.ReLU())
            self.rep.append(_Separable(widths[number - 1], widths[number]))
            self.rep.append(nn.BatchNorm2d(widths[number]))
        self.skip: nn.Module = nn.Identity()
        self.skipbn: nn.Module = nn.Identity()
        if widths[0] != widths[-1]:
            self.rep.append(nn.MaxPool2d(3, stride, padding=1))
            self.skip = nn.Conv2d(widths[0], widths[-1], 1, stride, bias=False)
            self.skipbn = nn.BatchNorm2d(widths[-1])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.rep(x) + self.skipbn(self.skip(x))
        return out


class _Xception(ImageNetwork):
    """Figure 5: entry flow, middle flow, exit flow."""

    def __init__(
        self, classes: int, channels: int, middle: int, dropout: float, small_images: bool
    ) -> None:
        super().__init__(channels, *((8, "") if small_images else (32, SMALL)))
        stride = 1 if small_images else 2
        self.conv1 = nn.Conv2d(channels, 32, 3, stride, bias=False)
        self.bn1, self.relu1 = nn.BatchNorm2d(32), nn.ReLU()
        self.conv2 = nn.Conv2d(32, 64, 3, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(64), nn.ReLU()
        entry = [
            _Module([64, 128, 128], stride, relu_first=False),
            _Module([128, 256, 256], 2),
            _Module([256, 728, 728], 2),
        ]
        middles = [_Module([728, 728, 728, 728]) for _ in range(middle)]
        blocks = [*entry, *middles, _Module([728, 728, 1024], 2)]
        self.blocks = [f"block{number}" for number in range(1, len(blocks) + 1)]
        for name, block in zip(self.blocks, blocks, strict=True):
            self.add_module(name, block)
        self.conv3, self.bn3, self.relu3 = _Separable(1024, 1536), nn.BatchNorm2d(1536), nn.ReLU()
        self.conv4, self.bn4, self.relu4 = _Separable(1536, 2048), nn.BatchNorm2d(2048), nn.ReLU()
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.drop = nn.Dropout(dropout)
        self.fc = nn.Linear(2048, classes)
        self.apply(he_normal)

    def logits(self, images: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(images)))
        out = self.relu2(self.bn2(self.conv2(out)))
        for name in self.blocks:
            out = self.get_submodule(name)(out)
        out = self.relu3(self.bn3(self.conv3(out)))
        out = self.relu4(self.bn4(self.conv4(out)))
        logits: Tensor = self.fc(self.drop(self.pool(out)))
        return logits

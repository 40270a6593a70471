"""LeNet-5 as Caffe's MNIST example defines it, the "LeNet-5" of pruning papers.

It is wider than LeCun's network of 1998 (20, 50 and 500 units against 6, 16 and 120), and has a
ReLU after the first fully connected layer only: the convolutions are followed by pooling and
nothing else. Weights are drawn as by Caffe's "xavier" filler, uniform in ±sqrt(3 / fan-in), biases
are zero.

Paper: Gradient-Based Learning Applied to Document Recognition (LeCun, Bottou, Bengio, Haffner;
Proceedings of the IEEE 1998; doi 10.1109/5.726791)

Paper: Caffe: Convolutional Architecture for Fast Feature Embedding (Jia et al.; ACM Multimedia
2014; arXiv 1408.5093)
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from ..core.registry import architecture
from ._checks import check_counts
from ._initialize import caffe_xavier


@architecture
def lenet_5(classes: int = 10) -> nn.Module:
    """Caffe's LeNet with 20, 50, 500 and 10 units for 28x28 images, 431,080 parameters.

    Input ``(N, 1, 28, 28)``, output logits ``(N, classes)``; 2,293,000 multiply-adds a sample. Both
    counts are for 10 classes.

    Args:
        classes: number of outputs.

    Raises:
        InputError: a count is below 1.

    Example:
        >>> sum(p.numel() for p in lenet_5().parameters())
        431080
    """
    check_counts("lenet_5", classes=classes)
    network = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 20, kernel_size=5),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(20, 50, kernel_size=5),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(50 * 4 * 4, 500),
            relu1=nn.ReLU(),
            fc2=nn.Linear(500, classes),
        )
    )
    return network.apply(caffe_xavier)

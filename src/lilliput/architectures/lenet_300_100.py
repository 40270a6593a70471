"""LeNet-300-100, the fully connected network that pruning papers report on.

Weights are drawn as by Caffe's "xavier" filler, uniform in ±sqrt(3 / fan-in), biases are zero: the
filler of Caffe's LeNet-5, taken for this network too because pruning papers trained both in Caffe.

Paper: Gradient-Based Learning Applied to Document Recognition (LeCun, Bottou, Bengio, Haffner;
Proceedings of the IEEE 1998; doi 10.1109/5.726791)
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from ..core.registry import architecture
from ._checks import check_counts
from ._initialize import caffe_xavier


@architecture
def lenet_300_100(classes: int = 10) -> nn.Module:
    """Two hidden layers of 300 and 100 units for 28x28 images, 266,610 parameters.

    Input ``(N, 1, 28, 28)`` or ``(N, 784)``, output logits ``(N, classes)``; 266,200 multiply-adds
    a sample. Both counts are for 10 classes.

    Args:
        classes: number of outputs.

    Raises:
        InputError: a count is below 1.

    Example:
        >>> sum(p.numel() for p in lenet_300_100().parameters())
        266610
    """
    check_counts("lenet_300_100", classes=classes)
    network = nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            fc1=nn.Linear(784, 300),
            relu1=nn.ReLU(),
            fc2=nn.Linear(300, 100),
            relu2=nn.ReLU(),
            fc3=nn.Linear(100, classes),
        )
    )
    return network.apply(caffe_xavier)

"""The CondConv networks by name (Tables 1 to 3 of arXiv 1904.04971), and CIFAR forms.

``cc_mobilenetv1_{025,050,075,100}``, ``cc_mobilenetv2_{050,100}``, ``cc_resnet50`` for
224 x 224 images, and ``cc_mobilenetv1_*_cifar``, ``cc_resnet{18,34,50,20,56}_cifar``. Every
option of `CondConv` is a keyword of ``timm.create_model``; ``drop_rate`` is the dropout
on the classifier's input. Experts start at random (``upcycle=False``).

Example:
    >>> import timm, pliant
    >>> model = timm.create_model("cc_mobilenetv1_025", experts=4, routing="shared")
    >>> model.classifier.weight.shape
    torch.Size([4, 1000, 256])
"""

from __future__ import annotations

from typing import Any

from pliant.methods.condconv.method import CondConv
from pliant.models import PLAIN_NETWORKS, register
from pliant.models.cifar import CIFAR_RESNETS
from pliant.models.mobile import MOBILENETS_V1, MOBILENETS_V2

# The last 8 of MobileNetV1's 13 blocks (section 4.1.1).
_OPTIONS: dict[str, dict[str, Any]] = {name: {"begin": 7} for name in MOBILENETS_V1}
# The text says the last 6 of MobileNetV2's 17 blocks; its counts are those of the last 11.
_OPTIONS |= {name: {"begin": 8} for name in MOBILENETS_V2}
# The last stage of ResNet-50 (section 4.1.3).
_OPTIONS |= {"resnet50": {"begin": 15}}
_OPTIONS |= {name: {} for name in CIFAR_RESNETS}

for _base, _options in _OPTIONS.items():
    _name = CondConv.network_name(_base)
    register(__name__, _name, PLAIN_NETWORKS[_base], base=_base, methods=(CondConv,), **_options)

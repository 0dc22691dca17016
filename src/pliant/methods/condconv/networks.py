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

from functools import partial

from timm.models.resnet import Bottleneck, ResNet

from pliant.methods.condconv.method import CondConv
from pliant.models._build import register
from pliant.models.cifar import CIFAR_NETWORKS, CIFAR_SIZE, feature_levels
from pliant.models.mobile import MOBILE, WIDTHS, mobilenet

# The last 8 of MobileNetV1's 13 blocks (section 4.1.1).
_V1_BEGIN = 7
# The text says the last 6 of MobileNetV2's 17 blocks; its counts are those of the last 11.
_V2_BEGIN = 8
# The last stage of ResNet-50 (section 4.1.3).
_RESNET50_BEGIN = 15

for _name, _width in WIDTHS.items():
    _v1 = partial(mobilenet, width=_width)
    register(
        __name__,
        f"cc_mobilenetv1_{_name}",
        _v1,
        methods=(CondConv,),
        flatten=True,
        config=MOBILE,
        begin=_V1_BEGIN,
        upcycle=False,
    )
    register(
        __name__,
        f"cc_mobilenetv1_{_name}_cifar",
        partial(_v1, small_images=True),
        methods=(CondConv,),
        input_size=CIFAR_SIZE,
        num_classes=10,
        flatten=True,
        config=MOBILE,
        begin=_V1_BEGIN,
        upcycle=False,
    )

for _name in ("050", "100"):
    register(
        __name__,
        f"cc_mobilenetv2_{_name}",
        partial(mobilenet, version=2, width=WIDTHS[_name]),
        methods=(CondConv,),
        flatten=True,
        config=MOBILE,
        begin=_V2_BEGIN,
        upcycle=False,
    )

register(
    __name__,
    "cc_resnet50",
    partial(ResNet, block=Bottleneck, layers=(3, 4, 6, 3)),
    methods=(CondConv,),
    begin=_RESNET50_BEGIN,
    upcycle=False,
)

for _base, _build in CIFAR_NETWORKS.items():
    register(
        __name__,
        f"cc_{_base}_cifar",
        _build,
        methods=(CondConv,),
        input_size=CIFAR_SIZE,
        num_classes=10,
        feature_levels=feature_levels(_base),
        upcycle=False,
    )

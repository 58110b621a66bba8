"""Convolutional classifiers, detectors and segmentation networks."""

from typing import Any

from torch import nn

from tests.elsewhere.case import Call, Case, floats

SMALL, MIDDLE = floats(2, 3, 32, 32), floats(2, 3, 64, 64)


def pooled(name: str, **options: Any) -> nn.Module:
    """A model of pytorchcv whose last pooling, of 7 x 7 for images of 224 x 224, takes images of all sizes."""
    from pytorchcv.model_provider import get_model

    model: nn.Module = get_model(name, **options)
    if isinstance(getattr(getattr(model, "features", None), "final_pool", None), nn.AvgPool2d):
        model.features.final_pool = nn.AdaptiveAvgPool2d(1)
    return model


def cv(name: str, steps: int, inputs: Any = MIDDLE, /, long: int = 0, **options: Any) -> Case:
    build = Call("tests.elsewhere.convolutions.pooled", name, **options)
    return Case(build, inputs, steps, long, name=name)


def smp(name: str, steps: int, encoder: str = "resnet18", /, long: int = 0, **options: Any) -> Case:
    model = Call(f"segmentation_models_pytorch.{name}", encoder, encoder_weights=None, **options)
    return Case(model, MIDDLE, steps, long, name=f"{name} on {encoder}")


# fmt: off
PACKAGES = {
    "pytorchcv": [
        cv("airnext50_32x4d_r2", 16),
        cv("bam_resnet18", 8),
        cv("cbam_resnet18", 8),
        cv("cgnet_cityscapes", 2 + 20, in_size=(64, 64)),
        cv("ctxnet_cityscapes", 8, in_size=(64, 64)),
        cv("dabnet_cityscapes", 9, in_size=(64, 64)),
        cv("diapreresnet20_cifar10", 9, SMALL),
        cv("diaresnet20_cifar10", 9, SMALL),
        cv("enet_cityscapes", 27, in_size=(64, 64)),
        cv("erfnet_cityscapes", 17, in_size=(64, 64)),
        cv("esnet_cityscapes", 12, in_size=(64, 64)),
        cv("espnetv2_wd2", 13),
        cv("fastscnn_cityscapes", 6, in_size=(64, 64)),
        cv("fbnet_cb", 15),
        cv("fishnet99", 29),
        cv("fpenet_cityscapes", 13, in_size=(64, 64), long=2),
        cv("ghostnet", 11),
        cv("igcv3_wd4", 25),
        cv("menet108_8x1_g3", 13),
        cv("mixnet_s", 11),
        cv("mnasnet_small", 10),
        cv("mobilenetv2_wd4", 10),
        cv("mobilenetv3_small_wd2", 7),
        cv("preresnet20_cifar10", 9, SMALL),
        cv("preresnet10", 4),
        cv("proxylessnas_mobile", 13),
        cv("regnetx002", 13),
        cv("resdropresnet20_cifar10", 9, SMALL),
        cv("resneta10", 4),
        cv("resnet20_cifar10", 9, SMALL),
        cv("ror3_56_cifar10", 24, SMALL, long=4),
        cv("sepreresnet20_cifar10", 9, SMALL),
        cv("seresnet20_cifar10", 9, SMALL),
        cv("shakedropresnet20_cifar10", 9, SMALL),
        cv("shakeshakeresnet20_2x16d_cifar10", 9, SMALL),
        cv("sharesnet18", 8),
        cv("shufflenet_g1_wd4", 13),
        cv("spnasnet", 14),
        cv("sqnxt23_w1", 21),
    ],
    "segmentation-models-pytorch": [
        smp("Unet", 8),
        smp("UnetPlusPlus", 8),
        smp("MAnet", 8 + 1),
        smp("Linknet", 8, long=4),
        smp("FPN", 8),
        smp("PSPNet", 4),
        smp("DeepLabV3", 8),
        smp("DeepLabV3Plus", 8),
        smp("UPerNet", 8),
        smp("Segformer", 16, "mit_b0"),
        smp("Unet", 9, "efficientnet-b0"),
        smp("Unet", 10, "mobilenet_v2"),
    ],
    "efficientnet-pytorch": [
        Case(Call("efficientnet_pytorch.EfficientNet.from_name", "efficientnet-b0", image_size=64), MIDDLE, 9),
    ],
    "ultralytics": [
        Case(Call(f"ultralytics.nn.tasks.{kind}", f"{name}.yaml", verbose=False), MIDDLE, steps, name=name)
        for kind, name, steps in (
            ("DetectionModel", "yolov5n", 1 + 2 + 3 + 1),
            ("DetectionModel", "yolov8n", 1 + 2 + 2 + 1),
            ("SegmentationModel", "yolov8n-seg", 1 + 2 + 2 + 1),
            ("PoseModel", "yolov8n-pose", 1 + 2 + 2 + 1),
            ("OBBModel", "yolov8n-obb", 1 + 2 + 2 + 1),
            ("ClassificationModel", "yolov8n-cls", 1 + 2 + 2 + 1),
        )
    ],
}
# fmt: on

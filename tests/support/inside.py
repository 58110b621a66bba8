"""What looks into a model: feature extractors, summaries, counters, attributions."""

from tests.support.base import Row

_GROUP = "Look inside"
_PATCH = "eulernet.patch(model, 0.3, example_inputs=x)"

ROWS = [
    Row(
        _GROUP,
        "torchvision's extractor",
        'net = create_feature_extractor(eulernet.patch(model, 0.3), {"fc": "y"})',
        "keeps h",
        before="from torchvision.models.feature_extraction import create_feature_extractor",
        result='net(x)["y"]',
        model="resnet",
        needs=("torchvision",),
    ),
    Row(
        _GROUP,
        "torchvision's extractor",
        'create_feature_extractor(eulernet.patch(model, 0.3), {"fc": "y"}); eulernet.set_h(model, 0.2)',
        "noticed",
        "Make them again now",
        before="from torchvision.models.feature_extraction import create_feature_extractor",
        model="resnet",
        needs=("torchvision",),
    ),
    Row(
        _GROUP,
        "torchvision's extractor",
        'net = IntermediateLayerGetter(eulernet.patch(model, 0.3), {"layer4": "y"})',
        before="from torchvision.models._utils import IntermediateLayerGetter",
        result='model.fc(net(x)["y"].mean((2, 3)))',
        model="resnet",
        needs=("torchvision",),
    ),
    Row(
        _GROUP,
        "timm's features",
        'net = eulernet.patch(timm.create_model("resnet18", features_only=True), 0.3, example_inputs=x)',
        before="import timm, copy\ntorch.manual_seed(0)",
        after="""
one = timm.create_model("resnet18").eval()
one.load_state_dict(net.state_dict(), strict=False)
one.global_pool = one.fc = nn.Identity()
found, expected = net.eval()(x)[-1], eulernet.patch(one, 0.3)(x)
assert torch.equal(found, expected)
""",
        result="wanted",
        model="resnet",
        needs=("timm", "torchvision"),
    ),
    Row(
        _GROUP,
        "timm's features",
        "net = FeatureGraphNet(eulernet.patch(model, 0.3), (4,))",
        "keeps h",
        before="""
import timm
from timm.models._features_fx import FeatureGraphNet
from tests.support.base import scaled_by_hooks
torch.manual_seed(0)
model = timm.create_model("resnet18", num_classes=3, zero_init_last=False).eval()
wanted.copy_(scaled_by_hooks(model, x))
""",
        result="model.fc(net(x)[-1].mean((2, 3)))",
        model="resnet",
        needs=("timm", "torchvision"),
    ),
    Row(
        _GROUP,
        "timm's features",
        "features = eulernet.patch(model, 0.3).forward_intermediates(x, intermediates_only=True)",
        after="assert len(features) == len(model.blocks)",
        model="vit",
        needs=("timm",),
    ),
    Row(
        _GROUP,
        "torchinfo",
        f"found = summary({_PATCH}, input_data=x, verbose=0)",
        before="from torchinfo import summary\nfirst = summary(model, input_data=x, verbose=0)",
        after="assert (found.total_params, found.total_mult_adds) == (first.total_params, first.total_mult_adds)",
        needs=("torchinfo",),
    ),
    Row(
        _GROUP,
        "flop counter",
        f"with FlopCounterMode(display=False) as found: {_PATCH}(x)",
        before="from torch.utils.flop_counter import FlopCounterMode\n"
        "with FlopCounterMode(display=False) as first: model(x)",
        after="assert found.get_total_flops() > 0\n"
        "with FlopCounterMode(display=False) as again: model(x)\n"
        "assert again.get_total_flops() == first.get_total_flops()",
    ),
    Row(
        _GROUP,
        "captum",
        f"given = IntegratedGradients({_PATCH}).attribute(x, target=0)",
        before="from captum.attr import IntegratedGradients",
        after="whole = (model(x) - model(0 * x))[:, 0]\n"
        "torch.testing.assert_close(given.sum(1).float(), whole, rtol=1e-2, atol=1e-3)",
        needs=("captum",),
    ),
    Row(
        _GROUP,
        "forward hooks",
        f"handle = {_PATCH}[0].b.register_forward_hook(lambda module, inputs, output: seen.append(output))",
        before="seen = []",
        after="model(x); assert len(seen) == 1; handle.remove()",
    ),
]

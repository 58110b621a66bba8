"""What is saved, averaged, quantized, pruned or written in other parameters."""

from tests.support.base import Row

_SAVED, _CHANGED = "Save and load", "Averages, quantization, other parameters"
_PATCH = "eulernet.patch(model, 0.3, example_inputs=x)"
_AGAIN = "model = network(); eulernet.patch(model, h={0}, example_inputs=x); model.load_state_dict({1})"
_PACKAGE = """
from torch.package import PackageExporter, PackageImporter
def export(model):
    with PackageExporter(folder / "net.pt") as package:
        package.extern(["eulernet.**", "tests.**"])
        package.save_pickle("net", "net.pkl", model)
"""
_BY_HAND = "y = x\nfor block in model: y = y + 0.3 * block.b(torch.relu(block.a(y)))\nwanted.copy_(y.detach())"
_PT2E = """
import copy
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer, get_default_x86_inductor_quantization_config as config,
)
quantizer = X86InductorQuantizer().set_global(config())
"""
_INT8 = "from torchao.quantization import Int8WeightOnlyConfig, quantize_"
_WEIGHT_NORM = "from torch.nn.utils.parametrizations import weight_norm"
_PRUNE = "from torch.nn.utils import prune"

ROWS = [
    Row(
        _SAVED,
        "torch.save",
        f"torch.save({_PATCH}.state_dict(), folder / 'net.pt'); "
        "model = eulernet.patch(network(), h=folder / 'net.pt', example_inputs=x)",
        after="model.load_state_dict(torch.load(folder / 'net.pt'))",
    ),
    Row(
        _SAVED,
        "torch.save",
        "eulernet.patch(model, 0.5, example_inputs=x).load_state_dict(saved)",
        "noticed",
        r"saved at h = 0\.3, and are loaded into steps with h = 0\.5",
        before="saved = eulernet.patch(network(), 0.3, example_inputs=x).state_dict()",
    ),
    Row(
        _SAVED,
        "torch.save",
        f"torch.save({_PATCH}, folder / 'net.pt')",
        after="model = torch.load(folder / 'net.pt', weights_only=False)",
    ),
    Row(
        _SAVED,
        "safetensors",
        f"save_file({_PATCH}.state_dict(), folder / 'net.safetensors', "
        "{'eulernet': eulernet.steps(model).to_json()})",
        before="from safetensors.torch import load_file, save_file",
        after="model = eulernet.patch(network(), h=folder / 'net.safetensors', example_inputs=x)\n"
        "model.load_state_dict(load_file(folder / 'net.safetensors'))",
        needs=("safetensors",),
    ),
    Row(
        _SAVED,
        "torch.package",
        f"export({_PATCH})",
        before=_PACKAGE,
        after='model = PackageImporter(folder / "net.pt").load_pickle("net", "net.pkl")',
    ),
    Row(
        _CHANGED,
        "swa_utils.AveragedModel",
        f"average = AveragedModel({_PATCH}); eulernet.set_h([model, average], 0.3)",
        before="from torch.optim.swa_utils import AveragedModel",
        result="average(x)",
    ),
    Row(
        _CHANGED,
        "timm's ModelEmaV3",
        f"average = ModelEmaV3({_PATCH}); eulernet.set_h([model, average], 0.3)",
        before="from timm.utils import ModelEmaV3",
        result="average.module(x)",
        needs=("timm",),
    ),
    Row(
        _CHANGED,
        "diffusers' EMAModel",
        f"average = EMAModel({_PATCH}.parameters(), decay=0.9); average.copy_to(model.parameters())",
        before="from diffusers.training_utils import EMAModel",
        needs=("diffusers",),
    ),
    Row(
        _CHANGED,
        "torch.ao, dynamic",
        f"model = torch.ao.quantization.quantize_dynamic({_PATCH}, {{nn.Linear}})",
        before="import torch.ao.quantization",
        after=_BY_HAND,
        result="model(x).detach()",
    ),
    Row(
        _CHANGED,
        "torch.ao, dynamic",
        "model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}); "
        "eulernet.patch(model, 0.3, example_inputs=x)",
        before="import torch.ao.quantization",
        after=_BY_HAND,
        result="model(x).detach()",
    ),
    Row(
        _CHANGED,
        "torchao",
        f"quantize_({_PATCH}, Int8WeightOnlyConfig())",
        before=_INT8,
        after=_BY_HAND,
        result="model(x).detach()",
        needs=("torchao",),
    ),
    Row(
        _CHANGED,
        "torchao",
        f"quantize_(model, Int8WeightOnlyConfig()); {_PATCH}",
        before=_INT8,
        after=_BY_HAND,
        result="model(x).detach()",
        needs=("torchao",),
    ),
    Row(
        _CHANGED,
        "pt2e",
        f"net = prepare_pt2e(torch.export.export({_PATCH}.eval(), (x,)).module(), quantizer)",
        before=_PT2E,
        after="""
for _ in range(3): net(x)
found = convert_pt2e(net)(x)
assert (found - wanted).abs().max() < 0.02 < 0.2 < (eulernet.set_h(model, 1.0)(x) - wanted).abs().max()
""",
        result="wanted",
        needs=("torchao",),
    ),
    Row(
        _CHANGED,
        "prune",
        f'prune.l1_unstructured({_PATCH}[0].b, "weight", 0.5)',
        before=_PRUNE,
        after=_BY_HAND,
        result="model(x).detach()",
    ),
    Row(
        _CHANGED,
        "prune",
        f'prune.l1_unstructured(model[0].b, "weight", 0.5); {_PATCH}',
        before=_PRUNE,
        after=_BY_HAND,
        result="model(x).detach()",
    ),
    Row(_CHANGED, "parametrizations", f"weight_norm({_PATCH}[0].b)", before=_WEIGHT_NORM),
    Row(_CHANGED, "parametrizations", f"weight_norm(model[0].b); {_PATCH}", before=_WEIGHT_NORM),
]

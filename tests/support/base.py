"""What a row of docs/support.md is, how it is run, and the page that is made of those that passed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import eulernet

H = 0.3


@dataclass(frozen=True)
class Row:
    """A line of code, and what comes of it.

    Attributes:
        group, tool: what it is about; the rows of one tool stand together.
        line: what is run, with `model` (a network of three blocks), `x` (its input) and `folder` there.
        verdict: "works" or "keeps h": `result` is what the network with h = 0.3, written by hand, gives; "refused":
            an EulernetError, and the model is what it was; "noticed": an EulernetWarning.
        says: in the error or warning.
        before: what is imported and made before, which the page does not show.
        result: an expression; `after` is run before it, and may assert.
        model: which network: "mlp", "resnet" (torchvision), "vit" (timm), "llama" (Hugging Face).
        needs: the packages.
    """

    group: str
    tool: str
    line: str
    verdict: Literal["works", "keeps h", "refused", "noticed"] = "works"
    says: str = ""
    before: str = ""
    after: str = ""
    result: str = "model(x)"
    model: str = "mlp"
    needs: tuple[str, ...] = ()

    @property
    def alone(self) -> bool:
        """Whether it wants a process group."""
        return "dist" in self.before or "mesh" in self.line


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.relu(self.a(x)))


def network(name: str) -> tuple[Any, Any, Any]:
    """A network, its input, and what it gives with h = 0.3, without a patch."""
    torch.manual_seed(0)
    if name == "mlp":
        model: Any = nn.Sequential(Block(), Block(), Block())
        x = torch.linspace(-1, 1, 16).view(2, 8)
        y = x
        for block in model:
            y = y + H * block.b(torch.relu(block.a(y)))
        return model, x, y.detach()
    if name == "llama":
        tf = pytest.importorskip("transformers")
        size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=50, num_key_value_heads=2, **size)).eval()
        ids = torch.arange(1, 9)[None]
        return model, ids, scaled_by_hooks(model, ids).logits
    if name == "vit":
        model = pytest.importorskip("timm").create_model("test_vit", num_classes=3).eval()
        x = torch.randn(2, 3, 160, 160)
    else:
        model = pytest.importorskip("torchvision").models.resnet18(num_classes=3).eval()
        x = torch.randn(2, 3, 64, 64)
    return model, x, scaled_by_hooks(model, x)


@torch.no_grad()
def scaled_by_hooks(model: nn.Module, x: Any) -> Any:
    """What a model gives whose last maps of the branches are followed by h; those of the three networks here."""
    ends = ("mlp.fc2", "attn.proj", "bn2", "o_proj", "down_proj")
    handles = [
        module.register_forward_hook(lambda module, inputs, output: H * output)
        for name, module in model.named_modules()
        if name.endswith(ends)
    ]
    result = model(x)
    for handle in handles:
        handle.remove()
    return result


def run(row: Row, folder: Path) -> None:
    """Run the line of a row, and assert what it says comes of it."""
    for package in row.needs:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    model, x, wanted = network(row.model)
    known = {"torch": torch, "nn": nn, "eulernet": eulernet, "model": model, "x": x, "folder": folder, "dist": dist}
    known |= {"Block": Block, "network": lambda: network(row.model)[0], "wanted": wanted}
    exec(row.before, known)
    if row.verdict == "refused":
        was = model.state_dict()
        with pytest.raises(eulernet.EulernetError, match=row.says):
            exec(row.line, known)
        assert not eulernet.is_patched(model) and list(model.state_dict()) == list(was)
        return
    if row.verdict == "noticed":
        with pytest.warns(eulernet.EulernetWarning, match=row.says):
            exec(row.line, known)
        return
    exec(row.line, known)
    exec(row.after, known)
    found = eval(row.result, known)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


# ---- the page

COMMAND = "python -m pytest tests/test_support.py --write-support docs/support.md"
HEAD = f"""# With other tools

Written by `{COMMAND}`.
Each line below was run by a test, with `model` a network that is not patched yet (unless the line shows it), and `x`
an input of it. *Works*: the result is that of the network with h = 0.3 written by hand. *Works in this order*: the
other one is refused. *Refused*: an error in words, which says the call to make; the model is what it was. *Noticed*: a
warning that says what to do. *Keeps h*: what was made holds the h of that moment; make it again when h has moved.

DeepSpeed is not among these: it did not install where the tests run.
"""
PACKAGES = (
    "torch timm torchvision transformers accelerate lightning peft torchao onnx onnxscript safetensors captum "
    "torchinfo diffusers optuna ray"
).split()
FOOT = "Verified with "


def page(rows: Iterable[Row]) -> str:
    """The tables as Markdown: one a group, the rows of a tool together."""
    parts = [HEAD]
    for group, of_group in groupby(rows, key=lambda row: row.group):
        parts.append(f"## {group}\n\n| tool | | line |\n| --- | --- | --- |")
        for tool, of_tool in groupby(of_group, key=lambda row: row.tool):
            lines = list(of_tool)
            refused = any(row.verdict == "refused" for row in lines)
            for number, row in enumerate(lines):
                ordered = "works in this order" if refused and row.verdict == "works" else row.verdict
                code = row.line.replace("|", "\\|").strip().replace("\n", "; ")
                parts.append(f"| {tool if number == 0 else ''} | {ordered} | `{code}` |")
        parts.append("")
    return "\n".join(parts)


def foot() -> str:
    there = [name for name in PACKAGES if importlib.util.find_spec(name) is not None]
    return f"{FOOT}{', '.join(f'{name} {version(name)}' for name in there)}.\n"

"""The whole network: a stem, sites at which blocks and other layers are called, and a head."""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from hypothesis import strategies as st

from tests.helpers.random_networks.blocks import BlockWriter
from tests.helpers.random_networks.choices import GATED, SHORTCUTS, SITES, STEMS
from tests.helpers.random_networks.parts import HEADER
from tests.helpers.random_networks.text import Class, Local, RandomNetwork, named, render


class NetworkWriter(BlockWriter):
    """Writes a network's template, from which its two sources are made."""

    def __init__(self, choices: bytes) -> None:
        super().__init__(choices)
        self.blocks: list[Class] = []

    # Where blocks are called.

    def some_block(self, projects: bool = False, trunk: bool = True) -> Class:
        """A class that exists already, or a new one; in a long step's branch one without projections.

        Alone in another step's branch a projection is no step, as the sum of a LoRA layer is none.
        """
        known = [block for block in self.blocks if block.projects or not projects]
        if not trunk:
            known = [block for block in known if all(step.kind != "projection" for step in block.steps)]
        while not known or (len(self.blocks) < 3 and self.maybe()):
            self.blocks.append(self.block(projects))
            if trunk or all(step.kind != "projection" for step in self.blocks[-1].steps):
                return self.blocks[-1]
        return self.choose(*known)

    def build(self, block: Class, width: int, out: int | None = None) -> str:
        return f"{block.name}({width}, {out or width}, {self.choose('0.0', '0.1', '0.3')})"

    def call(self, cls: Class, block: Class, path: str, width: int) -> str:
        """A call of the block `path` on x; some want a position embedding, which layers of one width share."""
        if "pos" not in block.arguments:
            return f"{path}({self.choose('x', 'x=x')})"
        parameter = f"self.pos{width} = nn.Parameter(torch.zeros({self.full_shape(str(width))}))"
        if parameter not in cls.init:
            cls.init.append(parameter)
        return f"{path}(x, {self.choose('', 'pos=')}self.pos{width})"

    def site(self, cls: Class, name: str, width: int, trunk: bool = True) -> int:
        """Statements of `cls` that take x on, and x's new width; outside the trunk the width stays."""
        excluded = [] if trunk else ["inline", "projection", "fusion", "hyper-connections"]
        excluded += [] if trunk else ["conditioned", "several states"]
        excluded += ["decoder", "hyper-connections"] if not self.tokens else []
        choice = self.pick(SITES, *excluded, *([] if self.stream == "conv2d" else ["fusion"]))
        path, w, out = f"self.{name}", str(width), 12 - width
        match choice:
            case "wrapped":
                self.wrapped(cls, name, w, 1 + self.below(2))
                return width
            case "inline":
                part = Class(cls.name, factors=cls.factors, functions=cls.functions)
                cls.forward += self.step(part, name, self.pick(SHORTCUTS[:-2]))
                cls.init += [re.sub(r"\bdim\b", w, line).replace("drop)", "0.1)") for line in part.init]
                cls.methods += part.methods
                cls.steps += part.steps
                return width
            case "long":
                stage = self.stage(width, nested=trunk)
                cls.init.append(f"{path} = {stage.name}()")
                cls.forward.append(f"x = {path}(x)")
                cls.steps += [step.inside(name) for step in stage.steps]
                return width
            case "siblings":
                for branch in "ab":
                    maps = f"{self.linear(w, w)}, nn.SiLU(), {self.linear(w, w)}"
                    cls.init.append(f"{path}_{branch} = nn.Sequential({maps})")
                cls.forward.append(f"x = {path}_a(x) + {path}_b(x)")
                return width
            case "plain":
                cls.init.append(f"{path} = {self.linear(w, w)}")
                cls.forward.append(f"x = F.gelu({path}(x))")
                return width
            case "gated":
                mixed = self.precision == "autocast"  # where only the arithmetic takes two dtypes
                spelling = self.pick(GATED, *(["lerp", "addcmul by a gate", "in place by a gate"] if mixed else []))
                self.helper("by_difference")
                self.helper("scripted_mix")
                layers = f"{self.linear(w, w)}, {self.linear(w, w)}"
                cls.init.append(f"{path} = {self.helper('Gated')}({layers}, {spelling!r})")
                cls.forward.append(f"x = {path}(x)")
                cls.steps.append(Local(name, "h0", "gated"))
                return width
            case "decoder":
                n = 1 + self.below(2)
                cls.init.append(f"{path} = {self.helper('Decoder')}({w}, {n})")
                cls.forward.append(f"x = {path}(x)")
                cls.steps += [Local(f"{name}.layers.{i}", f"h{j}", "identity") for i in range(n) for j in range(2)]
                return width
            case "conditioned":  # on the network's input, in each of two steps
                axes = 1 if self.tokens else tuple(range(2, 2 + self.space))
                cls.init.append(f"{path}_c = {self.linear('3', w)}")
                cls.forward.append(f"c = {path}_c(given.mean({axes}, keepdim=True)).expand_as(x)")
                for i in range(2):
                    cls.init.append(f"{path}_{i} = nn.Sequential({self.norm(w)}, {self.linear(w, w)}, nn.Tanh())")
                    f = f"<<self.{cls.factor('identity')} * >>{path}_{i}(x)"
                    spelled = self.choose(f"x + c + {f}", f"x + {f} + c", f"c + x + {f}")
                    cls.forward.append(f"x = {spelled}  # step")
                return width
            case "several states":  # each step adds an earlier one as well
                cls.forward.append("first = before = x")
                for i in range(3):
                    cls.init.append(f"{path}_{i} = nn.Sequential({self.norm(w)}, {self.linear(w, w)}, nn.Tanh())")
                    f = f"<<self.{cls.factor('identity')} * >>{path}_{i}(x)"
                    spelled = self.choose(
                        *(f"x + first + {f}", f"x + {f} + first", f"{f} + first + x", f"x + (before + {f})"),
                        *(f"0.9 * x + 0.1 * first + {f}", f"{f} + 0.2 * before + 0.8 * x", f"2 * x - before + {f}"),
                    )
                    cls.forward.append(f"x, before = {spelled}, x  # step")
                return width
            case "hyper-connections":
                layers = [f"nn.Sequential({self.norm(w)}, {self.linear(w, w)}, nn.GELU())" for _ in range(2)]
                layers = [f"{self.helper('Hyper')}({layer}, {w}, {self.maybe()})" for layer in layers]
                cls.init.append(f"{path} = nn.Sequential({', '.join(layers)})")
                cls.forward.append(f"x = {path}(torch.stack([x] * 3, 1)){self.choose('.sum(1)', '.mean(1)', '[:, 0]')}")
                cls.steps += [Local(f"{name}.{i}", "h0", "projection") for i in range(2)]
                return width
        block = self.some_block(choice in ("projection", "fusion"), trunk)
        call = self.call(cls, block, path, width)
        match choice:
            case "projection" | "fusion":
                cls.init.append(f"{path} = {self.build(block, width, out)}")
                cls.steps += [step.inside(name, projects=True) for step in block.steps]
                if choice == "projection":
                    cls.forward.append(f"x = {call}")
                    return out
                cls.init += [f"{path}_{i} = {self.conv}({c}, {w}, 1)" for i, c in enumerate((width, out))]
                up = f"F.interpolate({path}_1({call}), size=x.shape[2:])"
                cls.forward.append(f"x = {path}_0(x) + {up}")
            case "registered twice":
                cls.init += [f"shared = {self.build(block, width)}", f"{path} = nn.ModuleList([shared, shared])"]
                cls.forward += [f"for block in {path}:", f"    x = {call.replace(path, 'block', 1)}"]
                cls.steps += [step.inside(f"{name}.0", calls=2) for step in block.steps]
            case "ModuleList":
                n = 1 + self.below(3)
                cls.init.append(f"{path} = nn.ModuleList([{', '.join(self.build(block, width) for _ in range(n))}])")
                cls.forward += [f"for block in {path}:", f"    x = {call.replace(path, 'block', 1)}"]
                cls.steps += [step.inside(f"{name}.{i}") for i in range(n) for step in block.steps]
            case "Sequential":
                blocks = [block, *(self.some_block(trunk=trunk) for _ in range(self.below(3)))]
                cls.init.append(f"{path} = nn.Sequential({', '.join(self.build(block, width) for block in blocks)})")
                if any("pos" in block.arguments for block in blocks):
                    calls = [self.call(cls, block, f"{path}[{i}]", width) for i, block in enumerate(blocks)]
                    cls.forward += [f"x = {call}" for call in calls]
                else:
                    cls.forward.append(f"x = {path}(x)")
                cls.steps += [step.inside(f"{name}.{i}") for i, block in enumerate(blocks) for step in block.steps]
            case "called again":
                n = 2 + self.below(2)
                cls.init.append(f"{path} = {self.build(block, width)}")
                cls.forward += [f"for _ in range({n}):", f"    x = {call}"]
                cls.steps += [step.inside(name, calls=n) for step in block.steps]
            case "checkpoint":
                again = call.replace(f"{path}(", f"checkpoint({path}, ").replace("x=x", "x").replace("pos=", "")
                cls.init.append(f"{path} = {self.build(block, width)}")
                reentrant = f"use_reentrant={self.maybe()}"
                cls.forward.append(f"x = {again[:-1]}, {reentrant}) if self.training else {call}")
                cls.steps += [step.inside(name) for step in block.steps]
            case _:
                cls.init.append(f"{path} = {self.build(block, width)}")
                cls.forward.append(f"x = {call}")
                cls.steps += [step.inside(name) for step in block.steps]
        return width

    def wrapped(self, cls: Class, name: str, width: str, n: int) -> None:
        """Steps that a module of their own makes of any function, one after the other."""
        bodies = [f"nn.Sequential({self.norm(width)}, {self.linear(width, width)}, nn.Tanh())" for _ in range(n)]
        cls.init.append(f"self.{name} = nn.Sequential({', '.join(f'Residual({body})' for body in bodies)})")
        cls.forward.append(f"x = self.{name}(x)")
        cls.steps += [Local(f"{name}.{i}", "h0", "identity") for i in range(n)]
        self.helper("Residual")

    def stage(self, width: int, nested: bool) -> Class:
        """A long skip around blocks that keep the width; the first of them, a stream, begin at the skip itself."""
        cls = self.new_class("Stage", signature="")
        cls.forward.append("start = x")
        self.wrapped(cls, "first", str(width), 2 + self.below(2))
        for i in range(self.below(2)):
            self.site(cls, f"v{i}", width, trunk=False)
        tail = self.maybe()
        if tail:
            cls.init.append(f"self.tail = {self.linear(str(width), str(width))}")
            cls.forward.append("x = self.tail(x)")
        cls.steps = [step if step.parent is not None else replace(step, parent="") for step in cls.steps]
        h = cls.factor("long")
        if tail and self.maybe():
            cls.forward += [f"<<x.mul_(self.{h}); >>x += start  # step"]
        else:
            cls.forward += [f"x = start + <<self.{h} * >>x  # step"]
        return self.finish(cls)

    def stem(self, cls: Class, width: int) -> tuple[int, ...]:
        """The first statements of the network, and the input's shape."""
        w = str(width)
        choice = self.pick(STEMS, *([] if self.tokens else ["class token", "queries"]))
        cls.init.append(f"self.stem = {self.linear('3', w)}")
        cls.forward += ["given = x", "x = self.stem(x)"]
        tokens = 4
        match choice:
            case "position embedding":
                cls.init.append(f"self.position = nn.Parameter(torch.zeros({self.full_shape(w)}))")
                cls.forward.append("x = x + self.position.expand_as(x)")
            case "class token":
                tokens = 3
                cls.init.append(f"self.token = nn.Parameter(torch.zeros(1, 1, {w}))")
                cls.forward.append("x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)")
            case "queries":
                cls.init += [
                    f"self.queries = nn.Parameter(torch.zeros(1, TOKENS, {w}))",
                    f"self.cross = nn.MultiheadAttention({w}, 2, batch_first=True)",
                ]
                h = cls.factor("identity")
                cls.forward += [
                    "memory, x = x, self.queries.expand(x.shape[0], -1, -1)",
                    f"x = x + <<self.{h} * >>self.cross(x, memory, memory)[0]  # step",
                ]
        return {"tokens": (2, tokens, 3), "conv1d": (2, 3, 8), "conv2d": (2, 3, 6, 6)}[self.stream]

    def network(self) -> RandomNetwork:
        cls = Class("Network", signature="")
        width = self.choose(4, 8)
        shape = self.stem(cls, width)
        for i in range(1 + self.below(3)):
            width = self.site(cls, f"u{i}", width)
        if self.maybe():
            cls.init.append(f"self.head = nn.Linear({width}, 3)")
            cls.forward.append(f"x = self.head(x.mean({1 if self.tokens else tuple(range(2, 2 + self.space))}))")
        self.finish(cls)
        template = "\n\n\n".join([HEADER.strip(), *self.helpers.values(), *self.functions, *self.classes]) + "\n"
        return RandomNetwork(
            source=render(template, twin=False),
            twin=render(template, twin=True),
            steps=named(cls.steps),
            shape=shape,
            dtype=torch.float64 if self.precision == "float64" else torch.float32,
            autocast=self.precision == "autocast",
            exact=self.precision in ("float64", "float32"),
            features=frozenset(self.features),
        )


def random_networks() -> st.SearchStrategy[RandomNetwork]:
    """Networks of one to three sites with up to three classes of blocks; they shrink towards a single plain block.

    The choices are taken from bytes: of integers and of elements Hypothesis draws the first ones far more often.
    """
    return st.binary(min_size=512, max_size=512).map(lambda choices: NetworkWriter(choices).network())

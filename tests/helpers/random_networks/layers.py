"""The two sides of an addition: the skip, and the branch with its layers."""

from __future__ import annotations

from tests.helpers.random_networks.choices import BODIES, INNER, MAPS, MIXERS, NORMS, Choices
from tests.helpers.random_networks.parts import HELPERS
from tests.helpers.random_networks.text import Branch, Class, Op


class LayerWriter(Choices):
    """Writes skips and branches, and takes in the parts that they need."""

    def __init__(self, choices: bytes) -> None:
        super().__init__(choices)
        self.helpers: dict[str, str] = {}
        self.conv, self.batch_norm, self.pool = (f"nn.{name}{self.space}d" for name in ("Conv", "BatchNorm", "AvgPool"))

    def helper(self, name: str) -> str:
        self.helpers[name] = HELPERS[name].strip()
        return name

    # Operations.

    def scale_shape(self, width: str) -> str:
        return width if self.tokens else f"({width}{', 1' * self.space})"

    def full_shape(self, width: str) -> str:
        return f"1, TOKENS, {width}" if self.tokens else f"1, {width}{', 1' * self.space}"

    def linear(self, a: str, b: str, stride: str = "1") -> str:
        if self.tokens:
            return f"nn.Linear({a}, {b})"
        return f"{self.conv}({a}, {b}, 3, {stride}, 1)" if self.maybe() else f"{self.conv}({a}, {b}, 1, {stride})"

    def norm(self, width: str) -> str:
        kind = self.pick(NORMS)
        if kind == "norm by hand":
            return f"{self.helper('NormByHand')}({self.scale_shape(width)}, {-1 if self.tokens else 1})"
        if kind == "frozen norm":
            return f"{self.helper('FrozenNorm')}({self.scale_shape(width)})"
        if self.tokens:
            # Under autocast an RMSNorm warns that its input and its weight differ in dtype.
            return f"nn.{self.choose('LayerNorm', *(['RMSNorm'] if self.precision != 'autocast' else []))}({width})"
        return f"{self.batch_norm}({width})" if self.maybe() else f"nn.GroupNorm(2, {width})"

    def activation(self, into_place: bool) -> Op:
        if into_place and self.maybe():
            return Op("{m}({x})", "nn.ReLU(inplace=True)", saved=True)
        name = self.choose("ReLU", "GELU", "SiLU", "Tanh")
        saved = name in ("ReLU", "Tanh")
        if self.maybe():
            return Op(f"{'torch' if name == 'Tanh' else 'F'}.{name.lower()}({{x}})", saved=saved)
        return Op("{m}({x})", f"nn.{name}()", saved=saved)

    def mixer(self, width: str) -> Op:
        # A mapped convolution is not cast as a whole.
        match self.pick(MIXERS[self.stream], *(["vmap"] if self.precision == "autocast" else [])):
            case "attention":
                flags = ", ".join(f"{name}={self.maybe()}" for name in ("rotary", "bias", "mask"))
                return Op("{m}({x})", f"{self.helper('Attention')}({width}, {flags})")
            case "talking heads":
                return Op("{m}({x})", f"{self.helper('TalkingHeads')}({width})")
            case "vmap":
                one = f"nn.Linear({width}, {width})" if self.tokens else f"{self.conv}({width}, {width}, 1)"
                return Op("torch.func.vmap({m})({x})", one)
            case "MultiheadAttention":
                module = f"nn.MultiheadAttention({width}, 2, batch_first=True)"
                return Op("{m}({x}, {x}, {x}, need_weights=False)[0]", module)
            case "GRU":
                return Op("{m}({x})[0]", f"nn.GRU({width}, {width}, batch_first=True)", saved=True)
            case "token mixing":
                return Op("{m}({x})", f"{self.helper('Permuted')}(nn.Linear(TOKENS, TOKENS))")
            case "depthwise":
                return Op("{m}({x})", f"{self.conv}({width}, {width}, 3, 1, 1, groups={width})")
            case "pooling":
                return Op("{m}({x})", f"{self.pool}(3, 1, 1)")
            case _:
                return Op("{m}({x})", f"{self.helper('Permuted')}(nn.Linear({width}, {width}))")

    def inner(self, width: str, nested: bool) -> list[Op]:
        """Additions inside a branch, none of which is a step: a lone residual belongs to the branch."""
        excluded = ["nested"] * (not nested) + ["pooling residual"] * self.tokens
        choice = self.pick(INNER, *excluded)
        half = f"{width} // 2"
        module = {
            "LoRA": lambda: f"LoRA({self.linear(width, width)}, {self.linear(width, '2')}, {self.linear('2', width)})",
            "feed-through": lambda: (
                f"FeedThrough(nn.Sequential({self.linear(width, width)}, nn.SiLU(), {self.linear(width, width)}), "
                f"{self.scale_shape(width)})"
            ),
            "siblings in a branch": lambda: f"Siblings({self.linear(width, width)}, {self.linear(width, width)})",
            "split": lambda: f"Split({self.linear(half, half)}, {self.linear(half, half)}, {-1 if self.tokens else 1})",
            "pooling residual": lambda: f"PoolingResidual({self.pool}(3, 1, 1, count_include_pad=False))",
            "response norm": lambda: (
                f"ResponseNorm({self.scale_shape(width)}, "
                + ("-1, 1)" if self.tokens else f"1, {tuple(range(2, 2 + self.space))})")
            ),
            "nested": lambda: f"Inner({self.linear(width, width)})",
            "gate of two maps": lambda: f"GateOfTwoMaps({', '.join(self.linear(width, width) for _ in range(3))})",
        }.get(choice)
        if module is None:
            return []
        text = module()
        self.helper(text.partition("(")[0])
        return [Op("{m}({x})", text)]

    def branch(
        self, cls: Class, name: str, a: str = "dim", b: str = "dim", stride: str = "1",
        *, deep: bool = False, nested: bool = False, last: bool = True, bodies: tuple[str, ...] = BODIES,
    ) -> Branch:  # fmt: skip
        """A branch from width `a` to width `b`; a deep one has at least two maps with an activation between them."""
        ops: list[Op] = []
        if self.maybe():
            ops.append(Op("{m}({x})", self.norm(a)))
            if self.maybe():
                ops.append(self.activation(into_place=True))
        if deep or self.maybe():
            hidden = self.choose(a, f"{a} * 2")
            ops.append(Op("{m}({x})", self.linear(a, hidden, stride)))
            if self.maybe():
                ops.append(Op("{m}({x})", self.norm(hidden)))
            ops += [self.activation(into_place=True), Op("{m}({x})", self.linear(hidden, b))]
        else:
            ops.append(Op("{m}({x})", self.linear(a, b, stride)))
        if self.maybe():
            ops.append(self.mixer(b))
        ops += self.inner(b, nested)
        if self.maybe():
            ops.append(Op("{m}({x})", self.norm(b)))
        if self.maybe():
            ops.append(self.activation(into_place=not ops[-1].saved))
        if self.maybe():
            scale = self.scale_shape(b)
            ops.append(Op("{m}({x})", f"{self.helper('LayerScale')}({scale})") if self.maybe()
                       else Op("{x} * {m}", f"nn.Parameter(torch.ones({scale}))"))  # fmt: skip
        if self.maybe():
            ops.append(Op("{m}({x})", "nn.Dropout(drop)", idle=True) if self.maybe()
                       else Op("F.dropout({x}, 0.2, self.training)", idle=True))  # fmt: skip
        if self.maybe():
            ops.append(Op("{m}({x})", f"{self.helper('DropPath')}(drop)", idle=True))
        if self.precision == "branch in bfloat16" and last and self.maybe():
            ops.append(Op("{x}.to(torch.bfloat16)"))
        writable = not next(op for op in reversed(ops) if not op.idle).saved
        return self.body(cls, name, ops, writable, bodies)

    def body(self, cls: Class, name: str, ops: list[Op], writable: bool, bodies: tuple[str, ...]) -> Branch:
        """The same operations in one of several ways of writing a branch down."""
        plain = all(op.module and op.call == "{m}({x})" for op in ops)
        unfit = [] if plain else ["one module", "private"]
        if any(op.call.count("{x}") > 1 for op in ops):
            unfit.append("one expression")
        choice = self.pick(bodies, *unfit)
        if choice in ("one module", "private"):
            private = choice == "private"
            attribute = f"__{name}" if private else name
            cls.init.append(f"self.{attribute} = nn.Sequential({', '.join(op.module or '' for op in ops)})")
            return Branch([], f"self.{attribute}(x)", writable)
        calls = []
        for i, op in enumerate(ops):
            if op.module:
                cls.init.append(f"self.{name}_{i} = {op.module}")
            calls.append(op.call.replace("{m}", f"self.{name}_{i}"))
        if choice == "one expression":
            value = "x"
            for call in calls:
                value = call.replace("{x}", f"({value})" if " * " in value else value)
            return Branch([], f"({value})" if calls[-1].startswith("{x} *") else value, writable)
        variable = name if choice == "statements" else "y"
        lines = [f"{variable} = {call.replace('{x}', variable if i else 'x')}" for i, call in enumerate(calls)]
        if choice == "method":
            cls.methods.append("\n".join([f"def {name}(self, x):", *(f"    {line}" for line in lines), "    return y"]))
            return Branch([], f"self.{name}(x)", writable)
        return Branch(lines, variable, writable)

    def shortcut(self, cls: Class, name: str, kind: str) -> tuple[list[str], str, str, bool]:
        """Statements, the skip's expression, the step's kind, and whether the skip may be written into."""
        match kind:
            case "dropout":
                cls.init.append(f"self.{name}_skip = nn.Dropout(drop)")
                return [], f"self.{name}_skip(x)", "identity", False
            case "clone":
                return [], "x.clone()", "identity", True
            case "activation":
                return [], self.choose("F.gelu(x)", "torch.tanh(x)"), "identity", False
            case "cast":
                return [], "x.double().to(x.dtype)" if self.maybe() else "x.view_as(x)", "identity", False
            case "normed":
                cls.init.append(f"self.{name}_pre = {self.norm('dim')}")
                return [f"x = self.{name}_pre(x)"], "x", "identity", False
            case "scaled":
                cls.init.append(f"self.{name}_scale = nn.Parameter(torch.ones({self.scale_shape('dim')}))")
                return [], f"(x * self.{name}_scale)", "projection", False
            case "None or map" | "Identity or map":
                cls.projects = True
                otherwise = "None" if kind == "None or map" else "nn.Identity()"
                cls.init += [f"self.shortcut = {otherwise}", "if dim != out:", f"    self.shortcut = {self.map()}"]
                if kind == "Identity or map":
                    return [], "self.shortcut(x)", "either", False
                if self.maybe():
                    return [], "(x if self.shortcut is None else self.shortcut(x))", "either", False
                return ["s = x", "if self.shortcut is not None:", "    s = self.shortcut(x)"], "s", "either", False
            case _:
                return [], "x", "identity", False

    def map(self) -> str:
        """A projection from `dim` to `out` that halves the resolution of images and sequences."""
        one = "nn.Linear(dim, out, bias=False)" if self.tokens else f"{self.conv}(dim, out, 1, 2, bias=False)"
        match self.pick(MAPS, *(["pool and map"] if self.tokens else [])):
            case "map":
                return one
            case "map and norm":
                return f"nn.Sequential({one}, {self.norm('out')})"
            case "norm and map":
                return f"nn.Sequential({self.norm('dim')}, {one})"
            case "pool and map":
                return f"nn.Sequential({self.pool}(2, 2, ceil_mode=True), {self.conv}(dim, out, 1))"
            case "weight norm":
                return f"{self.helper('weight_normed')}({one})"
            case _:
                pads = "(0, out - dim)" if self.tokens else f"({'0, 0, ' * self.space}0, out - dim)"
                return f"{self.helper('SliceAndPad')}({pads}, {1 if self.tokens else 2})"

"""Blocks: classes with one or more steps, and the statements around each step."""

from __future__ import annotations

from tests.helpers.random_networks.additions import AdditionWriter
from tests.helpers.random_networks.choices import (
    AFTER,
    BEFORE,
    BLOCKS,
    BODIES,
    DOUBLE,
    FITS,
    FORWARDS,
    LAYERS,
    PARALLEL,
    SHORTCUTS,
)
from tests.helpers.random_networks.parts import DECORATORS
from tests.helpers.random_networks.text import Branch, Class, Local


class BlockWriter(AdditionWriter):
    """Writes classes, each after those that it is built from."""

    def __init__(self, choices: bytes) -> None:
        super().__init__(choices)
        self.classes: list[str] = []

    # Statements around a step.

    def before(self, cls: Class) -> list[str]:
        """An addition to the state that is not a step."""
        choice = self.pick(BEFORE, *([] if self.tokens else ["position from a table"]))
        maps = lambda n: ", ".join(self.linear("dim", "dim") for _ in range(n))  # noqa: E731
        if choice in ("position", "expanded position"):
            cls.init.append(f"self.position = nn.Parameter(torch.zeros({self.full_shape('dim')}))")
        if choice == "position from a table":
            cls.init.append("self.table = nn.Embedding(TOKENS, dim)")
        if choice == "mixed by a gate":
            cls.init.append(f"self.mixed = {self.helper('GateOfTwoMaps')}({maps(3)})")
        if choice == "weighted by scores":
            one, along = ("nn.Linear(dim, 1)", 1) if self.tokens else (f"{self.conv}(dim, 1, 1)", 2)
            cls.init.append(f"self.weighted = {self.helper('WeightedByScores')}({maps(3)}, {one}, {along})")
        if choice == "argument":
            cls.arguments = ", x, pos"
        return {
            "nothing": [],
            "position": ["x = x + self.position"],
            "expanded position": ["x = self.position.expand_as(x) + x"],
            "mask": ["mask = torch.zeros_like(x[0]).fill_(0.5)", "x = x + mask.expand_as(x)"],
            "noise": ["x = x + 0.1 * torch.randn_like(x)"],
            "gate": ["x = x + x * torch.sigmoid(x)"],
            "doubling": ["x = x + x"],
            "argument": ["x = x + pos.expand_as(x)"],
            "position from a table": ["x = x + self.table(torch.arange(TOKENS)).expand_as(x)"],
            "mixed by a gate": ["x = self.mixed(x)"],
            "weighted by scores": ["x = self.weighted(x)"],
        }[choice]

    def after(self, cls: Class, name: str, width: str, fresh: bool = True) -> list[str]:
        """What follows a step; only a fresh x may be written into."""
        match self.pick(AFTER, *([] if fresh else ["activation in place"])):
            case "activation after":
                return [f"x = {self.choose('F.relu', 'F.gelu', 'torch.tanh')}(x)"]
            case "activation in place":
                return ["x = F.relu(x, inplace=True)"]
            case "norm after":
                cls.init.append(f"self.{name}_after = {self.norm(width)}")
                return [f"x = self.{name}_after(x)"]
            case _:
                return []

    # Classes.

    def finish(self, cls: Class) -> Class:
        if cls.forward:
            cls.forward.append("return x")
            self.features.add(cls.forward_style)
            for name in DECORATORS.get(cls.forward_style, ()):
                self.helper(name)
        self.classes.append(cls.template())
        return cls

    def new_class(self, name: str, **options: str) -> Class:
        return Class(f"{name}{next(self.names)}", **options)

    def step(self, cls: Class, name: str, shortcut: str = "input") -> list[str]:
        """Statements that take x through one step."""
        lines, skip, kind, writable = self.shortcut(cls, name, shortcut)
        width, stride = "dim", "1"
        if kind == "either":
            width, stride = "out", "1" if self.tokens else "1 if dim == out else 2"
        branch = self.branch(cls, name, "dim", width, stride, deep=kind != "identity", nested=kind == "identity")
        added = self.addition(cls, skip, branch, kind, skip_writable=writable)
        return [*lines, *branch.lines, *added, *self.after(cls, name, width)]

    def fitted(self, cls: Class, name: str) -> list[str]:
        """A step whose skip and branch are fitted to another shape in one way, and what restores the shape."""
        choice = self.pick(FITS, *{"tokens": FITS[6:], "conv1d": FITS[8:], "conv2d": ()}[self.stream])
        channels, axis = (-1 if self.tokens else 1), self.choose(1, 2)
        twice = "1, 1, 2" if self.tokens else f"1, 2{', 1' * self.space}"
        order = f"self.{name}_order"
        if choice in ("index_select", "gather"):
            view = f"torch.arange(dim - 1, -1, -1).view({self.scale_shape('dim')})"
            cls.init.append(f"self.register_buffer('{name}_order', {view}, persistent=False)")
        if choice == "conv_transpose":
            one = f"nn.ConvTranspose{self.space}d(dim, dim, 2, 2)"
            cls.init += [f"self.{name}_{end} = {one}" for end in ("skip_up", "branch_up")]
        fit = {
            "flip": f"{{x}}.flip({axis})",
            "roll": f"{{x}}.roll(1, {axis})",
            "index_select": f"{{x}}.index_select({channels}, {order}.flatten())",
            "gather": f"{{x}}.gather({channels}, {order}.expand_as({{x}}))",
            "repeat": f"{{x}}.repeat({twice})",
            "tile": f"torch.tile({{x}}, ({twice}))",
            "interpolate": "F.interpolate({x}, scale_factor=2.0)",
            "conv_transpose": f"self.{name}_{{end}}_up({{x}})",
            "pixel_shuffle": "F.pixel_shuffle({x}.repeat_interleave(4, dim=1), 2)",
            "pixel_unshuffle": "F.pixel_unshuffle({x}, 2).unflatten(1, (-1, 4)).mean(2)",
        }[choice]
        restored = {
            "repeat": [f"x = x.unflatten({channels}, (2, -1)).mean({-2 if self.tokens else 1})"],
            "interpolate": [f"x = F.avg_pool{self.space}d(x, 2)"],
        }
        alike = {"tile": "repeat", "conv_transpose": "interpolate", "pixel_shuffle": "interpolate"}
        lines = ["x = F.interpolate(x, scale_factor=2.0)"] if choice == "pixel_unshuffle" else []
        skip = fit.replace("{x}", "x").replace("{end}", "skip")
        branch = self.branch(cls, name, deep=True, last=False)
        value = fit.replace("{x}", "f").replace("{end}", "branch")
        added = self.addition(cls, skip, Branch([], value, writable=True), "projection")
        after = restored.get(alike.get(choice, choice), [])
        return [*lines, *branch.lines, f"f = {branch.value}", *added, *after, *self.after(cls, name, "dim")]

    def block(self, projects: bool = False) -> Class:
        """A class with one or more steps, built as `Block(dim, out, drop)`; `projects`: `out` may differ from `dim`."""
        cls = self.new_class("Block", forward_style=self.choose(*FORWARDS))
        cls.forward += self.before(cls)
        if projects:
            cls.forward += self.step(cls, "body", self.pick(SHORTCUTS[-2:]))
            return self.finish(cls)
        match self.pick(BLOCKS):
            case "single":
                cls.forward += self.step(cls, "body", self.pick(SHORTCUTS))
            case "double":
                self.double(cls)
            case "parallel":
                self.parallel(cls)
            case "fitted":
                cls.forward += self.fitted(cls, "body")
            case "broadcast":
                self.broadcast(cls)
            case "loop":
                self.loop(cls)
            case "layers":
                self.layers(cls)
            case "output module":
                self.output_module(cls)
            case choice:
                return self.inheriting(cls, choice)
        return self.finish(cls)

    def double(self, cls: Class) -> None:
        """Two steps, as in a transformer's block."""
        choice = self.pick(DOUBLE)
        if choice == "one after the other":
            for name in ("first", "second"):
                cls.forward += self.step(cls, name, self.pick(SHORTCUTS[:-2]))
            return
        bodies = tuple(body for body in BODIES if body != "statements")
        branches = [self.branch(cls, name, bodies=bodies) for name in ("first", "second")]
        first, second = (f"<<self.{cls.factor('identity')} * >>{branch.value}" for branch in branches)
        cls.forward.append(
            f"x = x + {first}; x = x + {second}  # step"
            if choice == "two on one line"
            else f"x = (x := x + {first}) + {second}  # step"
        )

    def parallel(self, cls: Class) -> None:
        """Several branches of one state."""
        choice = self.pick(PARALLEL)
        cls.forward.append("state = x")
        if self.maybe():
            cls.init.append(f"self.before = {self.norm('dim')}")
            cls.forward.append("x = self.before(x)")
        branches = [self.branch(cls, name) for name in ("a", "b", "c")[: 3 if choice == "three" else 2]]
        siblings = choice == "sum of branches first"
        h = cls.factor("identity" if siblings else "parallel", places=1 if siblings else len(branches))
        for branch in branches:
            cls.forward += branch.lines
        values = [branch.value for branch in branches]
        a, b, *_ = scaled = [f"<<self.{h} * >>{value}" for value in values]
        cls.forward += {
            "in one expression": [f"x = state + {a} + {b}  # step"],
            "in turn": [f"y = state + {a}  # step", f"x = y + {b}  # step"],
            "branches first": [f"x = {b} + ({a} + state)  # step"],
            "in place": [f"y = state + {a}  # step", f"y += {b}  # step", "x = y"],
            "sum of branches first": [f"x = <<self.{h} * >>({values[0]} + {values[1]}) + state  # step"],
            "three": [f"x = state + {' + '.join(scaled)}  # step"],
        }[choice]
        cls.forward += self.after(cls, "all", "dim")

    def loop(self, cls: Class) -> None:
        """One addition that several branches run through in turn."""
        n = 1 + self.below(3)
        body = f"nn.Sequential({self.norm('dim')}, {self.linear('dim', 'dim')}, nn.GELU())"
        # One module, so one step: a loop over several is a step for each of them (tests/traps/loops.py).
        cls.init.append(f"self.bodies = nn.ModuleList([{body}] * {n})")
        h = cls.factor("identity", calls=n)
        cls.forward += ["for body in self.bodies:", f"    x = x + <<self.{h} * >>body(x)  # step"]

    def layers(self, cls: Class) -> None:
        """One line of a loop that adds for several layers: a step of each, named by the module that made its branch."""
        way, n = self.pick(LAYERS), 2 + self.below(2)
        linear = lambda: self.linear("dim", "dim")  # noqa: E731
        layers = [
            f"nn.Sequential({self.norm('dim')}, {linear()}, nn.GELU())" if self.maybe() else linear() for _ in range(n)
        ]
        names, calls = [f"bodies.{i}" for i in range(n)], [1] * n
        keyed = "<<for body in self.bodies: body.h0 = 1.0>>"
        if way == "in groups":
            cls.init += [f"layers = [{', '.join(layers)}]", "self.bodies = nn.ModuleList([*layers, *layers[:1]])"]
            calls[0] = 2
        elif way == "in pairs":
            pairs = [f"nn.ModuleList([{layer}, {linear()}])" for layer in layers]
            cls.init.append(f"self.bodies = nn.ModuleList([{', '.join(pairs)}])")
            keyed = "<<for a, b in self.bodies: a.h0 = b.h0 = 1.0>>"
            names, calls = [f"bodies.{i}.{j}" for i in range(n) for j in range(2)], [1] * 2 * n
        else:
            cls.init.append(f"self.bodies = nn.ModuleList([{', '.join(layers)}])")
        if way == "zipped":
            cls.init.append(f"self.firsts = nn.ModuleList([{', '.join(linear() for _ in range(n))}])")
        if way == "by sum":
            self.helper("by_difference")
        cls.init.append(keyed)
        cls.forward += {
            "by number": [
                "for i in range(len(self.bodies)):",
                "    f = torch.tanh(self.bodies[i](x))",
                "    x = <<self.bodies[i].h0 * >>f + x  # step",
            ],
            "zipped": [
                "for first, body in zip(self.firsts, self.bodies):",
                "    x = x + <<body.h0 * >>body(F.silu(first(x)))  # step",
            ],
            "in pairs": [
                "for a, b in self.bodies:",
                "    x = <<a.h0 * >>a(x) + x  # step",
                "    x = torch.add(x, <<b.h0 * >>b(x))  # step",
            ],
            "by sum": [
                "for body in self.bodies:",
                "    x = <<by_difference(>>sum((x, body(x)))<<, x, body.h0)>>  # step",
            ],
        }.get(way, ["for body in self.bodies:", "    x = x + <<body.h0 * >>body(x)  # step"])
        cls.steps += [Local(name, "h0", "identity", c) for name, c in zip(names, calls, strict=True)]

    def broadcast(self, cls: Class) -> None:
        """A branch that is pooled, and broadcast to the state's shape where it is added."""
        one = "nn.Linear(dim, dim)" if self.tokens else f"{self.conv}(dim, dim, 1)"
        cls.init.append(f"self.context = nn.Sequential({one}, nn.SiLU(), {one})")
        over = 1 if self.tokens else tuple(range(2, 2 + self.space))
        f = f"<<self.{cls.factor('identity')} * >>self.context(x.mean({over}, keepdim=True))"
        cls.forward += self.choose(
            [f"x = x + {f}  # step"],
            [f"x = torch.add({f}, x)  # step"],
            ["y = x.clone()", f"y += {f}  # step", "x = y"],
            [f"x = x + ({f}).expand_as(x)  # step"],
        )

    def output_module(self, cls: Class) -> None:
        """A branch that the caller begins and a module of its own ends, as in BERT."""
        output = self.new_class("Output", signature=", dim, drop", arguments=", hidden, residual")
        branch = self.branch(output, "dense")
        output.forward += ["x = hidden", *branch.lines]
        if self.maybe():
            adds = self.new_class("AddAfter", signature=", dim, drop", arguments=", f, x")
            adds.forward += self.addition(adds, "x", Branch([], "f", writable=False), "identity")
            self.finish(adds)
            output.init.append(f"self.adds = {adds.name}(dim, drop)")
            output.forward.append(f"x = self.adds({branch.value}, residual)")
            output.steps += [step.inside("adds") for step in adds.steps]
        else:
            output.forward += self.addition(output, "residual", branch, "identity")
        output.forward += self.after(output, "sum", "dim")
        self.finish(output)
        start = self.branch(cls, "body", last=False)
        cls.init.append(f"self.output = {output.name}(dim, drop)")
        cls.forward += [*start.lines, f"x = self.output({start.value}, x)"]
        cls.steps += [step.inside("output") for step in output.steps]

    def inheriting(self, base: Class, choice: str) -> Class:
        """A class that has its forward, or a part of it, from another."""
        base.forward += self.step(base, "body", self.pick(SHORTCUTS))
        if choice == "super and one more step":
            base.projects = False
        self.finish(base)
        cls = self.new_class("Derived", base=base.name, arguments=base.arguments)
        cls.projects, cls.steps, cls.factors = base.projects, list(base.steps), base.factors
        cls.functions = base.functions
        if choice == "inherited":
            return self.finish(cls)
        parent = self.choose("super()", f"super({cls.name}, self)")
        call = [f"x = {parent}.forward({cls.arguments.removeprefix(', ')})"]
        if choice == "super":
            cls.forward = [
                *self.after(cls, "early", "dim", fresh=False),
                *call,
                *self.after(cls, "late", "out", fresh=False),
            ]
        elif self.maybe():
            cls.forward = [*call, *self.step(cls, "more")]
        else:
            cls.steps = []
            cls.forward = [*self.step(cls, "more"), *call]
            cls.steps += base.steps
        return self.finish(cls)

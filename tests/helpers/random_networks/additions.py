"""The addition that makes the step, in all its forms."""

from __future__ import annotations

import re
from itertools import count

from tests.helpers.random_networks.choices import BY_DIFFERENCE, FORMS, FUSED
from tests.helpers.random_networks.layers import LayerWriter
from tests.helpers.random_networks.text import Branch, Class, Local


class AdditionWriter(LayerWriter):
    """Writes the sum of a skip and a branch, and the free functions that some forms call."""

    def __init__(self, choices: bytes) -> None:
        super().__init__(choices)
        self.functions: list[str] = []
        self.names = count()

    def addition(self, cls: Class, skip: str, branch: Branch, kind: str, skip_writable: bool = False) -> list[str]:
        """Statements that leave the step's result in x."""
        excluded = [] if self.precision in ("float64", "float32") else ["sum of a stack", *FUSED]
        if kind not in ("identity", "projection"):
            excluded += FUSED
        form = self.pick(FORMS, *excluded, *([] if branch.writable else FORMS[-2:]))
        into = skip if skip_writable else f"({skip}).clone()"
        f = branch.value
        if form == "Add module":
            attribute = f"add{next(self.names)}"
            cls.init.append(f"self.{attribute} = {self.helper('Add')}()")
            cls.steps.append(Local(attribute, "h0", kind))
            return [f"x = self.{attribute}({skip}, {f})"]
        if form == "FloatFunctional":
            attribute = f"add{next(self.names)}"
            cls.init.append(f"self.{attribute} = torch.ao.nn.quantized.FloatFunctional()")
            cls.init.append(f"<<self.{attribute}.h0 = 1.0>>")
            cls.steps.append(Local(attribute, "h0", kind))
            return [f"x = self.{attribute}.add({skip}, <<self.{attribute}.h0 * >>{f})"]
        if form.startswith("slice") and kind != "long":
            kind = "projection"  # a slice is a shape-matching map
        h = cls.factor(kind)
        scaled, mark = f"<<self.{h} * >>", "  # step"
        left, right = skip, scaled + f
        flip = form not in ("a - b", "torch.sub", "alias") and self.maybe()
        if flip:
            left, right = right, left
            self.features.add("branch left")
        pair = f"{left}, {right}"
        back = ["x = x.to(dtype)"] if self.precision == "branch in bfloat16" else []
        remember = ["dtype = x.dtype"] if back else []
        unique = f"merge{next(self.names)}"
        a, b = ("<<h * >>b", "a") if flip else ("a", "<<h * >>b")
        if form in BY_DIFFERENCE:
            return [self.by_difference(cls, form, skip, f, h, flip) + mark]
        match form:
            case "a + b":
                return [f"x = {left} + {right}{mark}"]
            case "torch.add" | "operator.add":
                return [f"x = {form}({pair}){mark}"]
            case "Tensor.add":
                return [f"x = ({left}).add({right}){mark}"]
            case "alpha":
                return [f"x = torch.add({pair}, alpha=0.7){mark}"]
            case "a - b":
                return [f"x = {skip} - {scaled}{f}{mark}"]
            case "torch.sub":
                return [f"x = torch.sub({skip}, {scaled}{f}){mark}"]
            case "views":
                return [f"x = ({left}).transpose(1, -1) + ({right}).transpose(1, -1){mark}", "x = x.transpose(1, -1)"]
            case "lines":
                return ["x = (", f"    {left}{mark}", f"    + {right}{mark}", ")"]
            case "walrus":
                return [f"x = F.gelu(y := {left} + {right}){mark}"]
            case "conditional":
                cls.init.append("self.residual = True")
                return [f"x = {left} + {right} if self.residual else {f}{mark}"]
            case "alias":
                return [f"y = {skip}", f"x = y + {scaled}{f}{mark}"]
            case "function" | "function with dropout" | "function in place":
                name = self.function(cls, form)
                extra = ", 0.2, self.training" if "dropout" in name else ""
                return [f"x = {name}({into if 'place' in form else skip}, {f}{extra}<<, self.{h}>>)"]
            case "function in an attribute" | "partial":
                name = self.function(cls, "function")
                cls.init.append(f"self.{unique} = {f'functools.partial({name})' if form == 'partial' else name}")
                return [f"x = self.{unique}({skip}, {f}<<, self.{h}>>)"]
            case "function in a dict":
                self.functions.append(f"{unique.upper()} = {{'add': {self.function(cls, 'function')}}}")
                return [f"x = {unique.upper()}['add']({skip}, {f}<<, self.{h}>>)"]
            case "decorated function":
                self.helper("decorated")
                self.functions.append(f"@decorated\ndef {unique}(a, b<<, h>>):\n    return {a} + {b}{mark}")
                return [f"x = {unique}({skip}, {f}<<, self.{h}>>)"]
            case "callable object":
                method = f"    def __call__(self, a, b<<, h>>):\n        return {a} + {b}{mark}"
                self.functions.append(f"class {unique.title()}:\n{method}")
                cls.init.append(f"self.{unique} = {unique.title()}()")
                return [f"x = self.{unique}({skip}, {f}<<, self.{h}>>)"]
            case "class method":
                method = f"    @classmethod\n    def add(cls, a, b<<, h>>):\n        return {a} + {b}{mark}"
                self.functions.append(f"class {unique.title()}:\n{method}")
                return [f"x = {unique.title()}.add({skip}, {f}<<, self.{h}>>)"]
            case "kept method":
                a, b = a.replace("h *", f"self.{h} *"), b.replace("h *", f"self.{h} *")
                cls.methods.append(f"def {unique}(self, a, b):\n    return {a} + {b}{mark}")
                cls.init.append(f"self.kept_{unique} = self.{unique}")
                return [f"x = self.kept_{unique}({skip}, {f})"]
            case "method add":
                a, b = a.replace("h *", f"self.{h} *"), b.replace("h *", f"self.{h} *")
                cls.methods.append(f"def {unique}(self, a, b):\n    return {a} + {b}{mark}")
                return [f"x = self.{unique}({skip}, {f})"]
            case "static method":
                cls.methods.append(f"@staticmethod\ndef {unique}(a, b<<, h>>):\n    return {a} + {b}{mark}")
                return [f"x = self.{unique}({skip}, {f}<<, self.{h}>>)"]
            case "nested function":
                define = [f"def {unique}(a, b<<, h>>):", f"    return {a} + {b}{mark}"]
                return [*define, f"x = {unique}({skip}, {f}<<, self.{h}>>)"]
            case "lambda":
                return [f"{unique} = lambda a, b<<, h>>: {a} + {b}{mark}", f"x = {unique}({skip}, {f}<<, self.{h}>>)"]
            case "comprehension":
                a, b = a.replace("h *", f"self.{h} *"), b.replace("h *", f"self.{h} *")
                return [f"(x,) = [{a} + {b} for a, b in [({skip}, {f})]]{mark}"]
            case "slice +=":
                return [f"f = {f}", f"y = ({skip}).clone()", f"y[:, 1:] += {scaled}f[:, 1:]{mark}", "x = y"]
            case "slice =":
                return [f"f = {f}", f"y = ({skip}).clone()", f"y[:, 1:] = y[:, 1:] + {scaled}f[:, 1:]{mark}", "x = y"]
            case "slice add_":
                return [f"f = {f}", f"y = ({skip}).clone()", f"y[:, 1:].add_({scaled}f[:, 1:]){mark}", "x = y"]
            case "slice and cat":
                first, rest = f"({left})[:, 1:]", f"({right})[:, 1:]"
                return [f"y = {first} + {rest}{mark}", f"x = torch.cat([({skip})[:, :1], y], 1)"]
            case "skip +=":
                return [f"y = {into}", f"y += {scaled}{f}{mark}", "x = y"]
            case "skip -=":
                return [f"y = {into}", f"y -= {scaled}{f}{mark}", "x = y"]
            case "skip add_":
                return [f"y = {into}", f"x = y.add_({scaled}{f}){mark}"]
            case "operator.iadd":
                return [f"y = {into}", f"x = operator.iadd(y, {scaled}{f}){mark}"]
            case "branch +=":
                return [*remember, f"f = {f}", f"<<f.mul_(self.{h}); >>f += {skip}{mark}", "x = f", *back]
            case _:
                return [*remember, f"f = {f}", f"<<f.mul_(self.{h}); >>x = f.add_({skip}){mark}", *back]

    def by_difference(self, cls: Class, form: str, skip: str, f: str, h: str, flip: bool) -> str:
        """A statement that leaves in x what an expression gives that is no addition of the source."""
        self.helper("by_difference")
        name = f"t{next(self.names)}"
        named = f"(<<{name} := >>{skip})"
        pair = f"{f}, {named}" if flip else f"{named}, {f}"
        if form == "lambda in an attribute":
            cls.init.append(f"self.{name}_plus = lambda a, b: a + b")
        if form in ("scripted function", "autograd function"):
            self.helper("scripted_add" if form == "scripted function" else "AddByHand")
        expression = {
            "sum": f"sum(({pair}))",
            "reduce": f"functools.reduce(operator.add, [{pair}])",
            "sum of a stack": f"torch.stack(({pair})).sum(0)",
            "addcmul": f"torch.addcmul({named}, {f}, torch.ones((), dtype=x.dtype))",
            "index_add": f"torch.index_add({named}, 0, torch.arange(len(x)), {f})",
            "lerp by a number": f"torch.lerp({pair}, {0.75 if flip else 0.25})",
            "scripted function": f"scripted_add({pair})",
            "autograd function": f"AddByHand.apply({pair})",
            "lambda in an attribute": f"self.{name}_plus({pair})",
        }[form]
        return f"x = <<by_difference(>>{expression}<<, {name}, self.{h})>>"

    def function(self, cls: Class, form: str) -> str:
        """A free function that adds: a new one, or one that another class calls as well."""
        prefix = {"function": "add", "function with dropout": "dropout_add", "function in place": "add_into"}[
            form
        ] + "_"
        known = re.findall(rf"def ({prefix}\d+)\(", "\n".join(self.functions))  # no add_into_1 where an add_1 is meant
        known = [name for name in known if name not in cls.functions]
        if known and self.maybe():
            name = self.choose(*known)
        else:
            name = f"{prefix}{next(self.names)}"
            body = {
                "function": [f"return {'<<h * >>b + a' if self.maybe() else 'a + <<h * >>b'}  # step"],
                "function with dropout": ["b = F.dropout(b, p, training)", "return a + <<h * >>b  # step"],
                "function in place": ["a += <<h * >>b  # step", "return a"],
            }[form]
            arguments = "a, b, p, training<<, h>>" if "dropout" in name else "a, b<<, h>>"
            self.functions.append("\n".join([f"def {name}({arguments}):", *(f"    {line}" for line in body)]))
        cls.functions.add(name)
        return name

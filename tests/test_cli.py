"""`eulernet inspect`: what it prints, what it builds, and what it says when it cannot."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import eulernet
from eulernet import Step, Steps, cli
from eulernet._plot import together

Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command in a terminal of a given width; gives what it printed."""

    def run(*arguments: str, width: int = 140, fails: int = 0) -> str:
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setenv("NO_COLOR", "1")
        result = CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)
        assert result.exit_code == fails, result.output
        if not fails:
            assert max(map(len, result.stdout.splitlines())) <= width or "--json" in arguments
        return result.output

    return run


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module into the working directory; gives its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())

    def write(source: str) -> str:
        name = f"user_module_{abs(hash(source))}"
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return write


MY_MODEL = """
from torch import nn

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return x + self.linear(x).relu()

def build(width=8):
    return nn.Sequential(nn.Linear(4, width), *(Block(width) for _ in range(3)))

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.block = nn.Embedding(10, 8), Block(8)

    def forward(self, *, ids, scale):
        return self.block(self.embedding(ids) * scale)

built = build()
number = 3

def broken():
    raise RuntimeError("no such checkpoint")
"""


# ---- what it builds
def test_a_timm_model_is_inspected_by_its_name(run: Run) -> None:
    out = run("inspect", "timm:resnet50")
    assert "timm:resnet50: ResNet, 25.6 M parameters, 16 residual steps" in out
    assert [line.split()[:4] for line in out.splitlines() if line.startswith("layer1")] == [
        ["layer1.0", "1", "Bottleneck", "projection"],
        ["layer1.{1-2}", "2", "Bottleneck", "identity"],
    ]


def test_a_tag_of_weights_is_no_part_of_the_name(run: Run) -> None:
    assert "16 residual steps" in run("inspect", "timm:resnet50.a1_in1k")


@pytest.mark.parametrize("name", ["swin_t", "regnet_x_400mf", "fcn_resnet50"])
def test_a_torchvision_model_is_inspected_by_its_name(run: Run, name: str) -> None:
    """RegNets read numbers while they are built, which the meta device does not have."""
    assert f"torchvision:{name}" in run("inspect", f"torchvision:{name}")


def test_a_type_of_hugging_face_is_inspected_by_its_name(run: Run) -> None:
    out = run("inspect", "hf:bert")
    assert "24 residual steps" in out
    assert "encoder.layer.{0-11}.attention.output" in out


def test_a_folder_of_hugging_face_is_inspected_without_its_weights(run: Run, tmp_path: Path) -> None:
    from transformers import BertConfig

    config = BertConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, intermediate_size=128)
    config.architectures = ["BertForMaskedLM"]
    config.save_pretrained(tmp_path)
    out = run("inspect", f"hf:{tmp_path}")
    assert "BertForMaskedLM" in out
    assert "4 residual steps" in out
    assert "bert.encoder.layer.{0-1}.attention.output" in out


@pytest.mark.parametrize("name", ["build", "built"])
def test_a_model_of_ones_own_is_inspected(run: Run, module: Callable[[str], str], name: str) -> None:
    out = run("inspect", f"{module(MY_MODEL)}:{name}", "--input", "2,4")
    assert "3 residual steps" in out
    assert "{1-3}" in out


def test_own_model_with_named_inputs(run: Run, module: Callable[[str], str]) -> None:
    out = run("inspect", f"{module(MY_MODEL)}:Tokens", "--input", "ids=2,5:int64", "--input", "scale=8")
    assert "1 residual steps" in out


def test_a_model_without_steps_is_no_error(run: Run, module: Callable[[str], str]) -> None:
    out = run("inspect", f"{module(MY_MODEL)}:nn.Sequential", "--input", "2,4")
    assert "No addition of the form s + F(s) was found." in out


def test_nothing_is_loaded_that_is_not_asked_for() -> None:
    code = "import sys, eulernet.cli; print([n for n in ('timm', 'torchvision', 'transformers') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# ---- what it prints
def test_json_is_the_steps_and_nothing_else(run: Run) -> None:
    import timm

    steps = Steps.from_json(run("inspect", "timm:resnet18", "--json"))
    assert list(steps) == list(eulernet.find_steps(timm.create_model("resnet18")))


def test_json_is_whole_when_the_model_prints(module: Callable[[str], str], capfd: pytest.CaptureFixture[str]) -> None:
    source = MY_MODEL.replace("def build(width=8):", "def build(width=8):\n    print('building')")
    cli.app(["inspect", f"{module(source)}:build", "--input", "2,4", "--json"], standalone_mode=False)
    out, err = capfd.readouterr()
    assert len(Steps.from_json(out)) == 3
    assert "building" in err


def test_json_with_h_patches(run: Run) -> None:
    import timm

    steps = Steps.from_json(run("inspect", "timm:resnet18", "--json", "--h", "0.3"))
    model = eulernet.patch(timm.create_model("resnet18"), h=steps)
    assert [step.h for step in eulernet.steps(model)] == [0.3] * 8


def test_h_is_shown(run: Run) -> None:
    _, table, _ = run("inspect", "timm:resnet18", "--h", "0.25").split("\n\n")
    titles, *rows = (line.split() for line in table.splitlines())
    assert [row[titles.index("h")] for row in rows] == ["0.25"] * len(rows)


def test_h_may_follow_from_depth(run: Run) -> None:
    steps = Steps.from_json(run("inspect", "timm:resnet18", "--json", "--h", "auto"))
    assert [step.h for step in steps] == pytest.approx([8**-0.5] * 8)


LONG = """
from torch import nn

class Block(nn.Module):
    def __init__(self, branch):
        super().__init__()
        self.branch = branch
        self.spare = nn.Linear(2, 2)

    def forward(self, x):
        return x + self.branch(x)

def build():
    return Block(nn.Sequential(Block(nn.Linear(4, 4)), Block(nn.Linear(4, 4))))
"""


@pytest.mark.parametrize("options", [[], ["--h", "0.5"], ["--all"]])
def test_what_is_left_alone_is_listed(run: Run, module: Callable[[str], str], options: list[str]) -> None:
    out = run("inspect", f"{module(LONG)}:build", "--input", "2,4", *options)
    assert "2 residual steps" in out
    assert "<root> (Block, " in out[out.lower().index("long steps, left alone") :]
    unreached = out[out.index("never reached") :].split()
    assert {"spare", "branch.0.spare", "branch.1.spare"} <= set(unreached)


def test_a_list_below_the_table_is_shortened(run: Run, module: Callable[[str], str]) -> None:
    source = LONG.replace(
        "self.spare = nn.Linear(2, 2)", "[setattr(self, f'spare{i}', nn.Linear(2, 2)) for i in range(9)]"
    )
    assert "more, with --all" in run("inspect", f"{module(source)}:build", "--input", "2,4")
    assert "more, with --all" not in run("inspect", f"{module(source)}:build", "--input", "2,4", "--all")


def test_all_is_one_line_a_step(run: Run) -> None:
    out = run("inspect", "timm:resnet18", "--all")
    rows = [line.split() for line in out.splitlines()]
    assert [row[0] for row in rows if len(row) > 1 and row[1].startswith("layer")] == [str(i) for i in range(8)]


@pytest.mark.parametrize("width", [80, 140])
def test_the_table_fits_the_terminal(run: Run, width: int) -> None:
    assert "Mlp" not in run("inspect", "timm:vit_small_patch16_224", width=width)
    run("inspect", "hf:bert", width=width)


def test_the_table_has_colours_and_json_has_none(module: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "140"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    arguments = ["inspect", f"{module(MY_MODEL)}:build", "--input", "2,4"]
    table, data = (CliRunner().invoke(cli.app, arguments + more, color=True).stdout for more in ([], ["--json"]))
    assert "\x1b[32midentity" in table
    assert "\x1b" not in data and len(Steps.from_json(data)) == 3


def test_the_version_is_printed(run: Run) -> None:
    assert run("--version").startswith("eulernet 0.")


def step(index: int, name: str, **changes: object) -> Step:
    values = {"module_class": "Block", "kind": "identity", "places": (), "calls": 1, "stream": 0, "depth": 4}
    return Step(index=index, name=name, **{**values, "parent": None, "h": None, **changes})  # type: ignore[arg-type]


def test_steps_of_one_sort_are_one_row() -> None:
    names = ["blocks.0:0", "blocks.0:1", "blocks.1:0", "blocks.1:1", "blocks.3:0", "<root>"]
    groups = cli._groups(step(i, name) for i, name in enumerate(names))
    assert [together(s.name for s in g) for g in groups] == ["blocks.{0-1,3}:0", "blocks.{0-1}:1", "<root>"]


@pytest.mark.parametrize("change", [{"h": 0.5}, {"depth": 5}, {"kind": "projection"}, {"module_class": "Other"}])
def test_steps_that_differ_are_rows_of_their_own(change: dict[str, object]) -> None:
    assert len(cli._groups([step(0, "layer.0"), step(1, "layer.1", **change)])) == 2


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("stages.0.blocks.3.mlp:1", ("stages.0.blocks.", "3", ".mlp:1")),
        ("3", ("", "3", "")),
        ("0.12:0", ("0.", "12", ":0")),
        ("layer1", ("layer1", "", "")),
        ("layer1:0", ("layer1:0", "", "")),
    ],
)
def test_the_number_of_a_step(name: str, parts: tuple[str, str, str]) -> None:
    assert cli._split(name) == parts


# ---- what it says when it cannot
@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("resnet50", ["does not say where", "eulernet inspect timm:resnet50"]),
        ("timm:resnet5", ["no timm model 'resnet5'", "did you mean", "resnet50", "timm.list_models()"]),
        ("torchvision:swin", ["no torchvision model 'swin'", "did you mean", "swin_t"]),
        ("hf:brt", ["no Hugging Face model type 'brt'", "did you mean", "bert", "hf:./folder"]),
        ("hf:./missing", ["there is no folder ./missing"]),
        ("hf:.", ["the folder . holds no configuration"]),
        ("no_such_package.models:build", ["no module 'no_such_package'", "timm:NAME"]),
    ],
)
def test_an_unknown_model_is_named(
    run: Run, model: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = run("inspect", model, fails=1)
    assert out.startswith("error: ")
    for word in words:
        assert word in out


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bild", ["no name in user_module", "'bild'", "did you mean build"]),
        ("number", ["is of type int, not a function that builds a model"]),
        ("broken", ["building user_module", "failed: RuntimeError: no such checkpoint"]),
        ("len", ["no name in user_module"]),
    ],
)
def test_what_is_wrong_with_ones_own_model_is_said(
    run: Run, module: Callable[[str], str], name: str, words: list[str]
) -> None:
    out = run("inspect", f"{module(MY_MODEL)}:{name}", "--input", "2,4", fails=1)
    for word in words:
        assert word in out


def test_own_module_that_cannot_be_imported(run: Run, module: Callable[[str], str]) -> None:
    name = module("import package_that_is_missing")
    out = run("inspect", f"{name}:build", fails=1)
    assert f"importing {name} failed: No module named 'package_that_is_missing'" in out


@pytest.mark.parametrize("source", ["import sys\nsys.exit()", "import sys\ndef build():\n    sys.exit()"])
def test_own_code_that_ends_the_program_ends_in_an_error(run: Run, module: Callable[[str], str], source: str) -> None:
    out = run("inspect", f"{module(source)}:build", fails=1)
    assert "failed: SystemExit" in out
    assert 'if __name__ == "__main__":' in out or "def build(): return Model()" in out


@pytest.mark.parametrize(
    ("model", "package", "extra"),
    [
        ("timm:resnet50", "timm", "timm"),
        ("torchvision:swin_t", "torchvision", "vision"),
        ("hf:bert", "transformers", "hf"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    run: Run, monkeypatch: pytest.MonkeyPatch, model: str, package: str, extra: str
) -> None:
    for name in [n for n in sys.modules if n == package or n.startswith(package + ".")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    out = run("inspect", model, fails=1)
    assert f"{package} is not installed; run: pip install 'eulernet[{extra}]'" in out


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (["1,3,x"], ["--input '1,3,x' is not a shape", "--input 1,3,224,224"]),
        (["1,3:floaty"], ["--input '1,3:floaty' is not a shape"]),
        (["a=1", "2"], ["give every --input a name"]),
        (["a=1", "a=2"], ["each name once"]),
    ],
)
def test_an_input_that_is_no_shape_is_refused(
    run: Run, module: Callable[[str], str], inputs: list[str], words: list[str]
) -> None:
    options = [word for text in inputs for word in ("--input", text)]
    out = run("inspect", f"{module(MY_MODEL)}:build", *options, fails=1)
    for word in words:
        assert word in out


def test_no_input_can_be_guessed(run: Run, module: Callable[[str], str]) -> None:
    """The advice is for the command line, not for Python."""
    out = run("inspect", f"{module(MY_MODEL)}:build", fails=1)
    assert "Sequential does not say what it takes" in out and "--input 2,3,224,224" in out
    assert "eulernet.patch" not in out


def test_a_model_that_fails_on_the_input_says_why(run: Run, module: Callable[[str], str]) -> None:
    out = run("inspect", f"{module(MY_MODEL)}:build", "--input", "2,5", fails=1)
    assert "error: " in out
    assert "Traceback" not in out


def test_h_must_be_positive(run: Run) -> None:
    assert "error: " in run("inspect", "timm:resnet18", "--h", "-1", fails=1)


def test_h_must_be_a_number_or_auto(run: Run) -> None:
    assert "--h 'small' is not a number and not auto" in run("inspect", "timm:resnet18", "--h", "small", fails=1)


def test_json_of_an_error_is_no_json(run: Run) -> None:
    with pytest.raises(json.JSONDecodeError):
        json.loads(run("inspect", "timm:resnet5", "--json", fails=1))


# ---- the picture
def test_a_picture_is_written(run: Run, module: Callable[[str], str], tmp_path: Path) -> None:
    name = module(MY_MODEL)
    out = run("inspect", f"{name}:build", "--input", "2,4", "--h", "0.1", "--picture", "steps.svg")
    assert "3 residual steps" in out and out.endswith("Drawn: steps.svg\n")
    assert (tmp_path / "steps.svg").read_text().startswith("<?xml")
    as_json = run("inspect", f"{name}:build", "--input", "2,4", "--json", "--picture", "steps.png")
    assert len(Steps.from_json(as_json)) == 3 and (tmp_path / "steps.png").exists()


def test_a_picture_that_cannot_be_written_is_refused_before_the_model_is_built(run: Run) -> None:
    out = run("inspect", "timm:nothing", "--picture", "steps.doc", fails=1)
    assert "does not end in a format" in out and "write 'steps.svg'" in out

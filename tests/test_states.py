"""Models in less usual states: each is patched as it should be, or refused by name with what to do; never by half."""

import atexit
import copy
import os
import queue
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import eulernet
from tests.helpers.refusals import refused

ROOT = Path(__file__).parents[1]
X = torch.linspace(-1, 1, 32).view(4, 8)
# Of torch's own code: what it calls obsolete, and backends that it has others for.
pytestmark = pytest.mark.filterwarnings("ignore:torch.ao.quant:DeprecationWarning", "ignore::UserWarning:torch")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

    def branch(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def net(*blocks: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(blocks or (Block(), Block(), Block())))


def patched(model: Any, h: float = 0.5, **options: Any) -> Any:
    return eulernet.patch(model, h, example_inputs=X, **options)


def by_hand(model: Any, h: float) -> Tensor:
    x = X
    for block in model:
        x = x + h * getattr(block, "_orig_mod", block).branch(x)
    return x


def assert_is_patched_whole(make: Callable[[], Any]) -> None:
    """With a fixed h and a learned one, moved and taken off, it computes what is written out by hand."""
    for trainable in (False, True):
        model = make()
        before = model(X)
        patched(model, trainable=trainable)
        assert len(eulernet.steps(model)) == 3
        torch.testing.assert_close(model(X), by_hand(model, 0.5))
        eulernet.set_h(model, 0.25)
        torch.testing.assert_close(model(X), by_hand(model, 0.25))
        assert torch.equal(eulernet.unpatch(model)(X), before)


# ------------------------------------------------------------------------------------------------------------ quantised


def quantized(dtype: torch.dtype) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(net(), {nn.Linear}, dtype=dtype)  # type: ignore[no-any-return, no-untyped-call]


@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
def test_a_dynamically_quantized_model_is_patched_whole(dtype: torch.dtype) -> None:
    assert_is_patched_whole(lambda: quantized(dtype))
    for call in (lambda m: eulernet.fold(patched(m), example_inputs=X), lambda m: patched(m, preserve=True)):
        with pytest.raises(
            eulernet.EulernetError, match=r"no last affine map(.|\n)*linear_dynamic(.|\n)*where_possible"
        ):
            call(quantized(dtype))


class Packed(nn.Parameter):
    """A weight of four bits or eight, which copies itself in a way of its own, as those of bitsandbytes do."""

    scale: Tensor

    def __new__(cls, data: Tensor, scale: Tensor) -> "Packed":
        new: Packed = torch.Tensor._make_subclass(cls, data, False)
        new.scale = scale
        return new

    def __deepcopy__(self, memo: Any) -> "Packed":
        return Packed(self.data.clone(), self.scale)


class PackedLinear(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        weight = self.weight.detach()
        scale = weight.abs().max() / 127
        self.weight: Any = Packed((weight / scale).round().to(torch.int8), scale)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.data.to(input.dtype) * self.weight.scale, self.bias)


def packed() -> nn.Sequential:
    model = net()
    for block in model:
        block.a, block.b = PackedLinear(8, 16), PackedLinear(16, 8)
    return model


def test_weights_that_are_packed_are_patched_whole_and_not_multiplied() -> None:
    assert_is_patched_whole(packed)
    model = packed()
    refused(model, lambda: patched(model, preserve=True), r"0\.b\.weight is quantised or packed.*before quantising")


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_a_model_that_torchao_has_quantized_is_patched_whole(config: str) -> None:
    torchao = pytest.importorskip("torchao.quantization")

    def make() -> Any:
        model = net()
        torchao.quantize_(model, getattr(torchao, config)())
        return model

    assert_is_patched_whole(make)
    model = make()
    refused(model, lambda: patched(model, preserve=True), r"0\.b\.weight is quantised or packed.*before quantising")


class Static(nn.Module):
    """Its addition is one of integers, once it is converted."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = torch.ao.quantization.QuantStub(), torch.ao.quantization.DeQuantStub()
        self.f, self.add = nn.Linear(8, 8), torch.ao.nn.quantized.FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        return self.out(self.add.add(x, self.f(x)))  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:must run observer")
def test_additions_of_integers_are_named() -> None:
    static: Any = nn.Sequential(Static()).eval()
    engine = torch.backends.quantized.supported_engines[-1]
    static.qconfig = torch.ao.quantization.get_default_qconfig(engine)
    torch.ao.quantization.prepare(static, inplace=True)
    static(X)
    torch.ao.quantization.convert(static, inplace=True)
    with pytest.raises(
        eulernet.EulernetError, match=r"adds integers \(patch before torch\.ao\.quantization\.convert\)"
    ):
        patched(static)
    model = net(static, Block(), Block()).eval()
    with pytest.warns(eulernet.EulernetWarning, match="adds integers"):
        patched(model)
    assert len(eulernet.steps(model)) == 2


# ----------------------------------------------------------------------------------------------- elsewhere, or in parts


@pytest.mark.parametrize("way", ["cpu", "disk", "dispatch"])
def test_an_offloaded_model_is_refused(way: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, cpu = net(), torch.device("cpu")
    if way == "cpu":
        accelerate.cpu_offload(model, execution_device=cpu)
    elif way == "disk":
        accelerate.disk_offload(model, tmp_path, execution_device=cpu)
    else:
        placed = {"0": "cpu", "1": "disk", "2": "cpu"}
        accelerate.dispatch_model(model, placed, main_device="cpu", offload_dir=tmp_path)
    for call in (patched, lambda m: eulernet.find_steps(m, example_inputs=X), lambda m: eulernet.diagnose(m, X)):
        refused(model, lambda call=call: call(model), r"offloaded by accelerate.*accelerate\.cpu_offload\(model\)")  # type: ignore[misc]


def test_an_offloaded_patched_model_computes_what_it_did(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = patched(net())
    expected = model(X)
    accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(model(X), expected)
        eulernet.set_h(model, 1.0)
        torch.testing.assert_close(model(X), net()(X))


def test_lazy_modules_are_refused_until_they_ran() -> None:
    class Lazy(Block):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.LazyLinear(16), nn.LazyLinear(8)

    model = net(Lazy(), Lazy(), Lazy())
    with pytest.raises(eulernet.EulernetError, match=r"0\.a\.weight has no shape yet.*Run it once, model\(example\)"):
        patched(model)
    model(X)
    torch.testing.assert_close(patched(model)(X), by_hand(model, 0.5))


def test_weights_that_deepspeed_has_partitioned_are_refused() -> None:
    model = net()
    for parameter in model.parameters():
        parameter.ds_id, parameter.data = 1, torch.empty(0)  # type: ignore[attr-defined]
    refused(model, lambda: patched(model), r"partitioned by DeepSpeed.*deepspeed\.initialize: eulernet\.patch\(model\)")


WORLD = """
    import os, sys, torch, torch.distributed as dist, torch.multiprocessing as mp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    import eulernet
    from tests.test_states import X, Block, by_hand, net, patched

    def refusal(call):
        try:
            call()
        except eulernet.EulernetError as error:
            return str(error)
        raise AssertionError("not refused")

    def work(rank, store):
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
        wrap = dict(auto_wrap_policy=ModuleWrapPolicy({Block}), use_orig_params=False, device_id=torch.device("cpu"))
        flat = FullyShardedDataParallel(patched(net()), **wrap)
        torch.testing.assert_close(flat(X), by_hand(net(), 0.5))
        assert [step.h for step in eulernet.steps(eulernet.set_h(flat, 0.25))] == [0.25] * 3
        torch.testing.assert_close(flat(X), by_hand(net(), 0.25))
        learned = FullyShardedDataParallel(patched(net(), trainable=True), **wrap)
        torch.testing.assert_close(learned(X), by_hand(net(), 0.5))
        for call in (eulernet.steps, lambda model: eulernet.set_h(model, 0.25)):
            assert "use_orig_params=True" in refusal(lambda: call(learned))
        plain = FullyShardedDataParallel(net(), **wrap)
        assert "sharded by FSDP. Patch before" in refusal(lambda: patched(plain))
        mesh = init_device_mesh("cpu", (2,))
        styles = {"a": ColwiseParallel(), "b": RowwiseParallel()}
        for parts in ([0, 1, 2], [1]):
            split = net()
            for part in parts:
                parallelize_module(split[part], mesh, styles)
            for call in (patched, lambda model: eulernet.find_steps(model, example_inputs=X)):
                assert "tensor parallel" in refusal(lambda: call(split))
        split = patched(net())
        parallelize_module(split[1], mesh, styles)
        torch.testing.assert_close(split(X), by_hand(net(), 0.5))
        print("done", rank, flush=True)
        dist.barrier()
        dist.destroy_process_group()
        os._exit(0)  # torch itself aborts now and then as gloo's threads end

    if __name__ == "__main__":
        mp.spawn(work, (sys.argv[1],), nprocs=2)
"""
MAIN = """
    import torch, torch.multiprocessing as mp
    from torch import nn
    import eulernet

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(8, 8)

        def forward(self, x):
            return x + self.f(x)

    def work(rank, model, x, expected):
        assert torch.equal(model(x), expected) and [step.h for step in eulernet.steps(model)] == [0.5, 0.5]
        eulernet.set_h(model, 1.0)
        assert torch.equal(eulernet.unpatch(model)(x), x + model[0].f(x) + model[1].f(x + model[0].f(x)))
        print("done", rank, flush=True)

    if __name__ == "__main__":
        x, model = torch.ones(2, 8), nn.Sequential(Block(), Block())
        eulernet.patch(model, 0.5, example_inputs=x)
        mp.spawn(work, (model, x, model(x).detach()), nprocs=1)
"""


def run_script(script: str, folder: Path, *arguments: str) -> str:
    (folder / "script.py").write_text(textwrap.dedent(script))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(folder / "script.py"), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch was built without gloo")
def test_two_processes_with_flat_shards_and_with_tensor_parallel_blocks(tmp_path: Path) -> None:
    assert run_script(WORLD, tmp_path, str(tmp_path / "store")).count("done") == 2


def test_a_class_of_a_script_is_sent_to_a_process_that_it_spawns(tmp_path: Path) -> None:
    assert "done" in run_script(MAIN, tmp_path)


# ------------------------------------------------------------------------------------------------------- without values


def test_a_mode_of_fake_tensors_around_a_call_has_no_part_in_it() -> None:
    for options in ({}, {"trainable": True}, {"preserve": True}):
        model = net()
        with FakeTensorMode(allow_non_fake_inputs=True):
            patched(model, **options)
            eulernet.set_h(model, 0.25)
            assert [step.h for step in eulernet.steps(model)] == pytest.approx([0.25] * 3)
            diagnosis = eulernet.diagnose(model, X)
        assert not any(isinstance(p, FakeTensor) for p in model.parameters())
        assert diagnosis == eulernet.diagnose(model, X)
        torch.testing.assert_close(model(X), by_hand(model, 0.25))
        with FakeTensorMode(allow_non_fake_inputs=True):
            eulernet.fold(model, example_inputs=X)
        torch.testing.assert_close(model(X), by_hand(model, 1.0))
        torch.testing.assert_close(torch.compile(patched(model), backend="eager")(X), by_hand(model, 0.5))


def test_a_model_that_was_made_of_fake_tensors_is_refused() -> None:
    with FakeTensorMode():
        model = net()
    refused(model, lambda: patched(model), r"0\.a\.weight is a fake tensor.*with torch\.device\('meta'\)")


def test_a_model_on_the_meta_device_is_patched_and_gets_its_weights_later() -> None:
    model = eulernet.patch(net().to("meta"), 0.5, example_inputs=X.to("meta"))
    model.to_empty(device="cpu").load_state_dict(net().state_dict())
    torch.testing.assert_close(model(X), by_hand(model, 0.5))
    plain = net().to("meta")
    refused(plain, lambda: patched(plain), r"tensor\.to\('meta'\)")


SHARED = queue.SimpleQueue[bool]()  # which eulernet does not know how to put back


class Copies(nn.Module):
    """Copies what it holds and what it is given, as a model does that keeps its cache of before."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        held = {"length": torch.tensor([3]), "x": x, "also x": x, "f": self.f}
        twin: Any = copy.deepcopy(held)
        mode = getattr(x, "fake_mode", None)
        SHARED.put(twin["x"] is twin["also x"] is not x)
        SHARED.put(isinstance(twin["f"].weight, nn.Parameter))
        for key in ("x", "length") if isinstance(x, FakeTensor) else ():
            SHARED.put(twin[key].fake_mode is mode)
        return x + self.f(twin["x"])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_copy_that_a_model_makes_of_its_tensors_copies_no_mode_of_fake_ones(device: str) -> None:
    """Such a mode counts references to storages by hand: a copy of it frees them again."""
    model = eulernet.patch(Copies().to(device), 0.5, example_inputs=X.to(device))
    seen = [SHARED.get() for _ in range(SHARED.qsize())]
    assert all(seen) and len(seen) >= 8
    if device == "cpu":
        torch.testing.assert_close(model(X), X + 0.5 * model.f(X))
        SHARED.get(), SHARED.get()


def test_a_copy_that_a_model_makes_of_what_it_computed_fails_as_ever() -> None:
    steps = eulernet.find_steps(nn.Sequential(Copies(), Copies()), example_inputs=X)
    assert [step.name for step in steps] == ["0", "1"]
    assert "not traced" in str(steps.notes) and "created explicitly by the user" in str(steps.notes)


# ------------------------------------------------------------------------------------------------------------ notebooks

CLASS = """
class B(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.f = torch.nn.Linear(4, 4)
    def forward(self, x):
        return x + self.f(x)
"""
PATCH = "m = eulernet.patch(B(), 0.5, example_inputs=x)\nassert torch.equal(m(x), torch.add(x, m.f(x), alpha=0.5))"


@pytest.fixture
def cell() -> Iterator[Callable[[str], Any]]:
    """Runs a cell, and returns the error that it ends in."""
    pytest.importorskip("IPython")
    from IPython.core.interactiveshell import InteractiveShell  # type: ignore[import-not-found, unused-ignore]

    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get("IPYTHONDIR")
        os.environ["IPYTHONDIR"] = folder
        main = sys.modules["__main__"]
        shell = InteractiveShell(user_ns={"torch": torch, "eulernet": eulernet, "x": torch.ones(2, 4)})
        shell.history_manager.enabled = False
        shell.InteractiveTB.set_mode(mode="Minimal")

        def run(source: str) -> Any:
            result = shell.run_cell(source)  # not silent, which reloads nothing
            return result.error_before_exec or result.error_in_exec

        yield run
        atexit.unregister(shell.atexit_operations)  # which writes into its folder
        sys.modules["__main__"] = main
        InteractiveShell.clear_instance()
        os.environ.pop("IPYTHONDIR")
        if before is not None:
            os.environ["IPYTHONDIR"] = before


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_a_class_of_a_notebook_is_patched_or_its_cell_is_named(cell: Callable[[str], Any]) -> None:
    for source in (CLASS + PATCH, "import asyncio\nawait asyncio.sleep(0)\n" + CLASS + PATCH, "%%capture\n" + CLASS):
        assert cell(source) is None
    assert cell(PATCH) is None
    assert cell("%%time\n" + CLASS) is None
    error = cell(PATCH)
    assert isinstance(error, eulernet.EulernetError)
    assert "in a cell without %%time or another magic around the class" in str(error)


RELOADED = """
import torch

def add(x, y):
    return x + y

class B(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.f = torch.nn.Linear(4, 4)
    def forward(self, x):
        return x + {times} * self.f(x)

class C(B):
    def forward(self, x):
        return add({inside}, self.f(x))
"""


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize("whole", [True, False], ids=["whole module", "function by function"])
@pytest.mark.parametrize("name", ["B", "C"])
def test_a_class_that_autoreload_changes_is_patched_again_or_named(
    name: str, whole: bool, cell: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    ipython = pytest.importorskip("IPython", minversion=None if whole else "9")  # earlier ones know the first way only
    full = " --full" if whole and ipython.version_info >= (9,) else ""
    module = f"reloaded_{name.lower()}_{whole}"
    file = tmp_path / f"{module}.py"
    written: list[None] = []

    def write(**values: str) -> None:
        file.write_text(RELOADED.format(**{"times": "1", "inside": "x", **values}))
        written.append(None)
        os.utime(file, (1e9 + 10 * len(written),) * 2)

    def check(source: str) -> None:
        error = cell(source)
        assert error is None, error

    write()
    check(f"%load_ext autoreload\n%autoreload 2{full}\nimport {module} as net\nm, plain = net.{name}(), net.{name}()")
    check("plain.load_state_dict(m.state_dict())\neulernet.patch(m, 0.5, example_inputs=x)")
    check("assert torch.equal(m(x), torch.add(x, m.f(x), alpha=0.5))")
    again = "eulernet.patch(m, eulernet.steps(m), example_inputs=x)"
    write(times="3", inside="2 * x")
    error = cell("m(x)")
    assert isinstance(error, eulernet.EulernetError), error
    assert f"{module}.{name}: forward was changed after the model was patched" in str(error)
    assert f"{'Patch it again' if whole else 'kernel), and patch it'}: eulernet.patch(model, h=eulernet" in str(error)
    if not whole:  # what runs now stands in no file
        assert "restart Python or the notebook's kernel" in str(cell(again))
    else:
        check(f"{again}\ntorch.testing.assert_close(m(x), plain(x) - 0.5 * {3 if name == 'B' else 1} * m.f(x))")
    check("eulernet.unpatch(m)\nassert torch.equal(m(x), plain(x))")

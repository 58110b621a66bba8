"""Who computes a step: a kernel where it may and where it pays, torch elsewhere, and what is said of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import eulernet
from eulernet import EulernetError, kernels
from eulernet.functional import euler_step, euler_step_norm
from tests.helpers.kernels import DEVICE, GPU, check, eager_step, our_step, random

pytest.importorskip("triton")
from eulernet.kernels import _device, _step
from eulernet.kernels._launch import Launch

# The interpreter of Triton 3.6 makes numbers of arrays with one element. NumPy warns of it, and refuses it from 2.4 on.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


def test_choosing_a_mode_holds_its_name() -> None:
    """torch 2.8 to 2.11 lets go of it once more than it took it, until Python frees it."""
    name = "".join(["tri", "ton"])
    before = sys.getrefcount(name)
    for _ in range(3):
        with kernels.mode(name):
            pass
    assert sys.getrefcount(name) >= before


# ---------------------------------------------------------------------------- gradients of gradients, and of what moved


def test_h_on_the_cpu_is_not_copied_to_the_gpu() -> None:
    """A copy waits for the GPU, and a graph cannot capture it; an operator takes the number along."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert "copy" not in func.__name__ and "_local_scalar" not in func.__name__, func
            return func(*args, **kwargs or {})

    with torch._subclasses.FakeTensorMode(), Copies():
        x, h = torch.empty(4, 8, device="cuda"), torch.empty(())
        assert euler_step(x, x, h, activation="relu").is_cuda


def test_a_mode_is_of_one_thread() -> None:
    import threading

    seen: list[str] = []
    with kernels.mode("torch"):
        thread = threading.Thread(target=lambda: seen.append(kernels.current()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_a_kernel_that_does_not_compile_is_left_to_torch_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the forward and in the backward; where the kernels were asked for, it is an error."""

    class Broken:
        fn = _device.step_forward.fn

        def __getitem__(self, grid: Any) -> Any:
            raise RuntimeError("no such instruction")

    skip, branch = random(3, 8), random(3, 8)
    expected = torch.autograd.grad(F.silu(skip + 0.5 * branch).sum(), (skip, branch))
    for name in ("step_backward", "step_forward"):
        monkeypatch.setattr(kernels, "_broken", False)
        monkeypatch.setattr(_step, "_plans", {})
        monkeypatch.setattr(_device, name, Broken())
        with kernels.mode("triton"):
            if name == "step_forward":
                with pytest.raises(RuntimeError, match="no such instruction"):
                    euler_step(skip, branch, 0.5, activation="silu")
            monkeypatch.setattr(kernels, "current", lambda: "auto")
            monkeypatch.setattr(kernels, "chosen", lambda *args, **options: True)
            with pytest.warns(eulernet.EulernetWarning, match="no such instruction") as warned:
                for _ in "12":
                    out = euler_step(skip, branch, 0.5, activation="silu")
                    for a, e in zip(torch.autograd.grad(out.sum(), (skip, branch)), expected, strict=True):
                        torch.testing.assert_close(a, e)
            assert len(warned) == 1
            monkeypatch.undo()


def test_a_bug_is_no_kernel_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Want of memory neither."""
    for error in (TypeError("an argument too many"), torch.OutOfMemoryError("of 80 GiB")):
        with pytest.raises(type(error)):
            kernels.failed(error)
    assert not kernels._broken


def test_gpus_that_triton_cannot_serve_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    monkeypatch.setattr(torch.version, "hip", None)
    kernels._works.cache_clear()
    with pytest.warns(eulernet.EulernetWarning, match=r"7\.0 and more, and GPU 0 has \(6, 1\)"):
        assert not kernels._works(0)
    kernels._works.cache_clear()


def test_broadcasting_operands_are_left_to_torch(launches: list[str]) -> None:
    inputs = [random(3, 4), random(4), random(4), None]
    check(our_step("relu", 0.3), eager_step("relu", 0.3), inputs)
    inputs = [random(3, 4), random(3, 4), random(3, 4), None]
    check(our_step("relu", 0.3), eager_step("relu", 0.3), inputs)
    assert launches == []


def test_tensors_whose_memory_is_not_what_they_say_are_left_to_torch(launches: list[str]) -> None:
    x, scale = random(3, 4, grad=False), random(4, grad=False)
    negative = torch.complex(scale, scale).conj().imag
    assert negative.is_neg()
    asked: list[Any] = []

    class Asked(Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            asked.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    with kernels.mode("triton"):
        actual = euler_step(x, x, 0.5, layer_scale=negative)
        torch.testing.assert_close(actual, x - 0.5 * scale * x)
        actual = euler_step(x, torch.complex(x, x).conj().imag, 0.5, activation="relu")
        torch.testing.assert_close(actual, F.relu(0.5 * x))
        assert type(euler_step(x, x, 0.5, layer_scale=scale.as_subclass(Asked))) is Asked and asked
        torch.testing.assert_close(euler_step(x.to_sparse(), x.to_sparse(), 0.5).to_dense(), 1.5 * x)
        meta = x.to("meta")
        assert euler_step(meta, meta, 0.5, activation="relu").is_meta
        with pytest.raises(RuntimeError, match="device"):
            euler_step(x, x, 0.5, out=meta)
    assert launches == []


def test_a_number_of_any_kind_is_taken_as_h(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton knows Python's only, and compiles a kernel for each of some integers."""
    given: list[Any] = []
    monkeypatch.setattr(Launch, "__call__", lambda self, tensors, h: given.append(h))
    with kernels.mode("triton"), torch.no_grad():
        for h in (2, torch.tensor(0.5).numpy()[()]):
            euler_step(random(3), random(3), h, activation="relu")
    assert given == [2.0, 0.5] and {type(h) for h in given} == {float}


def test_h_may_be_on_the_cpu() -> None:
    """As for an operator of torch, which takes a tensor without dimensions from there."""
    with torch._subclasses.FakeTensorMode():  # which knows of devices, and needs none
        x, gamma, h = torch.empty(4, 8, device="cuda"), torch.empty(8, device="cuda"), torch.empty(())
        assert (x + h * x).is_cuda
        for scale in (None, gamma):
            assert euler_step(x, x, h, layer_scale=scale, activation="relu").is_cuda
            assert euler_step_norm(x, x, h, gamma, layer_scale=scale)[1].is_cuda
    x, h = random(3, 4), torch.tensor(0.5, requires_grad=True)
    with kernels.mode("triton"):
        euler_step(x, x, h).sum().backward()
    torch.testing.assert_close(h.grad, x.detach().sum().cpu())


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_transforms_never_meet_a_kernel(launches: list[str]) -> None:
    skip, branch, scale = random(3, 4, grad=False), random(3, 4, grad=False), random(4, grad=False)

    def function(skip: Tensor, branch: Tensor) -> Tensor:
        return euler_step(skip, branch, 0.3, activation="silu", layer_scale=scale)

    class Module(torch.nn.Module):
        def forward(self, skip: Tensor, branch: Tensor) -> Tensor:
            return function(skip, branch)

    expected = function(skip, branch)
    with kernels.mode("triton"):
        close = torch.testing.assert_close
        close(torch.compile(function, backend="aot_eager", fullgraph=True)(skip, branch), expected)
        close(torch.export.export(Module(), (skip, branch)).module()(skip, branch), expected)
        close(torch.vmap(function)(skip, branch), expected)
        close(torch.func.jvp(function, (skip, branch), (skip, branch))[0], expected)
        close(torch.func.grad(lambda s: function(s, branch).sum())(skip).shape, skip.shape)
        close(torch.fx.experimental.proxy_tensor.make_fx(function)(skip, branch)(skip, branch), expected)
        close(torch.jit.trace(function, (skip, branch), check_trace=False)(skip, branch), expected)
        with torch.autograd.forward_ad.dual_level():
            close(function(torch.autograd.forward_ad.make_dual(skip, branch), branch), expected)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as fake:
            assert function(fake.from_tensor(skip), fake.from_tensor(branch)).shape == (3, 4)
    assert launches == []


# ------------------------------------------------------------------------------------------------------------ choosing


def test_mode_is_a_setting_and_a_block() -> None:
    assert kernels.current() == "auto"
    with kernels.mode("torch"):
        assert kernels.current() == "torch"
        kernels.mode("triton")
        assert kernels.current() == "triton"
    assert kernels.current() == "auto"


def test_auto_is_torch_on_the_cpu_and_below_a_size(launches: list[str]) -> None:
    large, small = (torch.ones(int(mebibytes * 2**18), device=DEVICE) for mebibytes in (4, 3))
    euler_step(small, small, 0.3, activation="relu")
    euler_step(large, large, 0.3)  # one kernel of torch's does that
    euler_step(large.cpu(), large.cpu(), 0.3, activation="relu")
    assert launches == []
    euler_step(large, large, 0.3, activation="relu")
    assert launches == (["step_forward"] if GPU else [])


@pytest.mark.parametrize("name", ["ACTIVATION", "LAYER_SCALE", "BATCH_NORM", "LAYER_NORM", "RMS_NORM", "WRITTEN_OUT"])
def test_auto_takes_a_kernel_from_the_size_on_at_which_it_pays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pays = getattr(kernels, name)
    monkeypatch.setattr(kernels, "_works", lambda device: True)
    with torch._subclasses.FakeTensorMode():
        for mebibytes in (0.5, 1, 3, 4, 8, 16, 32, 64, 128):
            x = torch.empty(int(mebibytes * 2**20), dtype=torch.int8, device="cuda").view(torch.bfloat16)
            monkeypatch.setattr(kernels, "_TENSORS", (type(x), torch.nn.Parameter))
            monkeypatch.setattr(kernels, "transformed", lambda: False)
            assert kernels.chosen(x, x, pays) == (mebibytes >= pays.without)
            assert kernels.chosen(x, x.clone().requires_grad_(), pays) == (mebibytes >= pays.backward)
            with torch.no_grad():
                assert kernels.chosen(x, x.clone().requires_grad_(), pays) == (mebibytes >= pays.without)
            assert not kernels.chosen(x, x, None)


def test_errors_say_what_to_call(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2, 3)
    with pytest.raises(EulernetError, match=r"mode\('fast'\) is not known; use one of 'auto', 'torch', 'triton'"):
        kernels.mode("fast")  # type: ignore[arg-type]
    with pytest.raises(EulernetError, match=r"activation='tanh' is not known; use None, 'relu', 'silu', 'gelu'"):
        euler_step(x, x, 0.1, activation="tanh")  # type: ignore[arg-type]
    with pytest.raises(EulernetError, match=r"drop_path=1.5 is not a probability in \[0, 1\)"):
        euler_step(x, x, 0.1, drop_path=1.5)
    with pytest.raises(EulernetError, match="kind='batch_norm' is not known"):
        euler_step_norm(x, x, 0.1, kind="batch_norm")  # type: ignore[arg-type]
    with pytest.raises(EulernetError, match="rms_norm has no bias"):
        euler_step_norm(x, x, 0.1, bias=torch.ones(3), kind="rms_norm")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with kernels.mode("triton"), pytest.raises(EulernetError, match="TRITON_INTERPRET=1 before Python starts"):
        euler_step(x, x, 0.1)


def test_where_triton_does_not_run_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a C compiler, for one; the original, which needs none, runs there too."""

    class Missing:
        @property
        def active(self) -> Any:
            raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr("triton.runtime.driver", Missing())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    kernels._works.cache_clear()
    with pytest.warns(eulernet.EulernetWarning, match=r'C compiler.*mode\("torch"\)'):
        assert not kernels._works(0)
    assert not kernels._works(0)  # and says so once
    kernels._works.cache_clear()
    x = torch.ones(2**20, device=DEVICE)
    monkeypatch.setattr(kernels, "_works", lambda device: False)
    assert not kernels.chosen(x, x, kernels.ACTIVATION)


def test_every_kernel_compiles_for_a_gpu_with_accesses_of_16_bytes(tmp_path: Path) -> None:
    """The interpreter runs what the compiler might refuse. Compiling needs no GPU."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(Path(__file__).parents[1] / "ptx.py")]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    compiled = json.loads(output)
    assert {name for name, _, _ in compiled} == {
        name for name, value in vars(_device).items() if name[0] != "_" and hasattr(value, "fn")
    }
    for name, dtype, accesses in compiled:
        wide = [access for access in accesses if access.endswith(("v4.b32", "v2.b64"))]
        streams = 2 + (name.startswith("norm"))  # of those loaded, and as many stored but for one
        assert len([access for access in wide if access.startswith("ld")]) >= streams, (name, dtype, accesses)
        stored = any(access.startswith("st") for access in wide)
        assert stored or name == "sum_parts", (name, dtype, accesses)  # which stores no stream


def ptxas() -> Path:
    """NVIDIA's assembler, and beside it what reads its results."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


@pytest.mark.skipif(not ptxas().exists(), reason="needs the ptxas that the package triton carries")
def test_what_real_models_launch_fits_a_multiprocessor(tmp_path: Path) -> None:
    """Compiled for an H100: few registers, nothing spilled, accesses of 16 bytes, and sums in one wave of programs.

    Of two dtypes the wider one is accessed by 16 bytes.
    """
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, str(Path(__file__).parents[1] / "launched.py")]
    rows = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    kinds = {(row["model"].split(",")[0], row["training"], row["kernel"]) for row in rows}
    for model, training, kernel in (
        ("ResNet-50", False, "bn_forward"), ("ResNet-50", True, "step_backward"), ("ConvNeXt", True, "step_backward"),
        ("ViT", False, "norm_forward"), ("ViT", True, "norm_backward"), ("BERT", True, "norm_backward"),
        ("Llama", True, "norm_backward"), ("Llama", True, "sum_parts"),
    ):  # fmt: skip
        assert (model, training, kernel) in kinds
    assert {"bfloat16", "float32"} in [set(row.get("dtypes", [])) for row in rows]
    for row in rows:
        warps, registers = row["warps"], -(-row["registers"] // 8) * 8 * 32
        assert row["spilled"] == 0, row
        # Of those that go over several tiles a multiprocessor holds few programs; of the others it is to hold many.
        assert row["registers"] <= (128 if "multiprocessors" in row else 64), row
        if "multiprocessors" in row:  # these go over several tiles, and none waits for a second wave
            together = min(65536 // (registers * warps), 64 // warps, 224 * 1024 // max(1, row["shared"]))
            assert row["programs"] <= row["multiprocessors"] * together, row
        for direction in {"ld", "st"} & row.keys():
            assert row[direction]["by vectors"] >= row[direction]["bytes"] > 0, row
    assert any("multiprocessors" in row for row in rows)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it fails
import torch, eulernet
from eulernet.functional import euler_step, euler_step_bn, euler_step_norm
x = torch.ones(2, 3)
assert euler_step(x, x, 0.5, activation="relu", layer_scale=x[0], drop_path=0.0).tolist() == [[1.5] * 3] * 2
assert euler_step_norm(x, x, 0.5)[0].tolist() == [[1.5] * 3] * 2
assert euler_step_bn(x, x, 0.5, x[0], x[0]).shape == (2, 3)
try:
    eulernet.kernels.mode("triton")
except eulernet.EulernetError as error:
    assert "pip install triton" in str(error)
else:
    raise AssertionError
"""


def test_without_triton_all_works() -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", WITHOUT_TRITON], check=True)


def test_importing_and_using_eulernet_on_the_cpu_does_not_import_triton() -> None:
    code = (
        "import sys, torch, eulernet; x = torch.ones(2)\n"
        "eulernet.functional.euler_step(x, x, 0.5, activation='relu')\n"
        "assert not any(name.partition('.')[0] == 'triton' for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------------------------------------------------------- walks


def test_the_kernels_are_a_public_name() -> None:
    assert eulernet.kernels is kernels and kernels.__all__ == ["mode"]

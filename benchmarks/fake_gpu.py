"""A driver for Triton without a GPU: kernels are compiled for sm_90 and not run, so that the host's time remains.

What a fused step costs on the host does not depend on what the GPU does meanwhile. CPU tensors stand for the GPU's.
"""

from __future__ import annotations

import os
from typing import Any

import torch

PROPERTIES = {
    "max_shared_mem": 232448,
    "multiprocessor_count": 132,
    "warpSize": 32,
    "max_num_regs": 65536,
    "sm_clock_rate": 1,
    "mem_clock_rate": 1,
    "mem_bus_width": 1,
}
launches = 0


class _Utilities:
    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, 1, 32, 0, 1024

    def unload_module(self, module: int) -> None: ...

    def get_device_properties(self, device: int) -> dict[str, int]:
        return PROPERTIES


class _Launcher:
    def __init__(self, source: Any, metadata: Any) -> None: ...

    def __call__(self, *arguments: Any) -> None:
        global launches
        launches += 1


def install() -> None:
    """Make it Triton's driver, in this process and for good; before any kernel of eulernet was imported."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import GPUDriver
    from triton.runtime import driver

    class Driver(GPUDriver):  # type: ignore[misc]
        def __init__(self) -> None:
            self.utils = _Utilities()
            self.launcher_cls = _Launcher
            self.get_device_capability = lambda device=0: (9, 0)
            self.get_current_stream = lambda device: 0
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        @staticmethod
        def is_active() -> bool:
            return True

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_benchmarker(self) -> Any:
            raise NotImplementedError

    triton.knobs.runtime.interpret = False  # kernels are compiled ...
    os.environ["TRITON_INTERPRET"] = "1"  # ... though eulernet, which asks for this on the CPU, finds the interpreter
    driver.set_active(Driver())

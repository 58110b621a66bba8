"""How much is run: in earnest on a GPU, or tiny, which shows that all of it runs and measures nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """What the parts are to be like.

    Args:
        device: `"cuda"` or `"cpu"`.
        cache: bytes that rotate past the largest cache.
        mebibytes: of a tensor, the size that decides first.
        calls: of an operation in one timing.
        rounds: timings of each candidate.
        backend: of `torch.compile`.
        workers: processes that check and compile at the same time.
        seconds: for how long a model is timed.
    """

    device: str
    cache: int
    mebibytes: tuple[float, ...]
    calls: int
    rounds: int
    backend: str
    workers: int
    seconds: float

    @property
    def tiny(self) -> bool:
        return self.device == "cpu"


TINY = Sizes("cpu", 2**17, (2**-5,), calls=2, rounds=2, backend="aot_eager", workers=2, seconds=0.0)
# Four times 64 MiB: the second-level cache of an H100 has 50 MB, that of an H200 60.
EARNEST = Sizes("cuda", 4 * 2**26, (16, 64, 256, 1), calls=20, rounds=9, backend="inductor", workers=12, seconds=1.0)

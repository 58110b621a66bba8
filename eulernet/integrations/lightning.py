"""A callback for Lightning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

try:
    import lightning.pytorch as pl
except ImportError:
    import pytorch_lightning as pl

from eulernet._patch.patch import is_patched, patch, set_h, steps
from eulernet._patch.select import HLike
from eulernet._run.patched import KEY
from eulernet._step import Steps
from eulernet._tune.scheduler import HScheduler
from eulernet.integrations._run import Run


class EulerCallback(pl.Callback):  # type: ignore[misc]
    """Patch a module of a `LightningModule`, move h while it trains, log it, and save it with each checkpoint.

    h is a function of the Trainer's number of steps, so that a resumed run goes on where it was. A checkpoint is taken
    by `eulernet.patch(model, h=Path("last.ckpt"))`.

    Args:
        h: the step factor, or where it begins, as for `eulernet.patch`. A model that is patched already stays so.
        end: where h goes, as for `eulernet.HScheduler`; None to keep it.
        kind: how, as for `eulernet.HScheduler`.
        name: which module of the LightningModule to patch, `"net"` for `self.net`; by default all of it.
        options: further arguments of `eulernet.patch`, such as `example_inputs`, `preserve` or `trainable`.

    Example:
        >>> from eulernet.integrations.lightning import EulerCallback  # doctest: +SKIP
        >>> callback = EulerCallback(h=1.0, end=0.1, name="net")  # doctest: +SKIP
    """

    def __init__(
        self,
        h: HLike = 0.1,
        *,
        end: HLike | None = None,
        kind: Literal["linear", "cosine", "exponential"] = "linear",
        name: str = "",
        **options: Any,
    ) -> None:
        self._run, self._name = Run(h, end, kind, options), name

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Before the optimiser is made, which sees a learned h."""
        self._run.patch(self._model(pl_module))

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if KEY in checkpoint:
            model, saved = self._model(pl_module), Steps.from_json(checkpoint[KEY])
            set_h(model, saved) if is_patched(model) else patch(model, saved, **self._run.options)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = steps(self._model(pl_module)).to_json()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        total = int(trainer.estimated_stepping_batches) if self._run.end is not None else 1
        self._run.begin(self._model(pl_module), trainer.global_step, total, trainer.log_every_n_steps)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self._run.measure()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0:
            pl_module.log_dict(self._run.shown(self._model(pl_module)))
        self._run.at(trainer.global_step)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._run.end_()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._run.end_()

    def _model(self, pl_module: Any) -> Any:
        return pl_module.get_submodule(self._name)


class LightningHScheduler(torch.optim.lr_scheduler.LRScheduler):
    """An `HScheduler` for `configure_optimizers`, where Lightning takes nothing but schedulers of torch.

    The learning rates of the optimizer stay as they are.

    Args:
        schedule: what moves h.
        optimizer: the one that `configure_optimizers` returns beside it.

    Example:
        >>> def configure_optimizers(self):
        ...     optimizer = torch.optim.SGD(self.parameters(), 0.1)
        ...     schedule = eulernet.HScheduler(self.net, 1.0, 0.1, total_steps=1000)
        ...     return [optimizer], [{"scheduler": LightningHScheduler(schedule, optimizer), "interval": "step"}]
    """

    def __init__(self, schedule: HScheduler, optimizer: torch.optim.Optimizer) -> None:
        self.schedule, self.optimizer = schedule, optimizer  # the rest of an LRScheduler is for learning rates
        self.base_lrs = self.get_last_lr()

    def step(self, epoch: int | None = None) -> None:
        self.schedule.step()

    def get_last_lr(self) -> list[float | torch.Tensor]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return self.schedule.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.schedule.load_state_dict(state_dict)

"""A callback for the Trainer of Hugging Face."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import transformers

from eulernet._patch.patch import set_h, steps
from eulernet._patch.select import HLike
from eulernet.integrations._run import Run


class EulerCallback(transformers.TrainerCallback):  # type: ignore[misc]
    """Patch the model of a `transformers.Trainer`, move h while it trains, log it, and save it with each checkpoint.

    h is a function of the Trainer's own number of steps, so that a resumed run goes on where it was. Each
    `checkpoint-N`, and at the end the `output_dir`, gets an `eulernet.json`; `eulernet.patch(model, h=Path(FOLDER))`
    patches a model again from it. With `load_best_model_at_end` the model has the best checkpoint's h in the end.

    `Trainer(..., callbacks=[EulerCallback(...)])` does that, with h and the sizes of steps in `state.log_history`. For
    TensorBoard, W&B and others: `EulerCallback(...).attach(trainer)`. A learned h has no weight decay in any Trainer.

    Args:
        h: the step factor, or where it begins, as for `eulernet.patch`. A model that is patched already stays so.
        end: where h goes, as for `eulernet.HScheduler`; None to keep it.
        kind: how, as for `eulernet.HScheduler`.
        options: further arguments of `eulernet.patch`, such as `preserve` or `trainable`.

    Example:
        >>> from eulernet.integrations.huggingface import EulerCallback
        >>> callback = EulerCallback(h=1.0, end=0.1, kind="cosine")
    """

    def __init__(
        self,
        h: HLike = 0.1,
        *,
        end: HLike | None = None,
        kind: Literal["linear", "cosine", "exponential"] = "linear",
        **options: Any,
    ) -> None:
        self._run = Run(h, end, kind, options)

    def attach(self, trainer: Any) -> EulerCallback:
        """Be the first callback of a Trainer, so that what reports after it sees h; patch its model; returns itself."""
        self._run.patch(trainer.model)
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if model is not None:  # None where the Trainer makes it by model_init
            self._run.patch(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._run.patch(model)
        self._run.begin(model, state.global_step, state.max_steps, int(state.logging_steps or 1))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._run.measure()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._run.at(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **kwargs: Any) -> None:
        if logs is not None and "loss" in logs:
            shown = self._run.shown(model)
            logs.update(shown)
            if state.log_history:
                state.log_history[-1].update(shown)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            name = f"checkpoint-{state.global_step}"  # in a folder of its own in a search of hyperparameters
            for folder in (Path(args.output_dir) / name, *Path(args.output_dir).glob(f"run-*/{name}")):
                if folder.is_dir():
                    steps(model).save(folder)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._run.end_()
        if args.load_best_model_at_end and state.best_model_checkpoint:
            set_h(model, Path(state.best_model_checkpoint))
        if state.is_world_process_zero and Path(args.output_dir).is_dir():
            steps(model).save(args.output_dir)

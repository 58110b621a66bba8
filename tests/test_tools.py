"""Trainers that people use: h moves, is logged, saved, and goes on where it was."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import eulernet
from tests.helpers.native import Written

pytestmark = [pytest.mark.tools, pytest.mark.filterwarnings("default")]
IMAGE = torch.zeros(2, 8, 4, 4)


def hs(model: nn.Module) -> list[float | None]:
    return [step.h for step in eulernet.steps(model)]


class Texts(torch.utils.data.Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": torch.arange(8) + i, "labels": i % 2}


def bert() -> Any:
    tf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return tf.BertForSequenceClassification(tf.BertConfig(vocab_size=50, max_position_embeddings=16, **size))


def trainer(folder: Path, callback: Any = None, **kwargs: Any) -> Any:
    tf = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    given = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 4, **kwargs}
    args = tf.TrainingArguments(str(folder), report_to=[], use_cpu=True, disable_tqdm=True, **given)
    return tf.Trainer(bert(), args, train_dataset=Texts(), callbacks=[callback] if callback else [])


def test_a_trainer_that_resumes_ends_where_the_whole_run_does(tmp_path: Path) -> None:
    from eulernet.integrations.huggingface import EulerCallback

    whole = trainer(tmp_path, EulerCallback(h=1.0, end=0.1))
    whole.train()
    assert set(hs(whole.model)) == {0.1}
    saved = {n: json.loads((tmp_path / f"checkpoint-{n}/eulernet.json").read_text())["steps"][0]["h"] for n in (2, 4)}
    assert saved == {2: pytest.approx(0.55), 4: 0.1}
    resumed = trainer(tmp_path, EulerCallback(h=1.0, end=0.1))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert set(hs(resumed.model)) == {0.1}
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    again = eulernet.patch(bert(), h=tmp_path)
    assert set(hs(again)) == {0.1}


def test_a_checkpoint_of_a_trainer_holds_the_steps_without_a_callback(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    eulernet.patch(run.model, {"bert.encoder.layer.0.output": 0.5, "*": 0.2})
    run.train()
    again = trainer(tmp_path)
    eulernet.patch(again.model, tmp_path / "checkpoint-2")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert hs(again.model) == hs(run.model)
    for one, other in zip(run.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_reporter_of_the_trainer_sees_h_and_the_sizes_of_steps(tmp_path: Path) -> None:
    from eulernet.integrations.huggingface import EulerCallback

    tf = pytest.importorskip("transformers")
    seen: list[dict[str, float]] = []

    class Reporter(tf.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    run = trainer(tmp_path, Reporter())
    EulerCallback(h=1.0, end=0.5).attach(run)
    run.train()
    assert [logs["h"] for logs in seen if "loss" in logs] == [0.875, 0.75, 0.625, 0.5]
    assert sum(name.startswith("step_size/") for name in seen[0]) == 4


def test_the_trainer_does_not_decay_a_learned_h(tmp_path: Path) -> None:
    from eulernet.integrations.huggingface import EulerCallback

    run = trainer(tmp_path, weight_decay=0.1)
    EulerCallback(h=0.1, trainable=True).attach(run)
    run.create_optimizer()
    names = {id(p): name for name, p in run.model.named_parameters()}
    groups = {names[id(p)]: g["weight_decay"] for g in run.optimizer.param_groups for p in g["params"]}
    assert {decay for name, decay in groups.items() if "log_h" in name} == {0.0}
    assert {decay for name, decay in groups.items() if name.endswith("query.weight")} == {0.1}


def lightning_run(folder: Path, callback: Any = None, ckpt: Any = None) -> Any:
    pl = pytest.importorskip("lightning.pytorch")
    from eulernet.integrations.lightning import LightningHScheduler

    class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(Written(8), Written(8))

        def training_step(self, batch: Any, index: int) -> Any:
            return self.net(batch).square().mean()

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            if callback is not None:
                return optimizer
            eulernet.patch(self.net, 1.0, example_inputs=IMAGE)
            schedule = eulernet.HScheduler(self.net, 1.0, 0.1, total_steps=4)
            schedule = LightningHScheduler(schedule, optimizer)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    data: Any = torch.utils.data.DataLoader(torch.ones(8, 8, 4, 4), 2)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "log_every_n_steps": 1}
    logger = pl.loggers.CSVLogger(folder)
    each = pl.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)
    callbacks = [each, *([callback] if callback else [])]
    run = pl.Trainer(max_steps=4, logger=logger, default_root_dir=folder, callbacks=callbacks, **quiet)
    module = Module()
    run.fit(module, data, ckpt_path=ckpt, weights_only=False) if ckpt else run.fit(module, data)
    run.logger.save()
    return run, module


def test_lightning_takes_an_h_scheduler_from_configure_optimizers(tmp_path: Path) -> None:
    assert hs(lightning_run(tmp_path)[1].net) == [0.1, 0.1]


def test_lightning_moves_logs_saves_and_resumes_h(tmp_path: Path) -> None:
    pytest.importorskip("lightning.pytorch")
    from eulernet.integrations.lightning import EulerCallback

    def callback() -> Any:
        return EulerCallback(h=1.0, end=0.1, name="net", example_inputs=IMAGE)

    run, whole = lightning_run(tmp_path, callback())
    assert hs(whole.net) == [0.1, 0.1]
    table = next(tmp_path.rglob("metrics.csv")).read_text()
    assert "step_size/" in table.splitlines()[0] and ",h," in f",{table.splitlines()[0]},"
    run.save_checkpoint(tmp_path / "whole.ckpt")
    again = eulernet.patch(nn.Sequential(Written(8), Written(8)), tmp_path / "whole.ckpt", example_inputs=IMAGE)
    assert hs(again) == [0.1, 0.1]

    half = eulernet.patch(nn.Sequential(Written(8), Written(8)), tmp_path / "step=2.ckpt", example_inputs=IMAGE)
    assert hs(half) == [0.55, 0.55]
    with warnings.catch_warnings():
        warnings.simplefilter("error", eulernet.EulernetWarning)
        _, resumed = lightning_run(tmp_path / "resumed", callback(), tmp_path / "step=2.ckpt")
    assert hs(resumed.net) == [0.1, 0.1]
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_module_of_lightning_takes_its_steps_from_its_checkpoint(tmp_path: Path) -> None:
    pl = pytest.importorskip("lightning.pytorch")

    class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, h: float | None = None) -> None:
            super().__init__()
            self.net = nn.Sequential(Written(8), Written(8))
            if h is not None:
                eulernet.patch(self.net, h, example_inputs=IMAGE)

        def training_step(self, batch: Any, index: int) -> Any:
            return self.net(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "logger": False}
    run, module = pl.Trainer(max_steps=1, default_root_dir=tmp_path, **quiet), Module(0.3)
    run.fit(module, torch.utils.data.DataLoader(torch.ones(8, 8, 4, 4), 2))
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = Module.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    eulernet.patch(again.net, tmp_path / "last.ckpt", example_inputs=IMAGE)
    assert torch.equal(again.net(IMAGE + 1), module.net(IMAGE + 1)) and hs(again.net) == [0.3, 0.3]
    with pytest.warns(eulernet.EulernetWarning, match="saved at h = 0.3, and are loaded into steps with h = 0.5"):
        Module.load_from_checkpoint(tmp_path / "last.ckpt", h=0.5, weights_only=False)


def test_accelerate_keeps_the_state_of_a_schedule(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    states: list[Any] = []
    for _ in range(2):
        accelerator = accelerate.Accelerator(cpu=True)
        model = eulernet.patch(nn.Sequential(Written(8)), 1.0, example_inputs=IMAGE)
        schedule = eulernet.HScheduler(model, 1.0, 0.1, total_steps=2)
        model = accelerator.prepare(model)
        accelerator.register_for_checkpointing(schedule)
        if not states:
            schedule.step()
            accelerator.save_state(str(tmp_path / "state"))
        else:
            accelerator.load_state(str(tmp_path / "state"))
        states.append(hs(model))
    assert states[0] == states[1] == [0.55]


def llama() -> Any:
    tf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=50, num_key_value_heads=2, **size)).eval()


def with_lora(model: nn.Module) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    )


@pytest.mark.parametrize("trainable", [False, True, "model"])
def test_an_adapter_keeps_the_steps(trainable: Any, tmp_path: Path) -> None:
    """Also those that are learned, on a model that is patched before the adapter is put on it, or after."""
    peft = pytest.importorskip("peft")
    model = eulernet.patch(with_lora(llama()), 0.3, trainable=trainable)
    learned = [p for name, p in model.named_parameters() if "log_h" in name]
    assert all(p.requires_grad for p in learned) and bool(learned) == bool(trainable)
    for parameter in learned:
        parameter.data.fill_(-1.0)
    model.save_pretrained(tmp_path)
    ids = torch.arange(1, 9)[None]
    before = peft.PeftModel.from_pretrained(eulernet.patch(llama(), tmp_path), tmp_path)
    after = eulernet.patch(peft.PeftModel.from_pretrained(llama(), tmp_path), tmp_path)
    wanted = model.eval()(ids).logits
    for again in (before, after):
        assert hs(again) == hs(model)
        assert torch.equal(again.eval()(ids).logits, wanted) or trainable
        torch.testing.assert_close(again(ids).logits, wanted)  # exp, in another precision


def test_what_was_merged_is_saved_with_its_steps(tmp_path: Path) -> None:
    merged = eulernet.patch(with_lora(llama()), 0.3).merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = eulernet.patch(llama(), tmp_path)
    assert hs(again) == [0.3] * 4


def test_a_learned_h_that_peft_froze_is_noticed_once() -> None:
    ids = torch.arange(1, 9)[None]
    model = with_lora(eulernet.patch(llama(), 0.3, trainable="model")).train()
    with pytest.warns(eulernet.EulernetWarning, match=r"frozen.*patch\(get_peft_model\(model, config\), h=0.1, train"):
        model(ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error", eulernet.EulernetWarning)
        model(ids)
        with_lora(eulernet.patch(llama(), 0.3, trainable=True)).eval()(ids)
        deliberate = eulernet.patch(llama(), 0.3, trainable=True).train()
        for name, parameter in deliberate.named_parameters():
            parameter.requires_grad_("log_h" not in name)
        deliberate(ids)


def test_a_patch_inside_a_peft_model_says_what_to_patch() -> None:
    with pytest.warns(eulernet.EulernetWarning, match=r"Patch that: eulernet\.patch\(peft_model, h=0\.1\)"):
        eulernet.patch(with_lora(llama()).get_base_model(), 0.3)

"""Trainers, adapters, and searches of hyperparameters."""

from tests.support.base import Row

_GROUP, _ADAPTERS, _SEARCH = "Trainers", "Hugging Face and PEFT", "Search for h"
_PATCH = "eulernet.patch(model, 0.3, example_inputs=x)"
_HF = ("transformers",)
_LORA = """
from peft import LoraConfig, PeftModel, get_peft_model
config = LoraConfig(target_modules=["q_proj"], r=2)
"""
_TRAINER = """
import transformers as tf
tf.utils.logging.set_verbosity_error()
class Data(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, i): return {"input_ids": torch.arange(8) + i, "labels": torch.arange(8) + i}
args = tf.TrainingArguments(str(folder), max_steps=2, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
args.learning_rate = 0.0
"""
_LIGHTNING = """
import lightning.pytorch as pl
import logging
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network()
    def training_step(self, batch, index): return self.net(batch).square().mean()
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), 0.0)
quiet = dict(enable_progress_bar=False, enable_model_summary=False, logger=False, accelerator="cpu")
module, data = Module(), torch.utils.data.DataLoader(torch.ones(4, 8), 2)
"""
_ENDS = "assert {step.h for step in eulernet.steps(model)} == {0.3}"

ROWS = [
    Row(
        _GROUP,
        "Trainer",
        "trainer = tf.Trainer(model, args, train_dataset=Data()); EulerCallback(h=1.0, end=0.3).attach(trainer); "
        "trainer.train()",
        before=f"{_TRAINER}from eulernet.integrations.huggingface import EulerCallback",
        after=f"{_ENDS}\nmodel.eval()",
        result="model(x).logits",
        model="llama",
        needs=("transformers", "accelerate"),
    ),
    Row(
        _GROUP,
        "Trainer",
        "tf.Trainer(eulernet.patch(model, 0.3), args, train_dataset=Data()).train()",
        before=_TRAINER,
        after="model = eulernet.patch(network(), folder / 'checkpoint-2').eval()",
        result="model(x).logits",
        model="llama",
        needs=("transformers", "accelerate"),
    ),
    Row(
        _GROUP,
        "Lightning",
        'callback = EulerCallback(h=1.0, end=0.3, name="net", example_inputs=x); '
        "pl.Trainer(callbacks=[callback], **options).fit(module, data)",
        before=f"{_LIGHTNING}from eulernet.integrations.lightning import EulerCallback\n"
        "options = dict(max_steps=2, default_root_dir=folder, **quiet)",
        after="model = module.net",
        result="model(x)",
        needs=("lightning",),
    ),
    Row(
        _GROUP,
        "Lightning",
        'module = Module.load_from_checkpoint("last.ckpt"); '
        'eulernet.patch(module.net, Path("last.ckpt"), example_inputs=x)',
        before=f"""{_LIGHTNING}
import os
from pathlib import Path
eulernet.patch(module.net, 0.3, example_inputs=x)
run = pl.Trainer(max_steps=1, default_root_dir=folder, **quiet)
run.fit(module, data)
os.chdir(folder)
run.save_checkpoint("last.ckpt")
""",
        result="module.net(x)",
        needs=("lightning",),
    ),
    Row(
        _GROUP,
        "timm's train.py",
        "eulernet.patch(model, h=0.3); optimizer = create_optimizer_v2(model, opt='adamw', lr=0.0, weight_decay=0.1)",
        before="from timm.optim import create_optimizer_v2",
        after="model(x).square().sum().backward()\noptimizer.step()",
        result="model(x).detach()",
        model="vit",
        needs=("timm",),
    ),
    Row(
        _ADAPTERS,
        "save_pretrained",
        "eulernet.patch(model, 0.3).save_pretrained(folder); "
        "model = eulernet.patch(type(model).from_pretrained(folder), folder)",
        after="model.eval()",
        result="model(x).logits",
        model="llama",
        needs=_HF,
    ),
    Row(
        _ADAPTERS,
        "save_pretrained",
        "eulernet.patch(type(model).from_pretrained(folder), 0.5)",
        "noticed",
        r"had h = 0\.3, and gets h = 0\.5",
        before="eulernet.patch(network(), 0.3).save_pretrained(folder)",
        model="llama",
        needs=_HF,
    ),
    Row(
        _ADAPTERS,
        "LoRA",
        "model = eulernet.patch(get_peft_model(model, config), 0.3, trainable=True); model.save_pretrained(folder)",
        before=_LORA,
        after="model = PeftModel.from_pretrained(eulernet.patch(network(), folder), folder)",
        result="model(x).logits.detach()",
        model="llama",
        needs=("transformers", "peft"),
    ),
    Row(
        _ADAPTERS,
        "LoRA",
        "model = get_peft_model(eulernet.patch(model, 0.3), config); eulernet.steps(model).save(folder)",
        before=_LORA,
        after="model.save_pretrained(folder)\n"
        "model = PeftModel.from_pretrained(eulernet.patch(network(), folder), folder)",
        result="model(x).logits.detach()",
        model="llama",
        needs=("transformers", "peft"),
    ),
    Row(
        _ADAPTERS,
        "LoRA",
        "get_peft_model(eulernet.patch(model, 0.3, trainable=True), config).train()(x)",
        "noticed",
        r"frozen.*patch\(get_peft_model\(model, config\), h=0\.1, trainable=True\)",
        before=_LORA,
        model="llama",
        needs=("transformers", "peft"),
    ),
    Row(
        _ADAPTERS,
        "LoRA",
        "eulernet.patch(get_peft_model(model, config).get_base_model(), 0.3)",
        "noticed",
        r"eulernet\.patch\(peft_model, h=0\.1\)",
        before=_LORA,
        model="llama",
        needs=("transformers", "peft"),
    ),
    Row(
        _SEARCH,
        "Optuna",
        'study.optimize(lambda t: eulernet.set_h(model, t.suggest_float("h", 0.01, 1, log=True))(x).norm().item(), 3)',
        before=f"import optuna\noptuna.logging.disable_default_handler()\nstudy = optuna.create_study()\n{_PATCH}",
        after="assert len(study.trials) == 3\neulernet.set_h(model, 0.3)",
        needs=("optuna",),
    ),
    Row(
        _SEARCH,
        "Ray",
        f"model = ray.cloudpickle.loads(ray.cloudpickle.dumps({_PATCH}))",
        before="import ray",
        needs=("ray",),
    ),
]

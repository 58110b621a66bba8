"""`save_pretrained` of anybody writes the steps beside the weights, and what was saved at another h is noticed."""

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eulernet
from tests.helpers.native import Written

tf = pytest.importorskip("transformers")
TEXT = torch.arange(1, 9)[None]


def llama() -> Any:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=50, num_key_value_heads=2, **size)).eval()


def hs(model: nn.Module) -> list[float | None]:
    return [step.h for step in eulernet.steps(model)]


def loaded(folder: Path) -> Any:
    return tf.LlamaForCausalLM.from_pretrained(folder).eval()


def test_a_folder_of_save_pretrained_patches_a_model_again(tmp_path: Path) -> None:
    model = eulernet.patch(llama(), [0.1, 0.2, 0.3, 0.4])
    model.save_pretrained(tmp_path)
    again = eulernet.patch(loaded(tmp_path), Path(tmp_path))
    assert hs(again) == [0.1, 0.2, 0.3, 0.4]
    assert torch.equal(again(TEXT).logits, model(TEXT).logits)
    assert "euler" not in (tmp_path / "config.json").read_text()


def test_the_class_of_a_patched_model_makes_models_that_are_not(tmp_path: Path) -> None:
    model = eulernet.patch(llama(), 0.3)
    model.save_pretrained(tmp_path)
    for other in (type(model).from_pretrained(tmp_path), type(model)(model.config), unpatched(model)):
        assert not eulernet.is_patched(other)
        assert set(hs(eulernet.patch(copy.deepcopy(other), 0.3))) == {0.3}
        other.eval()(TEXT)
        other.half().save_pretrained(tmp_path / "other")
        assert not (tmp_path / "other" / "eulernet.json").exists()


def unpatched(model: Any) -> Any:
    other = eulernet.unpatch(copy.deepcopy(model))
    assert type(other) is tf.LlamaForCausalLM
    assert type(eulernet.fold(copy.deepcopy(model))) is tf.LlamaForCausalLM
    return other


def test_copies_and_pickles_write_their_own_steps(tmp_path: Path) -> None:
    model = eulernet.patch(llama(), 0.3)
    other = eulernet.set_h(pickle.loads(pickle.dumps(model)), 0.5)
    other.save_pretrained(tmp_path)
    assert set(hs(eulernet.patch(llama(), tmp_path))) == {0.5} and set(hs(model)) == {0.3}


def test_another_h_than_that_of_the_weights_is_noticed(tmp_path: Path) -> None:
    eulernet.patch(llama(), 0.3).save_pretrained(tmp_path)
    with pytest.warns(eulernet.EulernetWarning) as seen:
        eulernet.patch(loaded(tmp_path), 0.5)
    (said,) = [str(w.message) for w in seen]
    assert "model.layers.0:0 had h = 0.3, and gets h = 0.5" in said and f"h=Path('{tmp_path}'))" in said
    with pytest.warns(eulernet.EulernetWarning, match=r"model.layers.1:0 had h = 0.3, and gets no step"):
        eulernet.patch(loaded(tmp_path), 0.3, include="model.layers.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eulernet.patch(loaded(tmp_path), 0.3)
        eulernet.patch(loaded(tmp_path), tmp_path)


@pytest.mark.parametrize("trainable", ["step", "stage", "model"])
def test_a_learned_h_is_saved_also_where_steps_share_it(trainable: Any, tmp_path: Path) -> None:
    model = eulernet.patch(llama(), 0.3, trainable=trainable)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "log_h" in name:
                parameter.fill_(-1.0)
    model.save_pretrained(tmp_path)
    again = eulernet.patch(loaded(tmp_path), tmp_path, trainable=trainable)
    assert hs(again) == hs(model) and torch.equal(again(TEXT).logits, model(TEXT).logits)
    model.save_pretrained(tmp_path / "given", state_dict=model.state_dict())  # as the Trainer calls it
    assert hs(eulernet.patch(llama(), tmp_path / "given")) == hs(model)
    shared = {parameter.data_ptr() for name, parameter in model.named_parameters() if "log_h" in name}
    assert len(shared) == {"step": 4, "stage": 1, "model": 1}[trainable]


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    eulernet.patch(llama(), 0.3).save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "eulernet.json").exists()


def test_a_part_of_a_model_writes_the_steps_that_it_has(tmp_path: Path) -> None:
    model = eulernet.patch(llama(), 0.3)
    model.model.save_pretrained(tmp_path)
    assert [step.name for step in eulernet.Steps.from_json((tmp_path / "eulernet.json").read_text())] == [
        "layers.0:0",
        "layers.0:1",
        "layers.1:0",
        "layers.1:1",
    ]


def test_what_is_pushed_at_once_is_said_to_lack_the_steps(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(Written(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(x)

        def save_pretrained(self, folder: Path, push_to_hub: bool = False) -> str:
            return "pushed" if push_to_hub else "saved"

    model = eulernet.patch(Net(), 0.5, example_inputs=torch.zeros(2, 8, 4, 4))
    assert model.save_pretrained(tmp_path) == "saved" and (tmp_path / "eulernet.json").exists()
    with pytest.warns(eulernet.EulernetWarning, match=r"model\.push_to_hub\(REPO\)$"):
        assert model.save_pretrained(folder=tmp_path, push_to_hub=True) == "pushed"


def test_a_class_of_the_hub_writes_them_as_well(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")

    class Net(nn.Module, hub.PyTorchModelHubMixin):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(Written(8), Written(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(x)

    image = torch.zeros(2, 8, 4, 4)
    eulernet.patch(Net(), {"blocks.0": 0.5, "*": 0.2}, example_inputs=image, trainable=True).save_pretrained(tmp_path)
    again = eulernet.patch(Net(), tmp_path, example_inputs=image)
    assert hs(again) == pytest.approx([0.5, 0.2])


def test_the_trainer_of_hugging_face_decays_no_learned_h(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = eulernet.patch(llama(), 0.3, trainable=True)
    args = tf.TrainingArguments(str(tmp_path), weight_decay=0.1, report_to=[], use_cpu=True)
    run = tf.Trainer(model, args)
    run.create_optimizer()
    names = {id(p): name for name, p in model.named_parameters()}
    decay = {names[id(p)]: g["weight_decay"] for g in run.optimizer.param_groups for p in g["params"]}
    assert {decay[name] for name in decay if "log_h" in name} == {0.0} and 0.1 in decay.values()


def test_timm_decays_no_learned_h() -> None:
    timm, factory = pytest.importorskip("timm"), pytest.importorskip("timm.optim")
    model = eulernet.patch(timm.create_model("test_vit"), 0.3, trainable=True)
    optimizer = factory.create_optimizer_v2(model, opt="adamw", lr=0.1, weight_decay=0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    decay = {names[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert {decay[name] for name in decay if "log_h" in name} == {0.0} and 0.1 in decay.values()

"""Steps travel with the weights, and a model is patched again from wherever they are."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import eulernet
from tests.helpers.native import Mixed, Written

IMAGE = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
HS = {"0": 0.3, "1": 0.2, "2": 0.5}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Written(8), Written(8), Written(8))


def patched(**kwargs: Any) -> nn.Sequential:
    return eulernet.patch(net(), HS, example_inputs=IMAGE, **kwargs)


def hs(model: nn.Module) -> list[float | None]:
    return [step.h for step in eulernet.steps(model)]


def safetensors_file(model: nn.Module, folder: Path) -> Path:
    save = pytest.importorskip("safetensors.torch").save_file
    save(model.state_dict(), folder / "m.safetensors", metadata={"eulernet": eulernet.steps(model).to_json()})
    return folder / "m.safetensors"


def torch_file(saved: Any, folder: Path) -> Path:
    torch.save(saved, folder / "last.ckpt")
    return folder / "last.ckpt"


def beside(model: nn.Module, folder: Path) -> Path:
    torch.save({}, folder / "weights.pt")
    assert eulernet.steps(model).save(folder) == folder / "eulernet.json"
    return folder


CHECKPOINTS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "state dict": lambda model, _: model.state_dict(),
    "file": lambda model, folder: torch_file(model.state_dict(), folder),
    "state dict in a file": lambda model, folder: torch_file({"epoch": 1, "model": model.state_dict()}, folder),
    "folder with a file": lambda model, folder: torch_file(model.state_dict(), folder).parent,
    "steps beside": beside,
    "JSON": lambda model, folder: beside(model, folder) / "eulernet.json",
    "safetensors": safetensors_file,
    "wrapped": lambda model, _: nn.DataParallel(model).state_dict(),
    "part of another": lambda model, folder: torch_file(nn.ModuleDict({"net": model}).state_dict(), folder),
    "average": lambda model, _: AveragedModel(model).state_dict(),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_model_is_patched_again_from_its_checkpoint(kind: str, tmp_path: Path) -> None:
    saved = CHECKPOINTS[kind](patched(), tmp_path)
    again = eulernet.patch(net(), h=saved, example_inputs=IMAGE)
    assert hs(again) == [0.3, 0.2, 0.5]
    assert torch.equal(again(IMAGE), patched()(IMAGE))
    assert hs(eulernet.set_h(eulernet.patch(net(), 1.0, example_inputs=IMAGE), saved)) == [0.3, 0.2, 0.5]


def test_a_state_dict_has_no_new_key() -> None:
    assert list(patched().state_dict()) == list(net().state_dict())
    assert not any("eulernet" in of for of in net().state_dict()._metadata.values())  # type: ignore[attr-defined]


def test_a_model_inside_another_takes_the_steps_of_one_that_was_alone() -> None:
    model = nn.ModuleDict({"net": net()})
    model.forward = lambda x: model["net"](x)  # type: ignore[method-assign]
    assert hs(eulernet.patch(nn.Sequential(net()), patched().state_dict(), example_inputs=IMAGE)) == [0.3, 0.2, 0.5]


def test_the_steps_that_were_left_out_stay_out() -> None:
    some = eulernet.patch(net(), 0.3, include="1", example_inputs=IMAGE)
    again = eulernet.patch(net(), some.state_dict(), example_inputs=IMAGE)
    assert [step.name for step in eulernet.steps(again)] == ["1"]


def test_a_learned_h_is_read_from_the_weights() -> None:
    learned = patched(trainable=True)
    with torch.no_grad():
        learned[1].log_h_bias.fill_(-1.0)
    state = copy.deepcopy(learned.state_dict())
    fixed = eulernet.patch(net(), state, example_inputs=IMAGE)
    assert hs(fixed) == hs(learned) and fixed[1]._euler[0].value == pytest.approx(torch.tensor(-1.0).exp().item())
    again = eulernet.patch(net(), state, trainable=True, example_inputs=IMAGE)
    again.load_state_dict(state)
    assert hs(again) == hs(learned)


def test_weights_that_were_saved_at_another_h_are_noticed() -> None:
    state, model = patched().state_dict(), eulernet.patch(net(), 1.0, example_inputs=IMAGE)
    with pytest.warns(eulernet.EulernetWarning, match=r"saved at h = .*, and are loaded into steps with h = 1") as seen:
        model.load_state_dict(state)
    assert [str(w.message)[30:33] for w in seen] == ["0.3", "0.2", "0.5"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eulernet.set_h(model, state).load_state_dict(state)  # the same h
        model.load_state_dict(net().state_dict())  # nothing known
        net().load_state_dict(state)
        eulernet.HScheduler(model, total_steps=2)  # whose state is loaded besides
        model.load_state_dict(state)


def test_a_checkpoint_without_steps_is_an_error(tmp_path: Path) -> None:
    model = net()
    for h, words in (
        (net().state_dict(), "the state dict holds no steps of eulernet"),
        (torch_file(net().state_dict(), tmp_path), "last.ckpt holds no steps"),
        (tmp_path, "eulernet.steps(model).save(FOLDER)"),
        (tmp_path / "none", "there is no such file or folder"),
        (eulernet.patch(Mixed(), 0.1, example_inputs=torch.zeros(2, 3, 8, 8)).state_dict(), "no steps of this model"),
    ):
        with pytest.raises(eulernet.EulernetError) as error:
            eulernet.patch(model, h, example_inputs=IMAGE)
        assert words in str(error.value) and not eulernet.is_patched(model)


def test_a_file_that_is_no_plain_checkpoint_says_how_to_read_it(tmp_path: Path) -> None:
    torch.save(patched(), tmp_path / "model.pt")
    with pytest.raises(eulernet.EulernetError, match=r"pass what it holds: eulernet.patch\(model, h=checkpoint"):
        eulernet.patch(net(), tmp_path / "model.pt", example_inputs=IMAGE)


def test_copies_follow_the_model() -> None:
    model = patched()
    average = AveragedModel(model)
    assert eulernet.set_h([model, average], {"0": 0.7, "*": 0.6}) == [model, average]
    assert hs(model) == hs(average) == [0.7, 0.6, 0.6]
    schedule = eulernet.HScheduler([model, average], 1.0, 0.5, total_steps=2)
    schedule.step()
    assert hs(model) == hs(average) == schedule.get_last_h() == [0.75] * 3
    other = eulernet.HScheduler([model, average], total_steps=9)
    other.load_state_dict(schedule.state_dict())
    assert hs(average) == [0.75] * 3


def test_a_copy_with_other_steps_is_refused() -> None:
    model, other = patched(), eulernet.patch(net(), 0.3, include="1", example_inputs=IMAGE)
    with pytest.raises(eulernet.EulernetError, match="copy the model once it is patched"):
        eulernet.HScheduler([model, other], total_steps=2)
    with pytest.raises(eulernet.EulernetError):
        eulernet.set_h([model, other], {"0": 0.9, "*": 0.8})
    with pytest.raises(eulernet.EulernetError, match="the list of models is empty"):
        eulernet.set_h([], 0.1)
    assert hs(model) == [0.3, 0.2, 0.5] and hs(other) == [0.3]


def test_a_scheduler_says_how_lightning_takes_it() -> None:
    with pytest.raises(AttributeError, match=r"LightningHScheduler\(schedule, optimizer\)"):
        _ = eulernet.HScheduler(patched(), total_steps=2).optimizer

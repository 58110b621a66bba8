"""The example input that a model itself asks for, and those that its owner gives."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eulernet
from eulernet._find.inputs import as_arguments, guess_inputs


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + scale * self.a(x)


@pytest.mark.parametrize("example", [torch.zeros(3, 4), (torch.zeros(3, 4),), {"x": torch.zeros(3, 4), "scale": 2.0}])
def test_lightning_says_what_it_takes(example: Any) -> None:
    """A LightningModule's `example_input_array` is a tensor, a tuple or a dict."""
    model = Residual()
    assert guess_inputs(model) is None
    model.example_input_array = example
    assert guess_inputs(model) is not None
    assert [step.name for step in eulernet.find_steps(model)] == ["<root>"]
    assert eulernet.is_patched(eulernet.patch(model, 0.5))


@pytest.mark.parametrize("example", [torch.zeros(3, 4), (torch.zeros(3, 4), 2.0), [torch.zeros(3, 4)]])
def test_tensor_tuple_and_list_are_positional(example: Any) -> None:
    args, kwargs = as_arguments(example)
    assert torch.equal(args[0], torch.zeros(3, 4)) and kwargs == {}
    assert len(eulernet.find_steps(Residual(), example_inputs=example)) == 1


def test_a_dict_is_arguments_by_name() -> None:
    assert len(eulernet.find_steps(Residual(), example_inputs={"scale": 2.0, "x": torch.zeros(3, 4)})) == 1


@pytest.mark.parametrize(
    ("name", "arguments", "size"),
    [
        ("csatv2", {}, (3, 512, 512)),  # names no first convolution
        ("tresnet_m", {}, (3, 224, 224)),  # makes blocks of 4 by 4 pixels into channels first
        ("tresnet_m", {"in_chans": 1}, (1, 224, 224)),
        # Its configuration says 256, its patch embedding 336.
        ("vitamin_xlarge_336", {"depth": 1}, (3, 336, 336)),
    ],
)
def test_timm_size_is_the_models_own(name: str, arguments: dict[str, int], size: tuple[int, int, int]) -> None:
    timm = pytest.importorskip("timm")
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} does not have this model yet")
    args, _ = guess_inputs(timm.create_model(name, **arguments))
    assert args[0].shape[1:] == size


def test_channels_and_size_are_those_of_the_timm_model() -> None:
    timm = pytest.importorskip("timm")
    args, _ = guess_inputs(timm.create_model("test_vit", img_size=96, in_chans=1))
    assert args[0].shape == (2, 1, 96, 96)
    args, _ = guess_inputs(timm.create_model("test_resnet", in_chans=4))
    assert args[0].shape[:2] == (2, 4)


def test_each_family_of_torchvision_has_its_size() -> None:
    torchvision = pytest.importorskip("torchvision")
    shapes = {
        "resnet18": (2, 3, 224, 224),
        "inception_v3": (2, 3, 299, 299),
        "r3d_18": (2, 3, 16, 112, 112),
    }
    for name, shape in shapes.items():
        model = torchvision.models.get_model(name, weights=None, **({"init_weights": False} if "inc" in name else {}))
        args, _ = guess_inputs(model)
        assert args[0].shape == shape, name


def test_the_main_input_of_hugging_face_is_guessed() -> None:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 1}
    bert = transformers.BertModel(transformers.BertConfig(**small, vocab_size=50))
    _, kwargs = guess_inputs(bert)
    assert kwargs["input_ids"].dtype is torch.int64 and kwargs["input_ids"].max() < 50
    vit = transformers.ViTModel(transformers.ViTConfig(**small, image_size=32, patch_size=8, num_channels=1))
    _, kwargs = guess_inputs(vit)
    assert kwargs["pixel_values"].shape == (2, 1, 32, 32)


def test_guesses_follow_the_models_device_and_dtype() -> None:
    timm = pytest.importorskip("timm")
    args, _ = guess_inputs(timm.create_model("test_resnet").bfloat16())
    assert args[0].dtype is torch.bfloat16
    with torch.device("meta"):
        model = timm.create_model("test_resnet")
    args, _ = guess_inputs(model)
    assert args[0].device.type == "meta"


class Described(nn.Module):
    """As a model of diffusers describes itself."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = config
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = True
    ) -> Tensor:
        return sample + self.conv(sample) * encoder_hidden_states.mean() * timestep.sum()


Described.__module__ = "diffusers.models.described"


def test_diffusers_say_it_in_their_configuration() -> None:
    model = Described(in_channels=4, sample_size=8, cross_attention_dim=6)
    _, kwargs = guess_inputs(model)
    shapes = {name: tuple(value.shape) for name, value in kwargs.items()}
    assert shapes == {"sample": (2, 4, 8, 8), "timestep": (2,), "encoder_hidden_states": (2, 16, 6)}
    assert guess_inputs(Described(in_channels=4)) is None  # nothing says how wide the text is
    _, kwargs = guess_inputs(Described(in_channels=4, sample_size=(8, 6), caption_channels=5, num_frames=3))
    assert kwargs["sample"].shape == (2, 4, 3, 8, 6) and kwargs["encoder_hidden_states"].shape == (2, 16, 5)


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.a = nn.Embedding(10, 4), nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return x + self.a(x)


class Features(nn.Module):
    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return features["x"]


class Batch(nn.Module):
    def forward(self, batch, mask=None):  # type: ignore[no-untyped-def]
        return batch["x"]


class Two(Residual):
    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        return query + self.a(memory)


@pytest.mark.parametrize(
    ("model", "hint"),
    [
        (Text(), "example_inputs=torch.zeros(2, 16, dtype=torch.int64))"),
        (nn.Sequential(nn.Conv1d(5, 8, 3)), "example_inputs=torch.zeros(2, 5, 1024))"),
        (nn.Sequential(nn.Conv2d(1, 8, 3)), "example_inputs=torch.zeros(2, 1, 224, 224))"),
        (nn.Sequential(nn.Flatten(), nn.Linear(7, 8)), "example_inputs=torch.zeros(2, 7))"),
        (nn.LSTM(5, 8), "example_inputs=torch.zeros(2, 16, 5))"),
        (nn.ReLU(), "example_inputs=torch.zeros(2, 3, 224, 224))"),
        (Features(), "example_inputs=({'name': tensor, ...},))"),
        (Batch(), "example_inputs=({'name': tensor, ...},))"),
        (Two(), "example_inputs=(query, memory))"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_the_hint_fits_the_model(model: nn.Module, hint: str) -> None:
    with pytest.raises(eulernet.EulernetError) as error:
        eulernet.find_steps(model)
    assert str(error.value).endswith(hint)


class Forces(nn.Module):
    """A force field: the gradient of an energy, for which the caller's grad mode has to be on."""

    def __init__(self, detached: bool) -> None:
        super().__init__()
        self.detached = detached
        self.blocks, self.energy = nn.Sequential(Residual(), Residual()), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_() if self.detached else x.requires_grad_()
        energy = self.energy(torch.tanh(self.blocks(x))).sum()
        return -torch.autograd.grad(energy, x, create_graph=self.training)[0]


@pytest.mark.parametrize("detached", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_model_may_ask_for_gradients_in_its_forward(detached: bool, training: bool) -> None:
    model, x = Forces(detached).train(training), torch.randn(3, 4)
    before = model(x)
    eulernet.patch(model, 1.0, example_inputs=x)
    assert [step.name for step in eulernet.steps(model)] == ["blocks.0", "blocks.1"]
    assert torch.equal(model(x), before) and not x.grad_fn
    eulernet.set_h(model, 0.3)
    assert not torch.allclose(model(x), before)
    with pytest.raises(RuntimeError, match="does not require grad"), torch.no_grad():
        model(x)

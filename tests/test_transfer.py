"""From one depth to another: the rule, the groups of an optimiser, depth that is counted twice, the check."""

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import eulernet
from eulernet import EulernetWarning, schedules
from tests.helpers.refusals import refused

TOKENS = torch.arange(24).view(2, 12) % 50


def gpt2(blocks: int, width: int = 32, **changes: Any) -> nn.Module:
    """A GPT-2 with all projections alike at the start, unlike Hugging Face's, unless `projections` says so."""
    from transformers import GPT2Config, GPT2LMHeadModel

    projections = changes.pop("projections", 1.0)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=50, n_positions=16, n_embd=width, n_layer=blocks, n_head=2, bos_token_id=None, eos_token_id=None,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, **changes,
        )
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("c_proj.weight") and projections != "gpt2":
                parameter.normal_(0.0, 0.02 * projections)
    return model


# ------------------------------------------------------------------------------------------------------------- the rule


@pytest.mark.parametrize("blocks", [1, 2, 3, 8])
@pytest.mark.parametrize("alpha", [0.5, 0.75, 1.0])
def test_the_rule_is_its_formula(blocks: int, alpha: float) -> None:
    model = eulernet.patch(gpt2(blocks), h=schedules.transfer(4, alpha), example_inputs=TOKENS)
    assert [s.h for s in eulernet.steps(model)] == pytest.approx([(4 / (2 * blocks)) ** alpha] * 2 * blocks, rel=1e-15)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 0.7])
def test_at_the_base_depth_training_is_bit_identical(alpha: float) -> None:
    original = gpt2(3)
    model = eulernet.patch(copy.deepcopy(original), h=schedules.transfer(6, alpha), example_inputs=TOKENS)
    groups = eulernet.param_groups(model, 1e-2, transfer=schedules.transfer(6, alpha), weight_decay=0.1)
    decays = [p for p in original.parameters() if p.dim() > 1]
    others = [p for p in original.parameters() if p.dim() == 1]
    plain = [{"params": decays, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW(groups, lr=1e-2), torch.optim.AdamW(plain, lr=1e-2)]
    for _ in range(3):
        for one, optimizer in zip((model, original), optimizers, strict=True):
            optimizer.zero_grad()
            one(TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True))


@pytest.mark.parametrize("wrong", [0, -4, 2.5, "8", True, None])
def test_a_base_depth_that_is_no_positive_whole_number_is_refused(wrong: Any) -> None:
    with pytest.raises(eulernet.EulernetError, match=r"base_depth must be a whole number.*transfer\(base_depth=8\)"):
        schedules.transfer(wrong)


def test_an_alpha_that_is_not_positive_is_refused() -> None:
    with pytest.raises(eulernet.EulernetError, match=r"alpha must be a positive.*alpha=1.0"):
        schedules.transfer(8, alpha=0.0)


# ------------------------------------------------------------------------------------------------- groups: who is where

RULES: dict[str, Callable[[float, float], dict[str, float]]] = {  # written out from the sources
    "adamw": lambda m, alpha: {"lr": m ** (alpha - 1), "eps": m**-alpha, "weight_decay": 1.0},
    "adam": lambda m, alpha: {"lr": m ** (alpha - 1), "eps": m**-alpha, "weight_decay": m**-alpha},
    "sgd": lambda m, alpha: {"lr": m ** (2 * alpha - 1), "weight_decay": m**-alpha},
}


@pytest.mark.parametrize("optimizer", RULES)
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_blocks_and_the_rest_have_the_factors_of_the_sources(optimizer: Any, alpha: float) -> None:
    rule = schedules.transfer(4, alpha)
    model = eulernet.patch(gpt2(6), h=rule, example_inputs=TOKENS)
    groups = eulernet.param_groups(
        model, 0.01, transfer=rule, optimizer=optimizer, weight_decay=0.1, eps=1e-6, example_inputs=TOKENS
    )
    base = {"lr": 0.01, "eps": 1e-6, "weight_decay": 0.1}
    names = {p: n for n, p in model.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            factors = (
                RULES[optimizer](3.0, alpha)
                if ".h." in names.pop(parameter)
                else dict.fromkeys(RULES[optimizer](1, 1), 1.0)
            )
            expected = {key: base[key] * factor for key, factor in factors.items()}
            if parameter.dim() == 1:
                expected["weight_decay"] = 0.0
            assert {key: group[key] for key in group if key != "params"} == pytest.approx(expected, rel=1e-12)
    assert not names


def test_under_adamw_and_alpha_1_the_rate_is_one_number_for_all() -> None:
    rule = schedules.transfer(2)
    groups = eulernet.param_groups(eulernet.patch(gpt2(4), h=rule), lr=3e-3, transfer=rule)
    assert {group["lr"] for group in groups} == {3e-3}
    assert [group["eps"] for group in groups] == pytest.approx([1e-8, 1e-8 / 4], rel=1e-12)


HELD: list[tuple[str, Callable[[], nn.Module], Callable[[str], bool]]] = [
    ("vit", lambda: timm.create_model("vit_tiny_patch16_224", depth=3), lambda n: "blocks." in n),
    ("resnet", lambda: timm.create_model("resnet18"), lambda n: "layer" in n and "downsample" not in n),
    ("llama", lambda: _hf("Llama"), lambda n: "layers." in n),
    ("t5", lambda: _hf("T5"), lambda n: ".block." in n and "relative_attention_bias" not in n),
]


def _hf(name: str) -> nn.Module:
    import transformers

    if name == "T5":
        config: Any = transformers.T5Config(num_layers=2, d_model=32, d_kv=16, d_ff=64, num_heads=2, vocab_size=50)
        return transformers.T5Model(config)
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=64, vocab_size=50
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize(("build", "in_branch"), [case[1:] for case in HELD], ids=[case[0] for case in HELD])
def test_what_branches_hold_in_libraries_models(
    build: Callable[[], nn.Module], in_branch: Callable[[str], bool]
) -> None:
    rule, model = schedules.transfer(1), build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EulernetWarning)  # resnet18 starts with zeros
        eulernet.patch(model, h=rule)
    groups = eulernet.param_groups(model, lr=1.0, transfer=rule)
    names = {p: n for n, p in model.named_parameters()}
    held = {names[p] for group in groups[1:] for p in group["params"]}
    assert held == {n for n in names.values() if in_branch(n)}
    assert sum(len(group["params"]) for group in groups) == len(names)


def test_blocks_that_share_their_parameters_are_refused() -> None:
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(self.block(x)))

    x, rule = torch.randn(2, 5, 8), schedules.transfer(2)
    model = eulernet.patch(Shared(), h=rule, example_inputs=x)
    refused(
        model,
        lambda: eulernet.param_groups(model, lr=1e-3, transfer=rule, example_inputs=x),
        "no parameters of their own",
        r"torch.optim.AdamW\(model.parameters\(\), lr=0.001\)",
    )


def test_a_model_with_another_h_is_refused() -> None:
    model, rule = eulernet.patch(gpt2(2), h=1.0), schedules.transfer(2)
    error = refused(model, lambda: eulernet.param_groups(model, lr=1e-3, transfer=rule), r"h = 1.*h = 0.5")
    assert "eulernet.set_h(model, eulernet.schedules.transfer(base_depth=2, alpha=1.0))" in str(error)
    unpatched = gpt2(2)
    refused(unpatched, lambda: eulernet.param_groups(unpatched, lr=1e-3, transfer=rule), "not patched")


@pytest.mark.parametrize("given", [{}, {"h": 0.1, "transfer": schedules.transfer(2)}, {"transfer": 8}])
def test_h_and_transfer_are_one_or_the_other(given: dict[str, Any]) -> None:
    model = gpt2(1)
    refused(model, lambda: eulernet.param_groups(model, 0.1, **given), r"eulernet.schedules.transfer\(base_depth=8\)")


# --------------------------------------------------------------------------------- groups: what they are to bring about


class Linears(nn.Module):
    """x + F x, F linear: what a step of the optimiser does to the output can be said for any depth."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.map = nn.Linear(len(weight), len(weight), bias=False, dtype=torch.float64)
        self.map.weight.data.copy_(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.map(x)


@pytest.mark.parametrize("alpha", [0.5, 0.75, 1.0])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_step_of_the_optimiser_changes_the_output_as_at_the_base_depth(optimizer: Any, alpha: float) -> None:
    """To first order, with branches that start at zero: D alike maps, so the change is D h times that of one map."""
    x, changes = torch.eye(4, dtype=torch.float64)[:1], []
    for depth in (4, 16, 64):
        model = nn.Sequential(*(Linears(torch.zeros(4, 4)) for _ in range(depth)))
        rule = schedules.transfer(4, alpha)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EulernetWarning)  # the maps are zero
            eulernet.patch(model, h=rule, example_inputs=x)
        groups = eulernet.param_groups(model, 1e-6, transfer=rule, optimizer=optimizer, eps=1e-30, example_inputs=x)
        made = torch.optim.SGD(groups) if optimizer == "sgd" else torch.optim.AdamW(groups, lr=1e-6)
        before = model(x).detach()
        model(x).sum().backward()
        made.step()
        changes.append((model(x).detach() - before).norm().item())
    assert changes == pytest.approx([changes[0]] * 3, rel=1e-4)


def test_epsilon_is_as_large_beside_the_gradient_as_at_the_base_depth() -> None:
    """An epsilon as large as the gradient: were it not divided by m, deep maps would hardly move."""
    x, moves = torch.eye(4, dtype=torch.float64)[:1], []
    for depth in (4, 64):
        model, rule = nn.Sequential(*(Linears(torch.zeros(4, 4)) for _ in range(depth))), schedules.transfer(4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EulernetWarning)
            eulernet.patch(model, h=rule, example_inputs=x)
        groups = eulernet.param_groups(model, 1e-6, transfer=rule, eps=1.0, example_inputs=x)
        optimizer = torch.optim.AdamW(groups, lr=1e-6)
        model(x).sum().backward()
        optimizer.step()
        moves.append(model[0].map.weight.abs().max().item())
    assert moves == pytest.approx([0.5e-6] * 2, rel=1e-4)  # g / (g + eps) = 1 / 2 at both


# ------------------------------------------------------------------------------------------------- groups: in libraries


def test_timm_takes_the_groups_in_the_models_place_and_schedulers_keep_the_ratios() -> None:
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler

    rule = schedules.transfer(2, alpha=0.5)
    model = eulernet.patch(timm.create_model("vit_tiny_patch16_224", depth=4), h=rule)
    optimizer = create_optimizer_v2(eulernet.param_groups(model, lr=1e-3, transfer=rule), opt="adamw", lr=1e-3)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-3, 5e-4], rel=1e-12)
    scheduler = CosineLRScheduler(optimizer, t_initial=10)
    scheduler.step(5)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([5e-4, 2.5e-4], rel=1e-6)


def test_the_trainer_of_hugging_face_trains_with_the_groups(tmp_path: Any) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    rule = schedules.transfer(2)
    model = eulernet.patch(gpt2(3), h=rule)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(eulernet.param_groups(model, lr=1e-2, transfer=rule), lr=1e-2)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True
    )
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    trainer = Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))
    trainer.train()
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])
    assert not torch.equal(
        before["transformer.h.0.mlp.c_fc.weight"], model.state_dict()["transformer.h.0.mlp.c_fc.weight"]
    )


# ---------------------------------------------------------------------------------------------- depth that counts twice

SAID = r"start 0\.2\d* times as large .* 1 / sqrt\(D\) for D = 24.*preserve=True"


@pytest.mark.parametrize("rule", ["auto", schedules.inverse(), schedules.inverse_sqrt(), schedules.transfer(4)])
def test_patch_says_that_gpt2s_own_start_falls_with_depth(rule: Any) -> None:
    with pytest.warns(EulernetWarning, match=SAID):
        eulernet.patch(gpt2(12, projections="gpt2"), h=rule, example_inputs=TOKENS)


@pytest.mark.parametrize("h", [0.1, 1.0, schedules.constant(0.2)])
def test_a_number_counts_no_depth(h: Any) -> None:
    eulernet.patch(gpt2(12, projections="gpt2"), h=h, example_inputs=TOKENS)  # warnings are errors


@pytest.mark.parametrize("rule", ["auto", schedules.transfer(4)])
def test_nothing_is_said_where_all_maps_start_alike(rule: Any) -> None:
    eulernet.patch(gpt2(12), h=rule, example_inputs=TOKENS)
    eulernet.patch(timm.create_model("vit_tiny_patch16_224", depth=6), h=rule)
    layer = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True, norm_first=True)
    eulernet.patch(
        nn.TransformerEncoder(layer, 6, enable_nested_tensor=False), h=rule, example_inputs=torch.zeros(2, 5, 16)
    )


def test_the_call_that_is_named_moves_depth_from_the_maps_into_h() -> None:
    model = gpt2(12, projections="gpt2")
    with pytest.warns(EulernetWarning, match=SAID) as caught:
        eulernet.patch(copy.deepcopy(model), h=schedules.transfer(4), example_inputs=TOKENS)
    calls = [part.split("then ")[-1] for part in str(caught[0].message).split("first: ")[1].split(", then ")]
    before = model(TOKENS).logits
    eval(calls[0], {"eulernet": eulernet, "model": model})
    torch.testing.assert_close(model(TOKENS).logits, before, rtol=1e-5, atol=1e-6)
    eval(calls[1], {"eulernet": eulernet, "model": model})
    assert {s.h for s in eulernet.steps(model)} == {4 / 24}
    assert model.transformer.h[3].mlp.c_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_suggest_h_and_diagnose_say_it_too() -> None:
    model = gpt2(12, projections="gpt2")
    assert "1 / sqrt(D) for D = 24" in eulernet.suggest_h(model).notes[0]
    assert any("1 / sqrt(D) for D = 24" in n and "of the state" in n for n in eulernet.diagnose(model, TOKENS).notes)
    alike = gpt2(12)
    assert not any("sqrt(D)" in note for note in eulernet.suggest_h(alike).notes)
    assert not any("sqrt(D)" in note for note in eulernet.diagnose(alike, TOKENS).notes)


EMPTY: list[Callable[[], nn.Module]] = [
    lambda: gpt2(4, projections=0.0),
    lambda: timm.create_model("resnet18"),
    lambda: timm.create_model("vit_tiny_patch16_224", depth=4, init_values=1e-5),
]


@pytest.mark.parametrize("build", EMPTY)
def test_branches_that_start_at_zero_are_named_where_a_rate_is_transferred(build: Callable[[], nn.Module]) -> None:
    with pytest.warns(EulernetWarning, match="are zero at the start.*zero_init_last=False"):
        eulernet.patch(build(), h=schedules.transfer(4))


# --------------------------------------------------------------------------------------------------------- the check


def stack(depth: int, scale: float = 0.0) -> nn.Module:
    return nn.Sequential(*(Linears(scale * torch.eye(4)) for _ in range(depth)))


LINEAR = torch.eye(4, dtype=torch.float64)[:1], torch.zeros(1)


def total(output: Tensor, targets: Tensor) -> Tensor:
    return output.sum()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-6)


@pytest.mark.filterwarnings("ignore:.*zero at the start:eulernet.EulernetWarning")
@pytest.mark.parametrize(
    ("h", "optimizer", "power"),
    [
        (None, sgd, 1.0),  # to first order D equal changes add up
        (schedules.transfer(4, 0.5), sgd, 0.0),  # h, and h in the gradient: D h^2
        (schedules.transfer(4), sgd, -1.0),
        (schedules.transfer(4), None, 0.0),  # AdamW, with the groups of the rule: D h
        (schedules.transfer(4, 0.5), None, 0.0),
        (None, None, 1.0),
    ],
)
def test_the_power_of_depth_is_that_of_theory(h: Any, optimizer: Any, power: float) -> None:
    found = eulernet.depth_check(stack, [4, 16, 64], LINEAR, total, h=h, optimizer=optimizer, lr=1e-6, iterations=1)
    assert found.powers["change"] == pytest.approx(power, abs=1e-3)
    assert found.powers["increment_change"] == pytest.approx(power, abs=1e-3)
    assert all(row.moved == pytest.approx(row.change * row.state, rel=1e-6) for row in found.rows)
    assert found.transfers == (abs(power) < 0.25)
    assert ("can be expected to transfer" in found.answer) == found.transfers


@pytest.mark.parametrize("h", [None, 0.25])
def test_the_state_grows_as_the_product_of_the_steps(h: float | None) -> None:
    found = eulernet.depth_check(
        lambda depth: stack(depth, 0.5), [2, 6], LINEAR, total, h=h, optimizer=sgd, iterations=1
    )
    for row in found.rows:
        growth = (1 + 0.5 * (h or 1.0)) ** row.depth
        assert row.steps == row.depth
        assert (row.state, row.increments) == pytest.approx((growth, growth - 1), rel=1e-6)
        assert row.loss_before == pytest.approx(growth, rel=1e-6)


def test_the_check_of_a_gpt_prints_draws_and_leaves_random_numbers_alone(tmp_path: Any) -> None:
    def loss(output: Any, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    torch.manual_seed(5)
    state = torch.get_rng_state()
    found = eulernet.depth_check(gpt2, [1, 2], (TOKENS, TOKENS), loss, lr=1e-3, iterations=2, seeds=1)
    assert torch.equal(state, torch.get_rng_state())
    assert [(row.depth, row.steps) for row in found.rows] == [(1, 2), (2, 4)]
    assert all(row.loss_after < row.loss_before for row in found.rows)
    lines = str(found).splitlines()
    assert len(lines) >= 6 and lines[-1] == found.answer and repr(found) == f"<DepthCheck: {found.answer}>"
    assert "loss before" in str(found)
    figure = found.plot(tmp_path / "check.png")
    assert (tmp_path / "check.png").stat().st_size > 5000 and len(figure.axes) == 5


def test_a_training_that_diverges_is_said() -> None:
    def huge(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=1e200)

    found = eulernet.depth_check(stack, [2, 4], LINEAR, total, optimizer=huge, iterations=3, seeds=1)
    assert not found.transfers and found.answer.startswith("At depth 2 the training diverges")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"build": stack(2)}, "build is no function"),
        ({"depths": [4]}, "two whole numbers or more"),
        ({"depths": 8}, "two whole numbers or more"),
        ({"depths": [4, 0]}, "a depth must be a whole number"),
        ({"batch": LINEAR[0]}, "the batch is a pair"),
        ({"loss_fn": None}, "loss_fn is no function"),
        ({"lr": -1}, "lr must be a positive"),
        ({"iterations": 0}, "iterations must be a whole number"),
        ({"build": lambda depth: depth}, "returned a int"),
        ({"loss_fn": lambda output, targets: 1.0}, "loss_fn.output, targets. gives"),
    ],
)
def test_what_the_check_cannot_use_is_refused(change: dict[str, Any], said: str) -> None:
    given = {"build": stack, "depths": [2, 4], "batch": LINEAR, "loss_fn": total, **change}
    with pytest.raises(eulernet.EulernetError, match=said):
        eulernet.depth_check(**given)

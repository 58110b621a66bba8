"""Bayesian optimisation of h and the learning rate, which the paper leaves as future work, with Optuna.

Residual networks of 50 steps are trained on two moons, and poor trials are pruned. The study is kept in `h.db`: killed,
and called again, it goes on with what the file holds. Needs `pip install "eulernet[tune]"`.
"""

import optuna
import torch
from optuna.trial import TrialState
from torch import Tensor, nn

import eulernet

STORAGE, TRIALS, EPOCHS = "sqlite:///h.db", 30, 20


class Block(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def two_moons(points: int) -> tuple[Tensor, Tensor]:
    """Points on two interleaving half circles, with noise, and their classes."""
    y = torch.arange(points) % 2
    angle = torch.pi * (torch.rand(points) + y)
    x = torch.stack([angle.cos() + y - 0.5, angle.sin() + 0.5 * y - 0.25], dim=1)
    return x + 0.25 * torch.randn_like(x), y


def objective(trial: optuna.Trial) -> float:
    torch.manual_seed(0)
    (x, y), (test_x, test_y) = two_moons(256), two_moons(1000)
    model = nn.Sequential(*(Block(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2)) for _ in range(50)), nn.Linear(2, 2))
    eulernet.patch(model, h=trial.suggest_float("h", 0.01, 1.0, log=True), example_inputs=x)
    lr = trial.suggest_float("lr", 1e-3, 1.0, log=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for epoch in range(EPOCHS):
        for batch in torch.randperm(256).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        with torch.no_grad():
            accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
        trial.report(accuracy, epoch)
        if trial.should_prune():
            raise optuna.TrialPruned
    return accuracy


def main() -> optuna.Study:
    pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=5)
    study = optuna.create_study(
        storage=STORAGE, study_name="h", direction="maximize", pruner=pruner, load_if_exists=True
    )
    done = study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))
    study.sampler = optuna.samplers.TPESampler(seed=len(done))  # not the first numbers again when it goes on
    study.optimize(objective, n_trials=max(0, TRIALS - len(done)))
    print(f"h = {study.best_params['h']:.3f}, lr = {study.best_params['lr']:.3f}: accuracy {study.best_value:.3f}")
    return study


if __name__ == "__main__":
    main()

"""Muon for the matrices, AdamW for the rest: needs about half the tokens of AdamW alone here."""

from __future__ import annotations

import torch


def orthogonalise(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Drive all singular values of a matrix towards 1 by the quintic Newton-Schulz iteration.

    In bfloat16, as in Keller Jordan's "Muon: an optimizer for hidden layers" (2024), whose
    coefficients these are. `matrix` may be a stack of them, [..., rows, cols].
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.bfloat16()
    wide = x.shape[-2] <= x.shape[-1]
    if not wide:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x if wide else x.mT).float()


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised: every direction of a matrix moves equally far.

    Args:
        matrices: the parameters, all of two dimensions.
        map: applies a function to each of them; an executor's `map` uses several threads.
    """

    def __init__(self, matrices, lr=0.02, momentum=0.95, weight_decay=0.05, map=map):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.map = map

    def step(self):
        """Update every matrix from its gradient."""
        for group in self.param_groups:
            for _ in self.map(lambda p, group=group: self._update(p, group), group["params"]):
                pass

    @torch.no_grad()
    def _update(self, parameter: torch.Tensor, group: dict) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
        update = orthogonalise(parameter.grad.lerp(momentum, group["momentum"]))
        rows, cols = parameter.shape
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * max(1, rows / cols) ** 0.5)


class StackedMuon(Muon):
    """Muon with the matrices of one shape in one product: a GPU would idle between small ones."""

    @torch.no_grad()
    def step(self):
        """Update every matrix from its gradient."""
        for group in self.param_groups:
            rate, shapes = group["lr"], {}
            for parameter in group["params"]:
                shapes.setdefault(tuple(parameter.shape), []).append(parameter)
            for (rows, cols), matrices in shapes.items():
                grads = torch.stack([p.grad for p in matrices])
                state = self.state[matrices[0]]
                if not state:
                    state["momentum"] = torch.zeros_like(grads)
                momentum = state["momentum"].lerp_(grads, 1 - group["momentum"])
                update = orthogonalise(grads.lerp_(momentum, group["momentum"]))
                factor = -rate * max(1, rows / cols) ** 0.5
                for matrix, step in zip(matrices, update.unbind(), strict=True):
                    matrix.mul_(1 - rate * group["weight_decay"]).add_(step, alpha=factor)


def make_optimizers(
    model: torch.nn.Module,
    muon_lr: float,
    adam_lr: float,
    weight_decay: float = 0.05,
    stacked: bool = False,
    map=map,
):
    """Muon for the matrices inside the blocks, AdamW for the embedding and the norms."""
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    adam = torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    kind = StackedMuon if stacked else Muon
    return [kind(matrices, lr=muon_lr, weight_decay=weight_decay, map=map), adam]

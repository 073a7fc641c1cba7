"""Down the gradient: AdamW on weights that train in bfloat16, and one step of it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from msvae import native
from msvae.lowered import Lowered


class AdamW(torch.optim.AdamW):
    """torch's fused one. With `low` weights have copies in bfloat16 that are trained in their stead.

    Otherwise autocast makes such copies at each step, and copies of their gradients in float32: on
    a CPU that takes longer than AdamW itself. Here one pass reads the gradients in bfloat16, moves
    weight and moments, in float32 as ever, and writes the copy. Where there are no `native` loops
    there are no copies. `close` it when the training is over.
    """

    def __init__(
        self, modules: Iterable[nn.Module], rate: float, weight_decay: float, low: bool
    ) -> None:
        modules = [*modules]
        parameters = [p for module in modules for p in module.parameters()]
        super().__init__(parameters, lr=rate, weight_decay=weight_decay, fused=True)
        parts = [m for module in modules for m in module.modules() if isinstance(m, Lowered)]
        self.lowered = parts if low and native.library() is not None else []
        self.clip = 1.0  # what the copies' gradients are multiplied by
        self._lower()

    def _lower(self) -> None:
        """Make the copies anew; of each a pair with its weight is kept."""
        self.pairs: list[tuple[Tensor, Tensor]] = []
        for part in self.lowered:
            part.low = part.weight.detach().bfloat16().requires_grad_()
            self.pairs.append((part.weight, part.low))

    def close(self) -> None:
        """Let the layers train by their weights again."""
        for part in self.lowered:
            part.low = None
        self.lowered, self.pairs = [], []

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Moments as they were; the weights are expected to be in place."""
        super().load_state_dict(state_dict)
        self._lower()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        super().zero_grad(set_to_none)
        for _, low in self.pairs:
            low.grad = None

    def norm(self) -> Tensor:
        """Of all gradients together."""
        parameters = self.param_groups[0]["params"]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        squares = [native.square_sum(gradient) for _, _, gradient in self._gradients()]
        return (norm.square() + sum(squares)).sqrt() if squares else norm

    def shrink(self, most: float, norm: Tensor) -> None:
        """Multiply the gradients by what makes the `norm` that they have `most` at most."""
        torch.nn.utils.clip_grads_with_norm_(self.param_groups[0]["params"], most, norm)
        if self.pairs:
            self.clip = min(1.0, most / (float(norm) + 1e-6))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step."""
        out = super().step(closure)
        group = self.param_groups[0]
        rate, (beta1, beta2) = group["lr"], group["betas"]
        decay = 1 - rate * group["weight_decay"]
        for weight, low, gradient in self._gradients():
            state = self._state_of(weight)
            steps = state["step"].add_(1).item()
            far, near = 1 - beta1**steps, (1 - beta2**steps) ** -0.5
            factors = (self.clip, decay, beta1, beta2, rate / far, near, group["eps"])
            moved = (weight, state["exp_avg"], state["exp_avg_sq"], low)
            native.adamw(moved, gradient, torch.tensor(factors))
        self.clip = 1.0
        return out

    def _gradients(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Each weight, its copy, and the copy's gradient, laid out in memory as the copy is."""
        out = []
        for weight, low in self.pairs:
            gradient = low.grad
            if gradient is None:
                continue
            if gradient.stride() != low.stride():
                gradient = torch.empty_like(low).copy_(gradient)
            out.append((weight, low, gradient))
        return out

    def _state_of(self, weight: Tensor) -> dict[str, Tensor]:
        """Its moments; of nothing to begin with, as torch's."""
        state: dict[str, Tensor] = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        return state


def descend(optimiser: AdamW, loss: Tensor, rate: float, most: float) -> None:
    """One step down the gradient of the loss, whose norm is cut off at `most`."""
    optimiser.param_groups[0]["lr"] = rate
    optimiser.zero_grad()
    loss.backward()
    norm = optimiser.norm()
    # On a CPU to scale every number by 1 would cost as much as to measure them; a GPU would have to
    # be waited for.
    if norm.device.type != "cpu" or norm > most:
        optimiser.shrink(most, norm)
    optimiser.step()

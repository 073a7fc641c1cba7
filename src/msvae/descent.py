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
        self.lowered = parts if low and native.loops() is not None else []
        self.clip = 1.0  # what the copies' gradients are multiplied by
        self._lower()

    def _lower(self) -> None:
        """Make the copies anew, and moments where there are none yet: of nothing, as torch's."""
        moved = []
        for part in self.lowered:
            part.low = part.weight.detach().bfloat16().requires_grad_()
            state = self.state[part.weight]
            state.setdefault("step", torch.zeros((), dtype=torch.float32))
            for name in ("exp_avg", "exp_avg_sq"):  # alike in memory, as the loops walk in step
                empty = torch.empty_like(part.weight, memory_format=torch.preserve_format)
                state[name] = empty.copy_(state[name]) if name in state else empty.zero_()
            moved.append((part.weight, state["exp_avg"], state["exp_avg_sq"], part.low))
        self.weights = native.Weights(moved)

    def close(self) -> None:
        """Let the layers train by their weights again."""
        for part in self.lowered:
            part.low = None
        self.lowered, self.weights = [], native.Weights([])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Moments as they were; the weights are expected to be in place."""
        super().load_state_dict(state_dict)
        self._lower()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        super().zero_grad(set_to_none)
        for *_, low in self.weights.moved:
            low.grad = None

    def norm(self) -> Tensor:
        """Of all gradients together."""
        parameters = self.param_groups[0]["params"]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not self.lowered:
            return norm
        return (norm.square() + self.weights.square_sum(self._gradients())).sqrt()

    def shrink(self, most: float, norm: Tensor) -> None:
        """Multiply the gradients by what makes the `norm` that they have `most` at most."""
        torch.nn.utils.clip_grads_with_norm_(self.param_groups[0]["params"], most, norm)
        if self.lowered:
            self.clip = min(1.0, most / (float(norm) + 1e-6))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step."""
        out = super().step(closure)
        if self.lowered:
            group = self.param_groups[0]
            rate, (beta1, beta2) = group["lr"], group["betas"]
            steps = [self.state[part.weight]["step"].add_(1) for part in self.lowered]
            t, decay = float(steps[0]), 1 - rate * group["weight_decay"]
            far, near = 1 - beta1**t, (1 - beta2**t) ** -0.5
            factors = (self.clip, decay, beta1, beta2, rate / far, near, group["eps"])
            self.weights.step(self._gradients(), factors)
            self.clip = 1.0
        return out

    def _gradients(self) -> list[Tensor]:
        """Of each copy, laid out in memory as the copy is; all layers take part in a step."""
        out = []
        for *_, low in self.weights.moved:
            assert low.grad is not None
            if low.grad.stride() != low.stride():
                low.grad = torch.empty_like(low).copy_(low.grad)
            out.append(low.grad)
        return out


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

"""Optimizers and the learning-rate schedule that every training stage shares."""

import math

import torch
from torch.optim.adamw import adamw

from common.config import ConfigError
from head import upcast

# Newton-Schulz coefficients of Muon (Jordan et al., 2024): fast to singular values in about [0.7, 1.2], not exactly 1
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def learning_rate(step, config):
    """Linear warm-up over warmup_steps, then from learning_rate down to min_learning_rate at decay_steps or max_steps.

    cosine: half a cosine over all of it. wsd (warm-up, stable, decay; arXiv:2404.06395): constant, then by 1 - sqrt
    over the last decay_share of it (arXiv:2405.18392), so that a run can be prolonged until the decay begins.
    """
    peak, low, warmup = config["learning_rate"], config["min_learning_rate"], config["warmup_steps"]
    schedule, share = config["schedule"], config["decay_share"]
    end = config.get("decay_steps") or config["max_steps"]  # older configs have no decay_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    first = warmup if schedule == "cosine" else max(warmup, round((1 - share) * end))
    progress = min(1.0, max(0, step - first) / max(1, end - first))
    if schedule == "wsd":
        return low + (peak - low) * (1 - math.sqrt(progress))
    return low + 0.5 * (peak - low) * (1 + math.cos(math.pi * progress))


def keep_decay(config, step, before):
    """Set decay_steps to where the schedule of a resumed run ended if max_steps would now raise its rate; says so.

    A rate that jumps from the end of a cosine to its middle undoes what the end has won. `before` is the config that
    the run had. Returns a line to print, "" if nothing was set; raises ConfigError where the rate would stay 0, or a
    decay that has begun would be undone by another decay_share. An end that was asked for then stays, unless nothing
    would be learnt after it.
    """
    line = _keep_end(config, step, before)
    share = before.get("decay_share", config["decay_share"])
    rate, anew = (learning_rate(step, config | dict(decay_share=each)) for each in (share, config["decay_share"]))
    if anew > 1.01 * rate:
        found = f"the learning rate would rise from {rate:.3g} to {anew:.3g} at step {step}, where its decay has begun"
        raise ConfigError(f"decay_share={config['decay_share']}: {found}; it was {share}")
    return line


def _keep_end(config, step, before):
    if (asked := before.get("decay_steps")) and not config["decay_steps"]:
        config["decay_steps"] = asked
        if config["max_steps"] <= before["max_steps"] or learning_rate(asked, config) > 0:
            return f"learning rate: decay_steps={asked}, as before"
        config["decay_steps"] = 0
    old = config | dict(max_steps=before["max_steps"], decay_steps=before.get("decay_steps", 0))
    old |= dict(decay_share=before.get("decay_share", config["decay_share"]))
    kept, anew = learning_rate(step, old), learning_rate(step, config)
    if config["decay_steps"] or anew <= 1.01 * kept:
        return ""
    config["decay_steps"] = end = old["decay_steps"] or old["max_steps"]
    last, low = config["max_steps"], config["min_learning_rate"]
    anew = f"--decay_steps={last} makes it jump to {anew:.3g} and fall anew"
    if low == 0:
        raise ConfigError(f"max_steps={last}: the learning rate is 0 from step {end} on; {anew}")
    rates = f"{kept:.3g} at step {step}, {low:.3g} from step {end} on"
    return f"learning rate: as before, {rates}; {anew}; runs to be prolonged are best trained with schedule=wsd"


def never_low(config):
    """A line on a schedule that a run ends in the midst of, "" on any other."""
    warmup, end, steps = (config[key] for key in ("warmup_steps", "decay_steps", "max_steps"))
    if warmup > steps > 0:
        return f"warmup_steps={warmup}, but max_steps={steps}: the learning rate rises to the end"
    if end > steps > 0:
        return f"decay_steps={end}, but max_steps={steps}: the learning rate ends at {learning_rate(steps, config):.3g}"
    return ""


def set_learning_rate(optimizer, lr):
    """Set lr, times the group's own `rate` if it has one; returns lr."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("rate", 1.0)
    return lr


def has_fused(device):
    """Whether torch's AdamW is to update a parameter in one pass; on MPS, where it can, that was never tried."""
    return device.type in ("cpu", "cuda")


def build_optimizer(model, config):
    """AdamW, or Muon on the trunk's matrices with AdamW for the rest; weight decay on matrices only.

    Under Muon the embedding and the output projection or scalar head learn embedding_rate times as fast, and decay no
    faster.
    """
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    betas, decay = (config["beta1"], config["beta2"]), config["weight_decay"]
    if config["optimizer"] == "adamw":
        groups = [dict(params=matrices, weight_decay=decay), dict(params=vectors, weight_decay=0.0)]
        return torch.optim.AdamW(groups, lr=config["learning_rate"], betas=betas, fused=has_fused(matrices[0].device))
    lr, rate = config["learning_rate"], config["embedding_rate"]
    trunk = [p for name, p in model.named_parameters() if "layers." in name and p.dim() == 2]
    chosen = {id(p) for p in trunk}
    rest = [p for p in matrices if id(p) not in chosen]
    return Muon(
        [
            dict(params=trunk, muon=True, weight_decay=decay),
            dict(params=rest, muon=False, weight_decay=decay / rate, rate=rate, lr=rate * lr),
            dict(params=vectors, muon=False, weight_decay=0.0),
        ],
        lr=lr,
        betas=betas,
        momentum=config["momentum"],
    )


def orthogonalize(G, steps=5):
    """The nearest semi-orthogonal matrix to each of G (..., N, M), about, by Newton-Schulz iteration.

    bfloat16 on accelerators, where it is fast and enough; on CPUs, where that is often slower, float32 at least.
    """
    a, b, c = NEWTON_SCHULZ
    X = upcast(G) if G.device.type == "cpu" else G.bfloat16()
    tall = X.size(-2) > X.size(-1)
    X = X.mT if tall else X
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    X = X.flatten(0, -3) if X.dim() > 2 else X[None]  # baddbmm adds while it multiplies, and takes (n, N, M)
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)  # a X + (b A + c A A) X
    return (X.mT if tall else X).reshape(G.shape).to(G.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised (Muon) for groups with muon=True, AdamW for the others, under one learning rate.

    The orthogonal update is scaled by 0.2 sqrt(max(N, M)), which gives it AdamW's usual size per element
    (Liu et al., 2025, arXiv:2502.16982), so both kinds of group share the schedule.
    """

    def __init__(self, params, lr, betas=(0.9, 0.95), momentum=0.95, eps=1e-8):
        super().__init__(params, dict(lr=lr, betas=betas, momentum=momentum, eps=eps, weight_decay=0.0, muon=False))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            (self._muon if group["muon"] else self._adamw)(params, group)

    def __setstate__(self, state):
        super().__setstate__(state)
        for p, values in self.state.items():
            if "step" in values:  # a number in older checkpoints
                values["step"] = self._steps(p, values["step"])

    def _steps(self, p, n):
        """n as torch's AdamW takes it: where the host asks for it each step, on the host."""
        return torch.as_tensor(n, dtype=torch.float32, device=p.device if has_fused(p.device) else "cpu")

    def _muon(self, params, group):
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        by_shape = {}
        for p in params:
            by_shape.setdefault(p.shape, []).append(p)
        for shape, same in by_shape.items():
            updates = []
            for p in same:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                buffer = self.state[p]["momentum"]
                buffer.lerp_(p.grad, 1 - group["momentum"])
                updates.append(p.grad.lerp(buffer, group["momentum"]))  # Nesterov
            scale = 0.2 * math.sqrt(max(shape))
            updates = orthogonalize(torch.stack(updates)).mul_(-group["lr"] * scale)  # (n, N, M)
            torch._foreach_add_(same, list(updates.unbind()))

    def _adamw(self, params, group):
        for p in params:
            if not self.state[p]:
                self.state[p].update(
                    step=self._steps(p, 0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p)
                )
        grads = [p.grad for p in params]
        means, squares, steps = ([self.state[p][key] for p in params] for key in ("exp_avg", "exp_avg_sq", "step"))
        beta1, beta2 = group["betas"]
        options = dict(lr=group["lr"], beta1=beta1, beta2=beta2, eps=group["eps"], weight_decay=group["weight_decay"])
        options |= dict(fused=has_fused(params[0].device), amsgrad=False, maximize=False)
        adamw(params, grads, means, squares, [], steps, **options)

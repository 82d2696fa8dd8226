"""A weight in 4 bits: rounded to nearest, or by GPTQ (Frantar et al., 2022, arXiv:2210.17323).

GPTQ rounds one column after the other and lets those to come make up for the error, by the second moments of the
layer's inputs. Departs from the paper: the grid of a group is the best of several ranges, and columns whose inputs were
always zero in calibration are rounded to nearest instead of set to zero.
"""

import math

import torch
import torch.nn.functional as F

# Shares of a group's range that the search tries.
SHRINK = [share / 100 for share in range(100, 65, -5)]


def int4_grid(groups, symmetric, importance=None):
    """groups (..., g) of weights -> scale bfloat16 (...), zero uint8 (...), for weights scale * (q - zero), q in 0..15.

    The grid spans the range of the group and zero, or (symmetric) the same on both sides of zero 8. With importance
    (..., g), of the ranges shrunk by SHRINK it is the one with the least sum of importance * error^2.
    """
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    best = None
    for share in SHRINK if importance is not None else SHRINK[:1]:
        scale = ((high - low) * (share / 15)).bfloat16()
        scale = torch.where(scale == 0, 1, scale)  # a group of zeros
        zero = torch.full_like(low, 8) if symmetric else (-low * share / scale).round().clamp(0, 15)
        error = (groups - dequantize(to_grid(groups, scale, zero), scale, zero)).square()
        new = (error if importance is None else error * importance).sum(-1), scale, zero
        best = best or new
        best = [torch.where(new[0] < best[0], *pair) for pair in zip(new, best, strict=True)]
    return best[1], best[2].to(torch.uint8)


def to_grid(groups, scale, zero):
    """The q in 0..15 nearest to groups (..., g), of scale and zero (...)."""
    return (groups / scale.float()[..., None] + zero.float()[..., None]).round().clamp(0, 15)


def dequantize(q, scale, zero):
    return (q - zero.float()[..., None]) * scale.float()[..., None]


def in_groups(weight, group_size):
    """weight (N, K) -> (N, K / group_size, group_size), with columns of zeros where the last group is not full."""
    return F.pad(weight.float(), (0, -weight.size(1) % group_size)).unflatten(1, (-1, group_size))


def quantize_int4(weight, group_size, symmetric):
    """Round to nearest: weight (N, K) -> q uint8 (N, Kp), scale bfloat16 and zero uint8 (N, Kp / group_size)."""
    groups = in_groups(weight, group_size)
    scale, zero = int4_grid(groups, symmetric)
    return to_grid(groups, scale, zero).to(torch.uint8).flatten(1), scale, zero


def inverse_factor(hessian, damping):
    """Upper triangular U (K, K) with U^T U = (hessian + d I)^-1, d being `damping` times the mean of its diagonal.

    A flipped Cholesky factor is upper triangular, so that one inversion of a triangle does what the paper's three steps
    do. In float64: U of a nearly singular matrix is lost in float32. Damping is raised where that is not enough.
    """
    h = hessian.cpu().double()  # not every accelerator has float64
    mean, eye = h.diagonal().mean(), torch.eye(len(h), dtype=h.dtype)
    for share in [damping, *(share for share in (1e-4, 1e-3, 0.01, 0.1, 1.0) if share > damping)]:
        damped = h + share * mean * eye
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed and lower.isfinite().all():
            return torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True).float().to(hessian.device)
    raise ValueError("the matrix of its inputs has no Cholesky factor, however much it is damped")


def gptq(weight, hessian, group_size, symmetric, damping=0.01, act_order=True, block=128, search=True):
    """Algorithm 1: weight (N, K) and hessian 2 X X^T / n (K, K) of its inputs X (K, n) -> q, scale and zero as
    quantize_int4 returns them, with a small ||(weight - dequantized) X||.

    act_order: columns in order of falling diag(hessian), the grids being found beforehand; else from left to right, the
    grid of a group when its first column comes. search: of several ranges of a group the best by diag(hessian).
    """
    w, importance = weight.float(), hessian.diagonal().float()
    n_columns = w.size(1)
    dead = importance <= 0  # inputs that were always zero say nothing: those columns are rounded to nearest
    hessian = hessian + torch.diag(dead * importance[~dead].mean().nan_to_num(1.0)).to(hessian)
    weights_of_error = in_groups(importance[None], group_size)[0] if search else None  # (Kp / g, g)
    scale, zero = int4_grid(in_groups(w, group_size), symmetric, weights_of_error)
    order = torch.arange(n_columns, device=w.device)
    if act_order:
        order = importance.argsort(descending=True, stable=True)
    else:
        block = math.gcd(block, group_size)  # a group that comes then has had all updates
    groups, w = order // group_size, w[:, order]  # w is a copy from here on
    u = inverse_factor(hessian[order][:, order], damping)
    q = torch.empty_like(w)
    for start in range(0, n_columns, block):
        columns = slice(start, min(start + block, n_columns))
        if not act_order and start % group_size == 0:
            g, group = start // group_size, w[:, start : start + group_size]
            scale[:, g], zero[:, g] = int4_grid(
                in_groups(group, group_size)[:, 0], symmetric, weights_of_error[g] if search else None
            )
        part, errors, u_part = w[:, columns].clone(), torch.zeros_like(w[:, columns]), u[columns, columns]
        for i, g in enumerate(groups[columns].tolist()):
            column, s, z = part[:, i, None], scale[:, g], zero[:, g]
            q[:, start + i, None] = to_grid(column, s, z)
            errors[:, i, None] = (column - dequantize(q[:, start + i, None], s, z)) / u_part[i, i]
            part[:, i + 1 :] -= errors[:, i, None] * u_part[i, i + 1 :]
        w[:, columns.stop :] -= errors @ u[columns, columns.stop :]
    padded = zero.repeat_interleave(group_size, 1)  # what a weight of zero has
    padded[:, order] = q.to(torch.uint8)
    return padded, scale, zero

"""How much memory a step of a training stage takes, told by the shape of its model.

Bytes of tensors that live at once, on one process without torch.compile. What a CPU's malloc holds back, or what CUDA
itself needs, comes on top.
"""

from dataclasses import dataclass, replace

import torch

from common.optim import build_optimizer
from head import chunk_rows
from model import Llama, ModelConfig


@dataclass(frozen=True)
class Trains:
    """What is in memory in a stage: models by their heads, "loss", "logps" or "scalar", and the rows of a forward."""

    trained: tuple[str, ...]
    frozen: tuple[str, ...] = ()
    rows: int = 1  # for one of batch_size: a preference pair has two
    rollouts: bool = False  # whether the first model also generates


STAGES = {
    "pretrain": Trains(("loss",)),
    "sft": Trains(("loss",)),
    "rm_train": Trains(("scalar",), rows=2),
    "dpo_train": Trains(("logps",), ("logps",), rows=2),
    "ppo_train": Trains(("logps", "scalar"), ("logps", "scalar"), rollouts=True),
    "grpo_train": Trains(("logps",), ("logps", "scalar"), rollouts=True),
}


def skeleton(shape: ModelConfig) -> Llama:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return Llama(shape)


def count_parameters(shape: ModelConfig) -> dict[str, int]:
    """Of the trunk (blocks, last norm, scalar head), the embedding, and the output projection where it has its own."""
    D, kv = shape.dim, shape.n_kv_heads * shape.head_dim
    block = 2 * D * D + 2 * D * kv + 3 * D * shape.hidden_dim + 2 * D  # wq, wo; wk, wv; w1, w2, w3; two norms
    trunk = shape.n_layers * block + D + (D if shape.scalar_head else 0)
    embedding = shape.vocab_size * D
    return dict(trunk=trunk, embedding=embedding, output=0 if shape.tied or shape.scalar_head else embedding)


def activation_bytes(shape: ModelConfig, n_tokens: int, size: int, fused_norm: bool, recompute: bool = False) -> int:
    """What the trunk keeps of a micro-batch for the backward pass.

    size: bytes of a number in the matrix products: 4, or 2 under bfloat16 autocast, where what is added up and
    normalised still has 4, a norm's output is kept in 2 and every matrix has a copy in bfloat16.
    fused_norm: CUDA's, which keeps no normalised copy. recompute: of each block its input, and all of one at a time.
    """
    D, F, H = shape.dim, shape.hidden_dim, shape.n_heads
    kv = shape.n_kv_heads * shape.head_dim
    norm = 4 * (D + 1 + (0 if fused_norm else D))  # input, 1 / root mean square, and input times that
    attention = size * (D + D + kv + kv + D) + 4 * H  # input, rotated q and k, v, output; log-sum-exp of each head
    feed_forward = size * (D + 3 * F)  # input, w1's output, w3's output, the product of the gated
    cast = size * count_parameters(shape)["trunk"] if size < 4 else 0
    block = 2 * norm + attention + feed_forward
    blocks = 4 * D * shape.n_layers + block if recompute else shape.n_layers * block
    return n_tokens * (blocks + norm) + cast


def loss_bytes(shape: ModelConfig, n_tokens: int, size: int, on_gpu: bool, head: str = "loss") -> int:
    """The largest that exists at once for a head and the loss of a micro-batch, gradients included.

    head: "loss" or "logps", in chunks; "one piece", as one would write it without; "scalar", a number per position.
    """
    V, D = shape.vocab_size, shape.dim
    if head == "scalar":
        return 2 * 4 * n_tokens * D  # the states and their gradient
    if head == "one piece":  # log-softmax, its gradient and that of the logits; gradient of the projection
        return 3 * 4 * n_tokens * V + 4 * V * D
    rows = min(n_tokens, chunk_rows(torch.device("cuda" if on_gpu else "cpu")))
    states = (3 if head == "loss" else 2) * 4 * n_tokens * D  # the states, their gradients
    if size == 4:  # the gradient of the projection; the logits, which everything is written over
        return 4 * V * D + 4 * rows * V + states
    V = -(-V // 128) * 128 if on_gpu else V  # as head.padded
    # the weight, its gradient and what a chunk adds to that; logits and their gradient; the states
    return (size + 4 + 4) * V * D + (4 + size) * rows * V + states + size * n_tokens * D


def optimizer_bytes(shape: ModelConfig, config: dict, size: int) -> tuple[int, int]:
    """(state, largest temporary of a step): AdamW keeps two numbers a parameter, Muon one.

    Muon's step holds six copies of all matrices of a shape at once, two of them in float32, and two squares of the
    shorter side.
    """
    if config["optimizer"] == "adamw":
        return 8 * sum(count_parameters(shape).values()), 0
    state, scratch = 0, 0
    for group in build_optimizer(skeleton(shape), config).param_groups:
        muon = group.get("muon", False)
        state += (4 if muon else 8) * sum(p.numel() for p in group["params"])
        shapes = [tuple(p.shape) for p in group["params"]] if muon else []
        for N, M in set(shapes):
            scratch = max(scratch, shapes.count((N, M)) * ((2 * 4 + 4 * size) * N * M + 2 * size * min(N, M) ** 2))
    return state, scratch


def rollout_bytes(shape: ModelConfig, n_rows: int, T: int, size: int) -> int:
    """What generate adds for n_rows prompts with their replies, T tokens: weights in the dtype of products, the cache
    of keys and values, and a block's states while it reads prompts of nearly that length, or the logits of a token."""
    kv = shape.n_kv_heads * shape.head_dim
    copy = size * sum(count_parameters(shape).values()) if size < 4 else 0
    cache = size * 2 * shape.n_layers * n_rows * T * kv
    states = size * n_rows * T * (3 * shape.dim + 2 * shape.hidden_dim)  # residual, its norm, a sum; w1's output, w3's
    logits = 5 * 4 * n_rows * shape.vocab_size  # of a temperature, probabilities, their sums; copies on the way
    return copy + cache + max(states, logits)


def stage_memory(stage: str, shape: ModelConfig, config: dict, on_gpu: bool, B: int, T: int, replies: int = 0) -> dict:
    """Bytes by part, and the most that lives at once: float32 on a CPU, bfloat16 autocast on a GPU.

    B is the micro-batch, in rows of T tokens or in pairs; a stage that generates does so for `replies` rows. The peak
    is at a head, or, in models that are large for their batch, when all gradients are there, or while it generates.
    """
    size, kind = 2 if on_gpu else 4, STAGES[stage]
    n_tokens = kind.rows * B * T
    shapes = {head: replace(shape, scalar_head=head == "scalar") for head in kind.trained + kind.frozen}
    count = {head: sum(count_parameters(each).values()) for head, each in shapes.items()}
    weights, gradients = (4 * sum(count[head] for head in some) for some in (kind.trained + kind.frozen, kind.trained))
    states, scratches = zip(*(optimizer_bytes(shapes[head], config, size) for head in kind.trained), strict=True)
    recompute = config.get("recompute", False)
    activations = [activation_bytes(shapes[head], n_tokens, size, on_gpu, recompute) for head in kind.trained]
    losses = [loss_bytes(shape, n_tokens, size, on_gpu, head) for head in kind.trained]
    # the backward of the last model is done before that of the first one's head begins
    heads = [
        sum(activations[: i + 1]) + loss + 4 * sum(map(count.get, kind.trained[i + 1 :]))
        for i, loss in enumerate(losses)
    ]
    accumulated = gradients if config.get("grad_accumulation_steps", 1) > 1 else 0  # there while the next one runs
    embedding = 4 * shape.vocab_size * shape.dim  # the sum of both gradients of a tied one, beside the first
    generation = rollout_bytes(shape, replies, T, size) if kind.rollouts else 0
    update = max(max(heads) + accumulated, gradients + max(*scratches, embedding))
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer state": sum(states),
        "optimizer step": max(scratches),
        "activations of a micro-batch": sum(activations),
        "loss, in chunks": max(losses),
        "generation": generation,
        "peak": weights + sum(states) + max(update, generation),
    }


def largest_batch(has: float, stage: str, shape: ModelConfig, config: dict, T: int, replies: int = 0) -> int:
    """The largest micro-batch of rows of T tokens, or of pairs, whose peak on a GPU is at most `has` bytes; maybe 0."""

    def fits(batch_size):
        return stage_memory(stage, shape, config, True, batch_size, T, replies)["peak"] <= has

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low

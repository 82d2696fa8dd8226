"""What benchmarks/gpu.py checks before it measures: a device in bfloat16 beside the CPU in float64, at a small size.

Each check returns its figures, the bounds that they must not exceed among them: {"loss": .., "loss_bound": ..}. Bounds
are twice or more what a CPU has in bfloat16; tests/test_gpu_benchmark.py shows faults that exceed them.
"""

from functools import partial
from types import SimpleNamespace

import harness  # noqa: F401  it puts the project on sys.path
import torch

import grpo_train
import ppo_train
import quantize
from alignment.pairs import pair_batch
from alignment.rollout import Rollout, sequence_scores
from common import distributed
from common.distributed import Env
from configs.grpo_train import config as grpo_defaults
from configs.ppo_train import config as ppo_defaults
from dataset.batches import keep_multiple, pad_batch, to_device
from dataset.corpus import document_numbers
from dpo_train import dpo_loss, pair_logps
from lowbit.layers import GROUP_SIZES, LowBitWeight, build
from model import Llama, ModelConfig, document_starts
from rm_train import pair_scores, reward_loss
from sft import answer_loss, loss_weights, make_batch

# the vocabulary is odd, as 64,793 is; four heads share two of keys and values
SHAPE = dict(dim=128, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=1003, max_seq_len=256)
EOS, EXACT = 2, Env(0, 1, torch.device("cpu"))


class Compiled(Env):
    """Where models are compiled, too."""


def build_model(env, seed=0, **changes):
    """A model whose distributions are far from flat: on the device, or for EXACT in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Llama(ModelConfig(**SHAPE | changes))
        for p in model.parameters():
            if p.dim() == 2:
                torch.nn.init.normal_(p, std=0.06)
    model = model.to(env.device, torch.float64 if env is EXACT else torch.float32).eval()
    if isinstance(env, Compiled):
        distributed.compiled(model, env, dict(compile=True))
    return model


def conversations(seed=0, sizes=((9, 30), (4, 60), (20, 7), (15, 40), (30, 33), (2, 11))):
    """[(ids, loss_mask)] of questions and answers of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, SHAPE["vocab_size"], (q + a,), generator=generator).numpy() for q, a in sizes]
    return [(row, (torch.arange(q + a) >= q).long().numpy()) for row, (q, a) in zip(ids, sizes, strict=True)]


def replies(env):
    """The conversations as a Rollout."""
    rows = conversations()
    batch = pad_batch(rows)
    texts = [ids[mask == 1].tolist() for ids, mask in rows]
    ended = torch.ones(len(rows), dtype=torch.bool)
    return Rollout(batch["ids"], batch["lengths"], batch["loss_mask"][:, 1:], ended, texts, device=env.device)


# the steps: a function of Env, whose gradients are left in the models that it returns with the loss


def backward(loss, *models):
    loss.backward()
    return loss.item(), models


def pretrain_step(env, documents=False):
    model = build_model(env)
    ids = torch.randint(3, SHAPE["vocab_size"], (4, 129), generator=torch.Generator().manual_seed(0))
    ids[:, 20::37] = EOS
    starts = document_starts(document_numbers(ids[:, :-1], EOS)).to(env.device) if documents else None
    x, y = ids[:, :-1].to(env.device), ids[:, 1:].to(env.device)
    with env.autocast():
        loss = model(x, y, documents=starts)
    return backward(loss, model)


def sft_step(env, packed=False):
    """Packed or padded it is the same loss, and for EXACT always the padded one."""
    model, rows = build_model(env), conversations()
    chosen = [[0, 2], [1, 5], [3], [4]] if packed and env is not EXACT else range(len(rows))
    batch = to_device(make_batch(rows, chosen, keep_multiple(env.device)), env.device)
    weights = loss_weights(batch["loss_mask"], "example", batch.get("documents"))
    with env.autocast():
        loss = answer_loss(model, batch, weights / len(rows))
    return backward(loss, model)


def pairs(env):
    return pair_batch(conversations(0), conversations(1), range(6), env.device)


def rm_step(env):
    model = build_model(env, scalar_head=True)
    chosen_scores, rejected_scores = pair_scores(model, pairs(env), env)
    return backward(reward_loss(chosen_scores, rejected_scores).mean(), model)


def dpo_step(env):
    model, reference = build_model(env), build_model(env, seed=1)
    batch = pairs(env)
    with torch.no_grad():
        ref_logps, _ = pair_logps(reference, batch, env)
    logps, tokens = pair_logps(model, batch, env)
    loss, _ = dpo_loss(logps, ref_logps, tokens, beta=0.01)
    return backward(loss.mean(), model)


def with_old_numbers(env, method, **changes):
    """What the model said of the replies in float64, moved: some in reach of the clipping, none near its edge."""
    ids = replies(EXACT).ids
    with torch.no_grad():
        exact = getattr(build_model(EXACT, **changes), method)(ids)[:, : ids.size(1) - 1]  # (B, T-1)
    moved = torch.tensor([-0.6, -0.05, 0.05, 0.6], dtype=exact.dtype).repeat(exact.numel())[: exact.numel()]
    return (exact + moved.view_as(exact)).to(env.device)


def stand_in(env, losses):
    """What `update` needs of a Stage: its gradients stay where they are."""
    return SimpleNamespace(env=env, clip_and_step=lambda step, loss: losses.append(loss) or 1.0)


def advantages_of(logps):
    return torch.randn(logps.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(logps)


def ppo_step(env):
    policy, value, batch, losses = build_model(env), build_model(env, scalar_head=True), replies(env), []
    old, old_values = with_old_numbers(env, "token_logps"), with_old_numbers(env, "values", scalar_head=True)
    advantages, generator = advantages_of(old), torch.Generator().manual_seed(0)
    fixed = old, old_values, advantages, old_values + advantages
    config = ppo_defaults | dict(ppo_epochs=1, minibatch_size=len(batch.ids), micro_batch_size=4)
    ppo_train.update(stand_in(env, losses), 0, policy, value, batch, fixed, config, generator)
    return losses[0], (policy, value)


def grpo_step(env):
    policy, batch, losses = build_model(env), replies(env), []
    old, generator = with_old_numbers(env, "token_logps"), torch.Generator().manual_seed(0)
    config = grpo_defaults | dict(epochs=1, minibatch_size=len(batch.ids), micro_batch_size=4)
    grpo_train.update(stand_in(env, losses), 0, policy, batch, old, advantages_of(old)[:, :1], config, generator)
    return losses[0], (policy,)


STEPS = {
    "pretrain": pretrain_step,
    "pretrain, documents apart": partial(pretrain_step, documents=True),
    "sft": sft_step,
    "sft, packed": partial(sft_step, packed=True),
    "rm": rm_step,
    "dpo": dpo_step,
    "ppo": ppo_step,
    "grpo": grpo_step,
}


def relative(found, exact):
    """The norm of the difference, as a share of the norm of `exact`."""
    return ((found.double().cpu() - exact).norm() / exact.norm()).item()


def compare_steps(found, exact):
    """How far a loss is off, and the gradient of the parameter that is farthest off; each a pair of (loss, models)."""
    (loss, models), (exact_loss, exact_models) = found, exact
    both = (zip(a.parameters(), b.parameters(), strict=True) for a, b in zip(models, exact_models, strict=True))
    gradient = max(relative(p.grad, exact_p.grad) for parameters in both for p, exact_p in parameters)
    return dict(loss=abs(loss - exact_loss), loss_bound=0.005, gradient=gradient, gradient_bound=0.06)


def check_step(env, name):
    return compare_steps(STEPS[name](env), STEPS[name](EXACT))


def check_compiled_step(env, name):
    return check_step(Compiled(**vars(env)), name)


@torch.no_grad()
def check_logps(env):
    """Nats by which the log-probability of a reply is off, and the reward model's score of one."""
    found = []
    for where in (env, EXACT):
        batch = replies(where).rows(range(6))
        with where.autocast():
            logps = build_model(where).token_logps(batch.ids, mask=batch.mask, keep=batch.keep).sum(1)  # (B,)
            scores = sequence_scores(build_model(where, scalar_head=True), batch.ids, batch.lengths)  # (B,)
        found.append(torch.stack((logps, scores)).double().cpu())  # (2, B)
    off = (found[0] - found[1]).abs().amax(1).tolist()
    return dict(reply=off[0], reply_bound=0.3, score=off[1], score_bound=0.05)


@torch.no_grad()
def check_generate(env, lengths, n=60):
    """Greedy replies to prompts of these lengths, then again with an end that some come to early: by how many nats a
    token is less likely than the likeliest, as float64 sees it; and the share of tokens that a forward without a cache
    would not choose, at near ties."""
    model, exact = build_model(env), build_model(EXACT)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, SHAPE["vocab_size"], (length,), generator=generator).tolist() for length in lengths]
    replies = model.generate(prompts, n, temperature=0, eos_id=-1).tokens
    shorter = model.generate(prompts, n, temperature=0, eos_id=replies[0][n // 3]).tokens
    worst, other, total = 0.0, 0, 0
    for prompt, reply in zip(prompts * 2, replies + shorter, strict=True):
        ids, chosen, place = torch.tensor([prompt + reply]), torch.tensor(reply), slice(len(prompt) - 1, -1)
        logits = exact(ids)[0, place]  # (n, V)
        worst = max(worst, (logits.amax(1) - logits.gather(1, chosen[:, None]).squeeze(1)).max().item())
        with env.autocast():
            other += (model(ids.to(env.device))[0, place].argmax(-1).cpu() != chosen).sum().item()
        total += len(reply)
    return dict(nats=worst, nats_bound=0.1, other=other / total, other_bound=0.1)


@torch.no_grad()
def check_kernels(env, quant):
    """Every layer of a quantized model beside its own weights in float64: as it is used, with few rows and many, and by
    each kernel that there is for few."""
    model = build(Llama(ModelConfig(**SHAPE)), quant)
    model.load_state_dict(quantize.quantize_weights(build_model(EXACT).float().state_dict(), quant))
    layers = [layer for layer in model.to(env.device).modules() if isinstance(layer, LowBitWeight)]
    worst, there, generator = 0.0, 0, torch.Generator().manual_seed(0)
    for layer in layers:
        kernels = list(filter(None, map(try_to_make, (layer.make_kernel, layer.make_dense))))
        there += len(kernels)
        for rows, multiply in [(100, layer.linear), *((n, k) for n in (1, 4) for k in (layer.linear, *kernels))]:
            x = torch.randn(rows, layer.n_columns, generator=generator, dtype=torch.float64)
            for dtype in {torch.float32, env.dtype}:
                y = multiply(x.to(env.device, dtype))
                worst = max(worst, relative(y, x @ layer.weight.double().cpu().T))
    return dict(error=worst, error_bound=0.02, kernels=f"{there} of {2 * len(layers)}")


def try_to_make(kernel):
    """A kernel of lowbit/layers.py, or None where this device has none."""
    try:
        return kernel()
    except RuntimeError:
        return None


def all_checks():
    """{name: (function, arguments after env)}"""
    found = {name: (check_step, name) for name in STEPS} | {"log-probabilities": (check_logps,)}
    compiled = ("pretrain", "pretrain, documents apart", "sft, packed", "dpo", "ppo")
    found |= {f"{name}, compiled": (check_compiled_step, name) for name in compiled}
    found |= {"generate, one prompt": (check_generate, [20]), "generate, even": (check_generate, [90] * 8)}
    found |= {"generate, ragged": (check_generate, [3, 100, 30, 11, 75]), "int8": (check_kernels, quantize.INT8)}
    for group_size in GROUP_SIZES:
        for symmetric in (False, True):
            quant = dict(method="int4", group_size=group_size, symmetric=symmetric)
            found[f"int4, groups of {group_size}{', symmetric' * symmetric}"] = check_kernels, quant
    return found


def failed(figures):
    """Which of a check's figures exceed their bounds, or are not finite."""
    bounds = {name: figures.get(f"{name}_bound") for name in figures}
    return [name for name, bound in bounds.items() if bound is not None and not figures[name] <= bound]

"""What benchmarks/gpu.py measures: a training step, decoding, a step of PPO and of GRPO, a process group of one.

A part is a function of env and a scale (REAL or TINY) that returns figures: rates a second, seconds, memory in GB.
"""

import gc
import os
import time
from functools import partial
from types import SimpleNamespace

import torch
from gpu_checks import relative
from harness import hf_config

import grpo_train
import ppo_train
from alignment.rewards import Reward
from common import distributed
from common.optim import build_optimizer
from common.plan import flops_per_token
from common.progress import peak_memory_gb
from configs.grpo_train import config as grpo_defaults
from configs.ppo_train import config as ppo_defaults
from configs.pretrain import config as pretrain_defaults
from configs.sizes import sizes
from model import Llama, ModelConfig

ORDER = [f"tiny-llama2-{size}" for size in ("134m", "24m", "256m", "58m", "9m")]  # the most wanted first
REAL = dict(
    sizes={name: (sizes[name], pretrain_defaults["batch_size"], sizes[name]["max_seq_len"]) for name in ORDER},
    decoded=ORDER[:2],
    prompt=32,  # tokens
    new_tokens=128,
    batches=(1, 32),
    policy=ORDER[1],
    rl=dict(),  # the stages' defaults
    matrix=8192,  # rows and columns
    seconds=3.0,  # of steps that are timed
)
TOY = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=301, max_seq_len=32)
TINY = REAL | dict(sizes=dict(toy=(TOY, 2, 32)), decoded=["toy"], prompt=4, new_tokens=4, batches=(1, 3), policy="toy")
TINY |= dict(rl=dict(rollout_size=4, group_size=2, minibatch_size=2, micro_batch_size=2, max_new_tokens=4))
TINY |= dict(matrix=64, seconds=0.05)


def clock(env):
    """Seconds, when the device has done all that it was given."""
    if env.device.type != "cpu":
        torch.accelerator.synchronize(env.device)
    return time.perf_counter()


def rate_of(call, env, seconds, warm_up=3):
    """Calls a second."""
    for _ in range(warm_up):
        call()
    start, calls = clock(env), 0
    while time.perf_counter() - start < seconds:
        call()
        calls += 1
    return calls / (clock(env) - start)


def forget(env):
    """Free what parts before have left, and count the peak of memory from here."""
    torch.compiler.reset()
    gc.collect()
    if env.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(env.device)


def measure_device(env, scale):
    """What it is, and FLOP/s of large matrix products."""
    n = scale["matrix"]
    a, b = torch.randn(2, n, n, device=env.device, dtype=env.dtype)
    facts = dict(name="cpu", gb=0.0)
    if env.device.type == "cuda":
        properties = torch.cuda.get_device_properties(env.device)
        facts = dict(name=properties.name, gb=properties.total_memory / 1e9, cuda=torch.version.cuda)
    flops = 2 * n**3 * rate_of(lambda: torch.mm(a, b), env, scale["seconds"] / 2)
    return facts | dict(torch=torch.__version__, dtype=str(env.dtype).removeprefix("torch."), flops=flops)


def stand_in(model, env, optimizer):
    """clip_and_step(step, loss) as a Stage has it, for `update` and for a step of training."""

    def clip_and_step(step, loss):
        grad_norm = distributed.clip_gradients(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return grad_norm

    return SimpleNamespace(env=env, clip_and_step=clip_and_step)


def hf_llama(config, env, dtype):
    """transformers' model of the same shape."""
    from transformers import LlamaForCausalLM

    with torch.device(env.device):
        return LlamaForCausalLM(hf_config(config)).to(dtype)


def training_step(model, loss_of, env):
    """A step of pretraining: loss_of() is the loss of a micro-batch."""
    stage = stand_in(model, env, build_optimizer(model, pretrain_defaults))

    def step():
        with env.autocast():
            loss = loss_of()
        loss.backward()
        stage.clip_and_step(0, loss)

    return step


def train(env, scale, size, kind):
    """Tokens a second at the largest micro-batch that fits, from the default one down."""
    shape, B, T = scale["sizes"][size]
    while True:
        try:
            return train_at(env, scale["seconds"], ModelConfig(**shape), B, T, kind)
        except torch.OutOfMemoryError:
            if B == 1:
                raise
        B //= 2
        forget(env)


def train_at(env, seconds, config, B, T, kind):
    ids = torch.randint(3, config.vocab_size, (B, T + 1), device=env.device)
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    if kind == "transformers":
        model = hf_llama(config, env, torch.float32)
        forward = torch.compile(model)
        step = training_step(model, lambda: forward(input_ids=x, labels=x, use_cache=False).loss, env)
    else:
        model = Llama(config).to(env.device)
        if kind == "compiled" and (missing := distributed.missing_to_compile(env.device)):
            raise RuntimeError(f"not compiled: {missing} is not here")
        distributed.compiled(model, env, dict(compile=kind == "compiled"), dynamic=None)
        step = training_step(model, lambda: model(x, y), env)
    rate = B * T * rate_of(step, env, seconds)
    flops, peak_gb = rate * flops_per_token(config, T), peak_memory_gb(env.device)
    return dict(rate=rate, flops=flops, batch=B, tokens=T, peak_gb=peak_gb)


@torch.no_grad()
def decode(env, scale, size, program, B):
    """New tokens a second, greedy, all prompts of one length and no end before the last token; weights as `generate`
    holds them by default, transformers' in the device's dtype."""
    config, n = ModelConfig(**scale["sizes"][size][0]), scale["new_tokens"]
    prompts = torch.randint(3, config.vocab_size, (B, scale["prompt"]))
    if program == "ours":
        model, prompts = Llama(config).to(env.device).eval(), prompts.tolist()
        call = lambda: model.generate(prompts, n, temperature=0, eos_id=-1)  # noqa: E731
    else:
        model, prompts = hf_llama(config, env, env.dtype).eval(), prompts.to(env.device)
        options = dict(do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0, max_new_tokens=n)
        call = lambda: model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)  # noqa: E731
    rate = B * n * rate_of(call, env, scale["seconds"] / 2, warm_up=1)
    return dict(rate=rate, batch=B, peak_gb=peak_memory_gb(env.device))


def make_ppo(new_model, config, env):
    """What learns, and the two halves of its step: experience(reward, prompts) and update(stage, batch, fixed)."""
    policy, reference, value = new_model(), new_model(), new_model(scalar_head=True)

    def experience(reward, prompts):
        return ppo_train.experience(policy, reference, value, reward, prompts, config["kl_coef"], 0, config, env)

    def update(stage, batch, fixed):
        return ppo_train.update(stage, 0, policy, value, batch, fixed, config, torch.Generator().manual_seed(0))

    return torch.nn.ModuleDict(dict(policy=policy, value=value)), experience, update


def make_grpo(new_model, config, env):
    policy, reference = new_model(), new_model()

    def experience(reward, prompts):
        batch, *fixed, metrics = grpo_train.experience(policy, reference, reward, prompts, 0, config, env)
        return batch, fixed, metrics

    def update(stage, batch, fixed):
        return grpo_train.update(stage, 0, policy, batch, *fixed, config, torch.Generator().manual_seed(0))

    return policy, experience, update


RL_STAGES = dict(ppo=(make_ppo, ppo_defaults), grpo=(make_grpo, grpo_defaults))


def reinforce(env, scale, stage):
    """Seconds of a step's two halves at the stage's defaults: what makes experience, and the updates.

    The reward is a reply's length, which needs no model; every id is decoded to a character.
    """
    make, defaults = RL_STAGES[stage]
    shape, _, T = scale["sizes"][scale["policy"]]
    config = defaults | dict(reward="length") | scale["rl"]

    def new_model(**head):
        return Llama(ModelConfig(**shape, **head)).to(env.device).eval()

    learner, experience, update = make(new_model, config, env)
    stage = stand_in(learner, env, build_optimizer(learner, config))
    tokenizer = SimpleNamespace(bos_id=1, eos_id=2, decode=lambda ids: "".join(chr(0x4E00 + i % 20_000) for i in ids))
    reward = Reward(config, SimpleNamespace(model_config=dict(max_seq_len=T)), tokenizer, env)
    reward.norm = [0.5, 0.5]
    prompts = torch.randint(3, 300, (config["rollout_size"] // config.get("group_size", 1), scale["prompt"])).tolist()
    for _ in range(2):  # the first one warms up
        times = [clock(env)]
        batch, fixed, metrics = experience(reward, prompts)
        times.append(clock(env))
        update(stage, batch, fixed)
        times.append(clock(env))
    found = dict(replies=len(batch.replies), length=metrics["length"])
    found |= dict(experience_s=times[1] - times[0], update_s=times[2] - times[1])
    return found | dict(peak_gb=peak_memory_gb(env.device))


def run_distributed(env, scale, kind):
    """A step of pretraining in a process group of one beside the same without: loss, gradients, and time in units of
    the plain one's."""
    shape, B, T = scale["sizes"][scale["policy"]]
    config = ModelConfig(**shape)
    ids = torch.randint(3, config.vocab_size, (B, T + 1), device=env.device)
    plain, wrapped = Llama(config).to(env.device), Llama(config).to(env.device)
    wrapped.load_state_dict(plain.state_dict())
    group = dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=env.device.index or 0, MASTER_ADDR="127.0.0.1", MASTER_PORT=0)
    os.environ.update({key: str(value) for key, value in group.items()})
    try:
        distributed.setup(env.device.type, str(env.dtype).removeprefix("torch."))
        wrap = dict(ddp=distributed.Replicated, fsdp=partial(distributed._shard, env=env))[kind]
        found = []
        for model, forward in ((plain, plain), (wrapped, wrap(wrapped))):
            with env.autocast():
                loss = forward(ids[:, :-1], ids[:, 1:])
            loss.backward()
            gradient = torch.cat([distributed.whole(p.grad).flatten().double().cpu() for p in model.parameters()])
            step = training_step(model, lambda: forward(ids[:, :-1], ids[:, 1:]), env)  # noqa: B023
            found.append((loss.item(), gradient, rate_of(step, env, scale["seconds"] / 2)))
    finally:
        distributed.cleanup(env)
        for key in group:
            del os.environ[key]
    (loss, gradient, rate), (other_loss, other_gradient, other_rate) = found
    figures = dict(loss=abs(other_loss - loss), loss_bound=1e-3, gradient=relative(other_gradient, gradient))
    return figures | dict(gradient_bound=1e-2, time=rate / other_rate)

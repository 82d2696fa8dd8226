"""Sampling beside Hugging Face generate, and a step of GRPO beside TRL's GRPOTrainer, on the same CPU.

Sampling: 32 prompts, the same weights, prompts and number of new tokens on both sides, as nothing ends a reply.
GRPO: the same model, prompts, number of replies, group size, longest reply and single update, in float32, with one
reference and a reward that costs nothing. The learning rate is tiny, so that replies stay as long as they are. Every
measurement is a process of its own, in turns; of each the best round counts.

    python benchmarks/align_rollout.py --ckpt=out/demo/sft --data=data/demo

in:  a run of sft.py, prompts.pkl and meta.json; transformers, trl (requirements-dev.txt)
out: tables and, last, one line of JSON on standard output
"""

import contextlib
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from harness import ROOT, argument_parser, fastest, flags, launch, measure, print_figures, run_python

from alignment.rollout import rollout
from common import checkpoint
from common.metrics import read_metrics
from common.tables import format_table
from configs.demo.pretrain import config as demo
from configs.sizes import sizes
from dataset.batches import load_prompts
from interop import exchange, hf
from model import Llama, ModelConfig
from tokenizer import encode_prompt

SHAPES = {
    "demo": demo["model"] | dict(vocab_size=6144),
    "tiny-llama2-24m": sizes["tiny-llama2-24m"] | dict(vocab_size=64793),
}
BATCH, NEW_TOKENS, REPEATS = 32, 80, 3
GROUP, REPLIES, LEARNING_RATE = 8, 64, 1e-7


def hf_twin(model):
    """LlamaForCausalLM with the weights of our model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = model.config
    shape = {theirs: getattr(config, ours) for ours, theirs in hf.KEYS.items()}
    rope = dict(rope_theta=config.rope_theta, rope_type="default")
    twin = LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=rope))
    weights = {
        exchange.renamed(name, 1): hf.reorder(name, weight, config, hf.pairs_to_halves)
        for name, weight in model.state_dict().items()
    }
    missing, unexpected = twin.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        torch.testing.assert_close(twin.eval()(ids).logits, model.head(model.hidden(ids)), atol=1e-3, rtol=1e-3)
    return twin


def sampler(kind, shape):
    """A function that samples NEW_TOKENS for each of BATCH prompts, and returns how many tokens came."""
    torch.manual_seed(0)
    model = Llama(ModelConfig(**SHAPES[shape])).eval()
    lengths = [8 + i % 16 for i in range(BATCH)]
    prompts = [torch.randint(3, model.config.vocab_size, (n,)).tolist() for n in lengths]
    if kind == "ours":
        return lambda: int(rollout(model, prompts, NEW_TOKENS, eos_id=-1, seed=0).mask.sum())
    twin, longest = hf_twin(model), max(lengths)
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    sampling = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=None, pad_token_id=0)

    def sample():
        made = twin.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, use_cache=True, **sampling)
        return made[:, longest:].numel()

    return sample


@torch.no_grad()
def measure_rollout(kind, shape):
    """Tokens a second, the best of some after one that warms up."""
    sample, best = sampler(kind, shape), 0.0
    assert sample() == BATCH * NEW_TOKENS
    for _ in range(REPEATS):
        start = time.perf_counter()
        best = max(best, sample() / (time.perf_counter() - start))
    return dict(rate=best)


def measure_grpo(ckpt, data, steps):
    """Replies a second of grpo_train.py, from its second step on, and how long they are."""
    with tempfile.TemporaryDirectory() as folder:
        keys = dict(init_from=ckpt, data=data, out=f"{folder}/grpo", reward="length", group_size=GROUP)
        keys |= dict(rollout_size=REPLIES, minibatch_size=REPLIES, micro_batch_size=REPLIES, epochs=1)
        keys |= dict(max_steps=steps + 1, warmup_steps=0, learning_rate=LEARNING_RATE, min_learning_rate=LEARNING_RATE)
        keys |= dict(max_new_tokens=NEW_TOKENS, eval_prompts=1, eval_interval=steps + 1, save_interval=steps + 1)
        keys |= dict(log_interval=1, device="cpu", dtype="float32")
        run_python(ROOT / "grpo_train.py", ROOT / "configs/demo/grpo.py", *flags(**keys))
        rows = [row for row in read_metrics(Path(folder) / "grpo" / "metrics.jsonl") if "grpo/length" in row]
    first, *rest = rows
    seconds = rest[-1]["seconds"] - first["seconds"]
    return dict(rate=REPLIES * len(rest) / seconds, length=sum(row["grpo/length"] for row in rest) / len(rest))


def prompt_texts(tokenizer, data):
    """What data/prompts.pkl asks, as text that becomes the same ids again."""
    prompts, _ = load_prompts(Path(data) / "prompts.pkl", tokenizer.vocab_size)
    texts = [(tokenizer.decode(ids), ids) for ids in prompts]
    return [text for text, ids in texts if encode_prompt(tokenizer, [dict(role="user", content=text)]) == ids]


def measure_trl(ckpt, data, steps):
    """The same of TRL's GRPOTrainer, on an export of the checkpoint."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    ckpt, ends = checkpoint.load(ckpt), []
    tokenizer = checkpoint.tokenizer_of(ckpt)

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    def reward(completions, **_):
        return [float(len(completion[0]["content"])) for completion in completions]

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        hf.export_hf(ckpt, tokenizer, Path(folder), "float32")
        arguments = dict(per_device_train_batch_size=REPLIES, num_generations=GROUP, max_completion_length=NEW_TOKENS)
        arguments |= dict(max_steps=steps + 1, num_iterations=1, beta=0.1, learning_rate=LEARNING_RATE, seed=1)
        arguments |= dict(temperature=1.0, top_p=1.0, top_k=0, bf16=False, use_cpu=True, gradient_checkpointing=False)
        arguments |= dict(report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True)
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            reward_funcs=reward,
            args=GRPOConfig(output_dir=f"{folder}/trl", **arguments),
            train_dataset=Dataset.from_list(
                [dict(prompt=[dict(role="user", content=text)]) for text in prompt_texts(tokenizer, data)]
            ),
            processing_class=AutoTokenizer.from_pretrained(folder),
            callbacks=[Clock()],
        )
        trainer.train()
    lengths = [row["completions/mean_length"] for row in trainer.state.log_history if "completions/mean_length" in row]
    seconds = ends[-1] - ends[0]
    return dict(rate=REPLIES * (len(ends) - 1) / seconds, length=sum(lengths[1:]) / len(lengths[1:]))


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("--ckpt", default="out/demo/sft")
    parser.add_argument("--data", default="data/demo")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="of GRPO that are timed, after one that warms up")
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} threads")
    offline = partial(measure, HF_HUB_OFFLINE="1")  # all there is to load is on disk
    jobs = {(kind, shape): (measure_rollout, kind, shape) for shape in SHAPES for kind in ("ours", "hf")}
    rates = fastest(jobs, options.rounds, offline)
    figures, rows = {}, []
    for shape in SHAPES:
        ours, hf = (rates[kind, shape]["rate"] for kind in ("ours", "hf"))
        rows.append(dict(shape=shape, ours=ours, hf=hf, ratio=ours / hf))
        prefix = "" if shape == "demo" else "24m_"
        figures |= {f"{prefix}rollout_tokens_ratio_hf": ours / hf}
        figures |= {f"{prefix}rollout_tokens_per_s_ours": ours, f"{prefix}rollout_tokens_per_s_hf": hf}
    columns = {"shape": "{shape}", "ours (tokens/s)": "{ours:,.0f}", "Hugging Face (tokens/s)": "{hf:,.0f}"}
    print(format_table(columns | {"ratio": "{ratio:.2f}"}, rows))
    functions = dict(grpo=measure_grpo, trl=measure_trl)
    jobs = {kind: (function, options.ckpt, options.data, options.steps) for kind, function in functions.items()}
    ours, trl = fastest(jobs, options.rounds, offline).values()
    rows = [dict(name="grpo_train.py") | ours, dict(name="TRL GRPOTrainer") | trl]
    print(format_table({"": "{name}", "replies/s": "{rate:.1f}", "tokens per reply": "{length:.1f}"}, rows))
    figures |= dict(episodes_ratio_trl=ours["rate"] / trl["rate"])
    figures |= dict(episodes_per_s_ours=ours["rate"], episodes_per_s_trl=trl["rate"])
    print_figures(figures, 3)


if __name__ == "__main__":
    launch(main)

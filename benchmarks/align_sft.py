"""Fine-tuning beside the usual Hugging Face Trainer: answer tokens a second, and the loss of the same examples.

The Trainer pads every conversation to the context, as tutorials do, and computes logits everywhere; sft.py packs
conversations into rows and computes the head on answers only. Both train the same shape on the same alpaca file, in
float32 with AdamW, about as many conversations a step, each in a process of its own, in turns; of the speeds the best
round counts. The losses are those of the first conversations before any step.

    python benchmarks/align_sft.py --data ../shared/data/sft

in:  a folder with an alpaca .json; transformers and accelerate (requirements-dev.txt)
out: a table and, last, one line of JSON on standard output
"""

import sys
import tempfile
import time
from pathlib import Path

import torch
from harness import ROOT, argument_parser, fastest, flags, launch, print_figures, run_python

import sft
from common import checkpoint
from common.optim import build_optimizer, set_learning_rate
from common.progress import peak_memory_gb
from common.tables import format_table
from configs.sft import config as defaults
from configs.sizes import sizes
from dataset.batches import PackedOrder, pad_batch
from dataset.examples import Examples
from dataset.formats import load_pkl
from model import Llama, ModelConfig
from tokenizer import Tokenizer

ALPACA, TOKENIZER = "llamafactory_alpaca_zh_demo.json", "tokenizer/chatglm3_tokenizer.model"
SHAPE, CONTEXT = sizes["tiny-llama2-24m"], 512
CONVERSATIONS, ROWS = 8, 2  # of a step; a row of 512 tokens holds four of this file on average
WARM_UP, STEPS = 1, 4
NAMES = dict(hf="Hugging Face Trainer, padded to the context", packed="sft.py, packed", bucketed="sft.py, by length")


def prepare(folder, data, tokenizer):
    """sft.pkl, a checkpoint of random weights and the same weights for transformers."""
    options = dict(sources=f"alpaca={data / ALPACA}", tokenizer=tokenizer, parts="sft", max_seq_len=CONTEXT, out=folder)
    run_python(ROOT / "data_process.py", *flags(**options))
    tok = Tokenizer(tokenizer.read_bytes())
    torch.manual_seed(0)
    model = Llama(ModelConfig(**SHAPE | dict(vocab_size=tok.vocab_size, max_seq_len=CONTEXT)))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(3)  # at first every distribution is flat, and so are all losses, right or wrong
    facts = dict(stage="pretrain", step=0, tokens_seen=0, config={}, tokenizer=tok.model_bytes)
    checkpoint.save(folder / "ckpt.pt", model=model, **facts)
    run_python(ROOT / "export.py", *flags(format="hf", ckpt=folder, out=folder / "hf"))


def training_examples(folder):
    return Examples(load_pkl(folder / "sft.pkl")).split()[0]


def worker_ours(folder, packing):
    """(loss of the first conversations, answer tokens, seconds) of sft.py's step."""
    examples, model = training_examples(folder), checkpoint.build_model(checkpoint.load(folder))
    config = defaults | dict(packing=packing, batch_size=ROWS if packing else CONVERSATIONS)
    optimizer = build_optimizer(model, config)
    set_learning_rate(optimizer, config["learning_rate"])

    first = examples.select(range(CONVERSATIONS))
    rows = PackedOrder(first.lengths, CONTEXT, 1, 0)
    batches = [sft.make_batch(first, rows[i]) for i in range(rows.per_epoch)]
    total = sum(batch["loss_mask"].sum() for batch in batches)
    with torch.no_grad():
        loss = sum(sft.answer_loss(model, batch, batch["loss_mask"] / total).item() for batch in batches)

    order, _ = sft.make_order(examples, config, CONTEXT)
    tokens = 0
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            tokens, start = 0, time.perf_counter()
        batch = sft.make_batch(examples, order[step])
        weights = sft.loss_weights(batch["loss_mask"], "token", batch.get("documents"))
        total = weights[:, 1:].sum().item()
        sft.answer_loss(model, batch, weights / total).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config["grad_clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += total
    return loss, tokens, time.perf_counter() - start


def padded(rows):
    """What a tutorial's collator makes: everything as long as the context, -100 where no answer is."""
    batch = pad_batch([*rows, ([0] * CONTEXT, [0] * CONTEXT)])
    ids, answers = batch["ids"][:-1], batch["loss_mask"][:-1] > 0
    attended = torch.arange(CONTEXT) < batch["lengths"][:-1, None]
    return dict(input_ids=ids, attention_mask=attended.long(), labels=ids.masked_fill(~answers, -100))


def worker_hf(folder):
    """The same of Trainer with the settings of a tutorial, without logs and checkpoints."""
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    examples, model = training_examples(folder), AutoModelForCausalLM.from_pretrained(folder / "hf")
    with torch.no_grad():
        loss = model(**padded([examples[i] for i in range(CONVERSATIONS)])).loss.item()
    counts, ends = [], []

    def collate(rows):
        batch = padded(rows)
        counts.append((batch["labels"] != -100).sum().item())
        return batch

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    settings = dict(per_device_train_batch_size=CONVERSATIONS, max_steps=WARM_UP + STEPS, optim="adamw_torch")
    settings |= dict(learning_rate=defaults["learning_rate"], remove_unused_columns=False, dataloader_pin_memory=False)
    settings |= dict(save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True)
    args = TrainingArguments(output_dir=folder / "trainer", **settings)
    Trainer(model, args, data_collator=collate, train_dataset=examples, callbacks=[Clock()]).train()
    # batches come in the order of the steps; the loader may have collated one more
    return loss, sum(counts[WARM_UP : WARM_UP + STEPS]), ends[-1] - ends[WARM_UP - 1]


def worker(kind, folder):
    folder = Path(folder)
    loss, tokens, seconds = worker_hf(folder) if kind == "hf" else worker_ours(folder, kind == "packed")
    return dict(loss=loss, rate=tokens / seconds, megabytes=peak_memory_gb() * 1e9 / 2**20)


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/sft", help=f"folder with {ALPACA}")
    parser.add_argument("--tokenizer", type=Path, help=f"a tokenizer.model; default {TOKENIZER} beside the folder")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    data = options.data.resolve()
    tokenizer = (options.tokenizer or data.parent / TOKENIZER).resolve()
    for path in (data / ALPACA, tokenizer):
        if not path.is_file():
            print(f"nothing to measure: {path} is not there", file=sys.stderr)
            sys.exit(2)
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), data, tokenizer)
        best = fastest({kind: (worker, kind, folder) for kind in NAMES}, options.rounds)
    columns = {
        "": "{name}",
        "answer tokens/s": "{rate:,.0f}",
        "peak memory (MB)": "{megabytes:,.0f}",
        "loss at step 0": "{loss:.6f}",
    }
    print(format_table(columns, [dict(name=NAMES[kind]) | result for kind, result in best.items()]))
    figures = dict(
        sft_answer_tokens_ratio_hf=best["packed"]["rate"] / best["hf"]["rate"],
        sft_answer_tokens_per_s=best["packed"]["rate"],
        sft_answer_tokens_per_s_hf=best["hf"]["rate"],
        sft_loss_ours=best["packed"]["loss"],
        sft_loss_hf=best["hf"]["loss"],
    )
    print_figures(figures, 6)


if __name__ == "__main__":
    launch(main)

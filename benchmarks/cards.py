"""What each stage takes of a GPU, the largest batch for cards of common sizes, and how fast pretraining may be.

Of the five sizes with ChatGLM3's 64,793 rows of vocabulary, rows as long as the model's context, AdamW, bfloat16, on
one process: by the formulae of common/memory.py and common/plan.py, nothing runs. Of each card
1 GB is set aside for CUDA itself; 0 is what does not fit. PPO and GRPO generate a whole step's replies in one batch.

    python benchmarks/cards.py

out: three tables in Markdown and, last, one line of JSON on standard output
"""

from importlib import import_module

from harness import argument_parser, launch, print_figures

from common.memory import STAGES, largest_batch, stage_memory
from common.plan import CARDS, RESERVED, flops_per_token, seconds_per_token
from common.tables import format_table
from configs.sizes import sizes
from model import ModelConfig

GIGABYTES = (6, 8, 12, 16, 24, 80)


def figures_of(stage, name):
    """{"peak_gb": at the default batch, "6": largest batch on a card of 6 GB, ...} of a stage and a size."""
    shape, config = ModelConfig(**sizes[name]), import_module(f"configs.{stage}").config
    batch_size, T = config.get("batch_size", config.get("micro_batch_size")), shape.max_seq_len
    replies = config.get("rollout_size", 0)
    peak = stage_memory(stage, shape, config, True, batch_size, T, replies)["peak"]
    cards = {str(card): largest_batch(card * 1e9 - RESERVED, stage, shape, config, T, replies) for card in GIGABYTES}
    return dict(batch=batch_size, peak_gb=round(peak / 1e9, 2)) | cards


def speeds_of(name):
    """{card: (tokens a second, share of its peak)} of pretraining a size at the default batch."""
    shape, batch_size = ModelConfig(**sizes[name]), import_module("configs.pretrain").config["batch_size"]
    T, speeds = shape.max_seq_len, {}
    for tflops, bandwidth, _, card in CARDS.values():
        seconds = seconds_per_token(shape, batch_size * T, T, tflops, bandwidth)[1]
        speeds[card] = round(1 / seconds), round(flops_per_token(shape, T) / seconds / tflops / 1e12, 3)
    return speeds


def main():
    argument_parser(__doc__).parse_args()
    found = {stage: {name: figures_of(stage, name) for name in sizes} for stage in STAGES}
    columns = {"stage": "{stage}"} | {name.removeprefix("tiny-llama2-"): f"{{{name}}}" for name in sizes}
    peaks = [{"stage": f"{stage}, {next(iter(by_size.values()))['batch']}"} for stage, by_size in found.items()]
    largest = [{"stage": stage} for stage in found]
    for row, more, by_size in zip(peaks, largest, found.values(), strict=True):
        row |= {name: f"{figures['peak_gb']:.2f}" for name, figures in by_size.items()}
        more |= {name: " / ".join(f"{figures[str(card)]:,}" for card in GIGABYTES) for name, figures in by_size.items()}
    print(f"peak in GB at the default micro-batch\n\n{format_table(columns, peaks)}\n")
    print(f"largest micro-batch at {' / '.join(map(str, GIGABYTES))} GB\n\n{format_table(columns, largest)}\n")
    speeds = {name: speeds_of(name) for name in sizes}
    rows = [
        {"card": card} | {name: "{:,} ({:.0%})".format(*by_card[card]) for name, by_card in speeds.items()}
        for *_, card in CARDS.values()
    ]
    columns = {"tokens/s": "{card}"} | {key: text for key, text in columns.items() if key != "stage"}
    print(f"pretraining, modelled, and the share of the card's peak\n\n{format_table(columns, rows)}\n")
    print_figures(found | dict(speeds=speeds))


if __name__ == "__main__":
    launch(main)

"""How much of a GPU's memory each stage takes at its default batch, and the largest batch for cards of common sizes.

Of the five sizes with ChatGLM3's 64,793 rows of vocabulary, rows as long as the model's context, AdamW, bfloat16, on
one process without torch.compile: by the formulae of common/memory.py, nothing runs. Of each card 1 GB is set aside for
CUDA itself; 0 is what does not fit. PPO and GRPO generate the replies of a whole step in one batch.

    python benchmarks/memory.py

out: two tables in Markdown and, last, one line of JSON on standard output
"""

from importlib import import_module

from harness import argument_parser, launch, print_figures

from common.memory import STAGES, largest_batch, stage_memory
from common.plan import RESERVED
from common.report import format_table
from configs.sizes import sizes
from model import ModelConfig

CARDS = (6, 8, 12, 16, 24, 80)  # GB


def figures_of(stage, name):
    """{"peak_gb": at the default batch, "6": largest batch on a card of 6 GB, ...} of a stage and a size."""
    shape, config = ModelConfig(**sizes[name]), import_module(f"configs.{stage}").config
    batch_size, T = config.get("batch_size", config.get("micro_batch_size")), shape.max_seq_len
    replies = config.get("rollout_size", 0)
    peak = stage_memory(stage, shape, config, True, batch_size, T, replies)["peak"]
    cards = {str(card): largest_batch(card * 1e9 - RESERVED, stage, shape, config, T, replies) for card in CARDS}
    return dict(batch=batch_size, peak_gb=round(peak / 1e9, 2)) | cards


def main():
    argument_parser(__doc__).parse_args()
    found = {stage: {name: figures_of(stage, name) for name in sizes} for stage in STAGES}
    columns = {"stage": "{stage}"} | {name.removeprefix("tiny-llama2-"): f"{{{name}}}" for name in sizes}
    peaks = [{"stage": f"{stage}, {next(iter(by_size.values()))['batch']}"} for stage, by_size in found.items()]
    largest = [{"stage": stage} for stage in found]
    for row, more, by_size in zip(peaks, largest, found.values(), strict=True):
        row |= {name: f"{figures['peak_gb']:.2f}" for name, figures in by_size.items()}
        more |= {name: " / ".join(f"{figures[str(card)]:,}" for card in CARDS) for name, figures in by_size.items()}
    print(f"peak in GB at the default micro-batch\n\n{format_table(columns, peaks)}\n")
    print(f"largest micro-batch at {' / '.join(map(str, CARDS))} GB\n\n{format_table(columns, largest)}\n")
    print_figures(found)


if __name__ == "__main__":
    launch(main)

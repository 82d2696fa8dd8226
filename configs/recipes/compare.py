from configs.eval_generate import config as base
from configs.recipes import DATA, OUT, in_smoke

recipe = dict(
    compare=[f"{OUT}/{run}" for run in ("sft", "dpo", "ppo", "grpo", "int8", "int4")],
    data=DATA,
    reward_model=f"{OUT}/rm",
    best_of=[2, 4, 8],
    max_new_tokens=256,
    report=f"{OUT}/report.md",
    picture=f"{OUT}/compare.png",
)
config = (
    base | recipe | in_smoke(compare_prompts=4, compare_samples=2, compare_examples=8, best_of=[2], max_new_tokens=8)
)

from configs.demo import DATA, OUT, in_smoke
from configs.quantize import config as base

config = base | dict(
    init_from=f"{OUT}/sft",
    data=DATA,
    out=f"{OUT}/quantize",
    eval_tokens=0,
    sample_prompts=["写一条酒店好评。", "请写一条负面的图书评价。"],  # the demo model only writes reviews
)
config |= in_smoke(eval_tokens=8192, sample_tokens=20)

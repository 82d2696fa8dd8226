from configs.quantize import config as base

config = base | dict(
    init_from="out/demo/sft",
    data="data/demo",
    out="out/demo/quantize",
    eval_tokens=0,
    sample_prompts=["写一条酒店好评。", "请写一条负面的图书评价。"],  # the demo model only writes reviews
)

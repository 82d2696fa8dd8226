from configs.quantize import config as base

config = base | dict(
    init_from="out/poems/grpo",
    data="data/poems",
    out="out/poems/quantize",
    eval_tokens=0,
    sample_prompts=["以《春日》为题写一首七绝，押人韵。", "写一首五律，题为《山居》，押心韵。"],
)

from configs.quantize import config as base
from configs.recipes import DATA, OUT, in_smoke

recipe = dict(init_from=f"{OUT}/grpo", data=DATA, out=f"{OUT}/int8")
config = base | recipe | in_smoke(eval_tokens=2048, calibration_tokens=2048, sample_tokens=8)

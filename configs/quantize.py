config = dict(
    init_from="out/zh/sft",  # run directory or file of any stage's float32 checkpoint
    data="data/zh",  # where val.bin is: what the quantized model is compared on
    out="out/zh/quantize",  # run directory
    method="int8",  # one scale per output channel, round to nearest
    eval_tokens=200_000,  # tokens of val.bin to measure on, evenly spaced; 0 = all of them
    eval_batch_size=8,  # rows of max_seq_len tokens at a time
    sample_prompts=[
        "今天天气很好，",
        "请介绍一下你自己。",
    ],  # greedily answered by both models in samples.txt
    sample_tokens=80,  # longest reply
    device="auto",  # cuda, mps or cpu, the first there is
    dtype="float32",  # of the measurement; bfloat16 would hide the differences measured
    resume=False,  # keep a finished result in `out`
    overwrite=False,  # replace what is in `out`
)

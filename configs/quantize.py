config = dict(
    init_from="out/zh/sft",  # run directory or file of any stage's float32 checkpoint
    data="data/zh",  # where val.*.bin are: what the quantized model is compared on
    verify_data=True,  # compare the sha256 of these files with meta.json first: seconds a gigabyte; False: trust them
    out="out/zh/quantize",  # run directory
    method="int8",  # int8: one scale per output channel, round to nearest; int4: a grid per group, by `algorithm`
    algorithm="gptq",  # of int4: gptq, or rtn, round to nearest, which needs no calibration
    group_size=64,  # of int4: columns that share a scale; 32 64 128
    symmetric=False,  # of int4: zero in the middle of every grid, instead of where it suits the group
    int8_layers=["tok_embeddings", "output", "scalar"],  # of int4: layers kept in int8, patterns of names
    calibration="train",  # of gptq: what in `data` to measure inputs on, train (its train.*.bin) or sft.pkl
    calibration_tokens=65_536,  # of gptq: how much of it, evenly spaced
    damping=0.01,  # of gptq: added to the diagonal of the inputs' matrix, as a share of its mean
    act_order=True,  # of gptq: columns with the largest inputs first
    range_search=True,  # of gptq: shrink the range of a group where that lessens the error
    eval_tokens=200_000,  # validation tokens to measure on, evenly spaced; 0 = all of them
    eval_batch_size=8,  # rows of max_seq_len tokens at a time, in calibration too
    sample_prompts=[
        "今天天气很好，",
        "请介绍一下你自己。",
    ],  # greedily answered by both models in samples.txt
    sample_tokens=80,  # longest reply
    device="auto",  # cuda, mps or cpu, the first there is
    resume=False,  # keep a finished result in `out`
    overwrite=False,  # replace what is in `out`
)

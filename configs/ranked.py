config = dict(
    ckpt="out/zh/sft",  # run directory or checkpoint: whose replies are ranked
    data="data/zh",  # folder with prompts.pkl and meta.json from data_process.py
    out="data/ranked.jsonl",  # file of rows: prompt, chosen, rejected
    reward="length",  # model: reward_model's; length: reward_length's; module:function: f(prompts, replies, **fields)
    reward_model="out/zh/rm",  # run directory or checkpoint of rm_train.py: scores
    reward_length=[20, 60],  # characters of a reply that reward=length gives 1; down to 0 at none and twice the longest
    rule_weight=1.0,  # reward=model+module:function: the function's reward counts so much beside the model's score
    prompts=1000,  # training prompts that are answered, chosen by chance
    samples=8,  # replies to each
    pairs=1,  # of each prompt's replies at most: best and worst, then second best and second worst
    max_new_tokens=128,  # longest reply
    temperature=1.0,  # of sampling
    batch_size=128,  # replies sampled at a time
    micro_batch_size=64,  # replies that a reward model scores at a time
    seed=1,  # of sampling
    compile="auto",  # torch.compile the reward model: auto, on a GPU with Triton and a C compiler; true, elsewhere too
    device="auto",  # auto: cuda, else mps, else cpu
    overwrite=False,  # replace a file `out`
)

config = dict(
    data="data/zh",  # folder with train.*.bin, val.*.bin and meta.json from data_process.py
    tokenizer="out/zh/tokenizer",  # SentencePiece file, its folder, or a Hugging Face id; the one data was made with
    mixture=[],  # source=weight of training rows, as reviews=3; empty: all sources by size, each token once an epoch
    out="out/zh/pretrain",  # run directory: config.json, metrics.jsonl, loss.png, samples.txt, ckpt.pt
    model=dict(
        dim=512,  # width; configs/sizes.py has the five sizes of the project
        n_layers=8,  # blocks
        n_heads=8,  # query heads
        n_kv_heads=8,  # key and value heads; fewer than n_heads: grouped-query attention
        max_seq_len=512,  # longest context in tokens
        dropout=0.0,  # 0 for pretraining: each token is seen few times
        tied=True,  # share the embedding and the output projection
    ),
    seq_len=512,  # tokens in a training row, at most model.max_seq_len
    batch_size=32,  # rows in a micro-batch, per process
    grad_accumulation_steps=8,  # micro-batches in an optimizer step, per process
    mask_documents=False,  # rows hold several documents; True: no token attends to another document than its own
    max_steps=20000,  # optimizer steps; tokens = max_steps * batch_size * grad_accumulation_steps * seq_len * processes
    optimizer="adamw",  # adamw, or muon: trunk matrices by Muon, the rest by AdamW
    learning_rate=1e-3,  # peak, after warm-up
    min_learning_rate=1e-4,  # at max_steps, end of the schedule
    schedule="cosine",  # cosine, or wsd: constant, then down at the end; a wsd run can be prolonged until then
    decay_share=0.2,  # wsd: share of max_steps that goes down; 10 to 20 % end as low as a cosine (arXiv:2405.18392)
    warmup_steps=500,  # linear warm-up in optimizer steps
    weight_decay=0.1,  # on matrices only
    beta1=0.9,  # AdamW
    beta2=0.95,  # AdamW
    grad_clip=1.0,  # largest gradient norm
    eval_interval=500,  # steps between validations
    eval_tokens=200000,  # validation tokens at intervals, evenly spaced; the last validation uses all
    save_interval=500,  # steps between checkpoints
    keep_last=2,  # newest checkpoints kept: ckpt.pt and ckpt-<step>.pt before it, for when ckpt.pt is damaged
    keep_best=False,  # also keep best.pt, the weights with the lowest val/loss so far
    log_interval=10,  # steps between lines of metrics.jsonl
    sample_prompts=["", "中国", "今天天气"],  # continued at every validation with a fixed seed
    sample_tokens=80,  # longest continuation
    seed=1,  # initial weights and data order
    device="auto",  # auto: cuda, else mps, else cpu
    dtype="auto",  # auto: bfloat16 autocast on cuda, float32 elsewhere
    compile=False,  # torch.compile the training step; needs a C++ compiler
    recompute=False,  # forget the activations of each block and compute them again: less memory, a third slower
    parallel="ddp",  # under torchrun: ddp, a copy of the model per process, or fsdp, its weights and state sharded
    logger="none",  # where metrics.jsonl goes as well: none, tensorboard (in out/tensorboard), swanlab or wandb
    plan=False,  # only print parameters, memory, tokens and hours on known GPUs, nothing is trained or written
    resume=False,  # go on from out/ckpt.pt if it is there; from ckpt-<step>.pt where that is damaged
    overwrite=False,  # start again in a run directory that holds a checkpoint
)

config = dict(
    format=None,  # hf, gguf (llama.cpp, Ollama) or llama2c: what to write
    ckpt="out/zh/sft",  # run directory or file of any stage's checkpoint, float32; hf: quantized too
    dtype="float32",  # hf: float32 bfloat16 float16; gguf: those, q8_0 q4_0; llama2c: float32 int8
    import_hf=None,  # instead of format: Hugging Face folder of a Llama to make a run of
    import_llama2c=None,  # instead of format: llama2.c .bin file (legacy, float32) to make a run of
    tokenizer=None,  # of an imported model: its tokenizer.model; none: the one in the folder of import_hf
    out=None,  # folder to write; there is no default
    overwrite=False,  # replace what an earlier export or import wrote there
)

"""Take a checkpoint to transformers, llama.cpp and Ollama, or llama2.c, and bring a model from there.

The model is Llama 2 as published, so no format needs code of ours: tensors get other names, and for Hugging Face the
rows of wq and wk another order, as it rotates the halves of a head and Meta neighbouring pairs. The vocabulary and the
chat template are interop/vocabulary.py's. A folder is written beside `out` and renamed: all of it is there, or nothing.

    python export.py --format=hf --ckpt=out/demo/sft --out=out/demo/hf
    python export.py --format=gguf --ckpt=out/demo/sft --dtype=q8_0 --out=out/demo/gguf
    python export.py --format=llama2c --ckpt=out/demo/pretrain --out=out/demo/llama2c
    python export.py --import_hf=out/demo/hf --out=out/demo/from_hf
    python export.py --import_llama2c=stories260K.bin --tokenizer=tok512.model --out=out/stories

in:  ckpt.pt of any stage (quantized: hf only); or a Hugging Face folder (safetensors or .bin, tokenizer.model), or a
     llama2.c .bin
out: hf: what from_pretrained reads, tokenizer.model and a model card; gguf: model.gguf, Modelfile;
     llama2c: model.bin, tokenizer.bin; import: ckpt.pt and config.json, a run like any other
"""

import common.early  # noqa: F401 - before what takes seconds to import

from dataclasses import replace
from pathlib import Path

from common import checkpoint
from common.config import ConfigError, UserError, parse_config, run
from common.files import new_folder, save_config
from interop import compressed
from interop.exchange import check_weights
from interop.gguf import TYPES as GGUF_TYPES
from interop.gguf import export_gguf
from interop.hf import export_hf, import_hf
from interop.llama2c import export_llama2c, import_llama2c
from tokenizer import TokenizerError

DTYPES = dict(hf=("float32", "bfloat16", "float16"), gguf=tuple(GGUF_TYPES), llama2c=("float32", "int8"))
# what each writes, so that what a kill leaves of it can be told from a file of the user
FILES = dict(gguf=("model.gguf", "Modelfile"), llama2c=("model.bin", "tokenizer.bin"), run=("ckpt.pt", "config.json"))
FILES["hf"] = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json")
FILES["hf"] += ("tokenizer_config.json", "tokenizer.model", "README.md")
ALIASES = dict(fp32="float32", f32="float32", bf16="bfloat16", fp16="float16", f16="float16")


def check_config(config):
    """ConfigError unless the keys ask for one thing that can be done."""
    asked = [key for key in ("format", "import_hf", "import_llama2c") if config[key] is not None]
    if len(asked) != 1:
        raise ConfigError(f"give one of --format, --import_hf, --import_llama2c (got {' and '.join(asked) or 'none'})")
    if config["out"] is None:
        raise ConfigError("--out: a folder to write is needed")
    out = Path(config["out"]).resolve()
    for key in ["ckpt"] if asked == ["format"] else [*asked, "tokenizer"]:
        if config[key] is not None and out in (read := Path(config[key]).resolve(), *read.parents):
            raise ConfigError(f"out={config['out']}: it holds {key}={config[key]}, which is read: choose another --out")
    if asked == ["format"]:
        dtypes = DTYPES.get(config["format"])
        if dtypes is None:
            raise ConfigError(f"format={config['format']}: {', '.join(DTYPES)} are known")
        if config["dtype"] not in dtypes:
            raise ConfigError(f"dtype={config['dtype']}: {config['format']} has {', '.join(dtypes)}")
    if asked == ["import_llama2c"] and config["tokenizer"] is None:
        raise ConfigError("--import_llama2c needs the --tokenizer=tokenizer.model that the model was trained with")


def write_format(config, out):
    """--format: the checkpoint as files of another program. Returns what the user should know of them."""
    ckpt = checkpoint.load(config["ckpt"], training=False)
    options = {}
    if config["format"] != "hf":
        checkpoint.refuse_quantized(ckpt)
    elif ckpt.quant is not None:
        model = checkpoint.build_model(ckpt)
        ckpt, options = replace(ckpt, weights=compressed.dequantized(model)), dict(packable=compressed.packable(model))
    if ckpt.model_config["scalar_head"] and config["format"] != "hf":
        raise UserError(f"{ckpt.path} is a reward model, which {config['format']} cannot hold: --format=hf can")
    check_weights(ckpt, config["dtype"])
    write = dict(hf=export_hf, gguf=export_gguf, llama2c=export_llama2c)[config["format"]]
    with new_folder(out, config["overwrite"], FILES[config["format"]]) as folder:
        try:
            return write(ckpt, checkpoint.tokenizer_of(ckpt), folder, config["dtype"], **options)
        except TokenizerError as error:
            raise TokenizerError(f"{ckpt.path}: {error}") from None


def write_run(config, out):
    """--import_hf and --import_llama2c: a run directory with a checkpoint."""
    notes = []
    if config["import_hf"]:
        ckpt, notes = import_hf(Path(config["import_hf"]), config["tokenizer"])
    else:
        ckpt = import_llama2c(Path(config["import_llama2c"]), config["tokenizer"])
        notes = ["its documents are taken to open and close with <s>, as llama2.c's do; ours, sent there, knew <eos>"]
    model = checkpoint.build_model(ckpt)
    history = {
        key: getattr(ckpt, key) for key in ("stage", "step", "tokens_seen", "tokenizer", "document_ids", "parent")
    }
    with new_folder(out, config["overwrite"], FILES["run"]) as folder:
        checkpoint.save(folder, model=model, config=ckpt.config or config, **history)
        save_config(config, folder)
    what = "continues documents" if checkpoint.continues(ckpt) else "answers questions"
    return [f"it {what} (stage {ckpt.stage})", *notes]


def main(argv=None):
    config = parse_config("export", argv, __doc__)
    config["dtype"] = ALIASES.get(config["dtype"].lower(), config["dtype"].lower())
    check_config(config)
    out = Path(config["out"])
    notes = write_format(config, out) if config["format"] else write_run(config, out)
    for note in notes:
        print(f"note: {note}")
    for path in sorted(out.glob("[!.]*")):
        print(f"wrote {path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    run(main)

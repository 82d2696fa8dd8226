"""GGUF files, for llama.cpp and Ollama."""

import json

import gguf

from common import checkpoint
from interop import vocabulary
from interop.exchange import FACTS, SAMPLING, renamed, text_ids
from interop.provenance import provenance
from model import ModelConfig

TYPES = dict(float32="ALL_F32", bfloat16="MOSTLY_BF16", float16="MOSTLY_F16", q8_0="MOSTLY_Q8_0", q4_0="MOSTLY_Q4_0")


def tensor_type(name, weight, config, dtype):
    """The type of a tensor; the output projection of a q4_0 file stays at 8 bits, as llama.cpp keeps it finer too."""
    if weight.dim() == 1 or dtype == "float32":
        return gguf.GGMLQuantizationType.F32
    if dtype == "bfloat16":
        return gguf.GGMLQuantizationType.BF16
    if dtype == "float16" or weight.size(1) % 32:  # the blocks of q8_0 and q4_0 are 32 values of a row
        return gguf.GGMLQuantizationType.F16
    is_head = name == ("tok_embeddings.weight" if config.tied else "output.weight")
    return gguf.GGMLQuantizationType.Q8_0 if dtype == "q8_0" or is_head else gguf.GGMLQuantizationType.Q4_0


def export_gguf(ckpt, tok, folder, dtype):
    """model.gguf by llama.cpp's conventions (ggml-org/ggml, docs/gguf.md), and a Modelfile for Ollama."""
    config, base = ModelConfig(**ckpt.model_config), checkpoint.continues(ckpt)
    parts = vocabulary.gguf_vocabulary(tok, config.vocab_size)
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_name(f"tiny-llama2-zh {ckpt.stage}")
    writer.add_string(FACTS, json.dumps(provenance(ckpt), ensure_ascii=False))
    writer.add_file_type(gguf.LlamaFileType[TYPES[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    add_vocabulary(writer, parts, tok, base, text_ids(ckpt, tok))
    for name, weight in ckpt.weights.items():
        kind = tensor_type(name, weight, config, dtype)
        writer.add_tensor(renamed(name, 2), gguf.quants.quantize(weight.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    text = vocabulary.modelfile(tok, config.max_seq_len, SAMPLING, chat=not base)
    (folder / "Modelfile").write_text(text, encoding="utf-8")
    odd = [name for name, weight in ckpt.weights.items() if weight.dim() == 2 and weight.size(1) % 32]
    if odd and dtype.startswith("q"):
        return parts["notes"] + [f"{len(odd)} tensors stay float16, such as {odd[0]}: blocks are of 32 columns"]
    return parts["notes"]


def plain_template(template):
    """Without the marks of answers, which only transformers knows: other readers of jinja refuse the whole template."""
    return template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")


def add_vocabulary(writer, parts, tok, base, ids):
    """The keys of the tokenizer; llama.cpp puts bos first unless told, which our conversations do not."""
    writer.add_tokenizer_model(parts["model"])
    writer.add_tokenizer_pre("default")
    writer.add_token_list(parts["tokens"])
    writer.add_token_scores(parts["scores"])
    writer.add_token_types(parts["types"])
    writer.add_bos_token_id(ids[0])
    writer.add_eos_token_id(ids[1])
    writer.add_unk_token_id(tok.pad_id)
    writer.add_pad_token_id(tok.pad_id)
    writer.add_add_bos_token(base)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(parts["add_space_prefix"])
    if not base:
        writer.add_chat_template(plain_template(vocabulary.CHAT_TEMPLATE))

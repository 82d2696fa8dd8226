"""The .gguf files of export.py in llama.cpp itself (xllamacpp): ids, greedy text, probabilities, perplexity, chat."""

import io
import itertools
import json
import math
import urllib.request

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment

import export
from common import checkpoint
from interop import exchange
from interop.provenance import provenance
from model import Llama, ModelConfig
from tokenizer import Tokenizer, encode_opening, encode_prompt

xllamacpp = pytest.importorskip("xllamacpp", reason="no wheel of xllamacpp for this machine")

SUBJECTS = ["酒店的房间", "宾馆的早餐", "这本小说", "作者的故事", "电脑的键盘", "笔记本的屏幕"]
DEGREES = ["很", "非常", "真的", "确实", "总是"]
VERDICTS = ["好，推荐大家。", "差，不推荐。", "让人满意 Very good 5 stars", "没意思，我后悔了。", "不如期望！"]
SENTENCES = ["".join(parts) for parts in itertools.product(SUBJECTS, DEGREES, VERDICTS)]
SHAPES = [dict(), dict(n_kv_heads=2), dict(tied=False), dict(n_kv_heads=1, tied=False, hidden_dim=172)]
SHAPE_NAMES = ["tied MHA", "tied GQA", "untied MHA", "untied MQA, hidden 172"]
PERPLEXITY = dict(float32=1e-4, bfloat16=1e-2, float16=1e-3, q8_0=5e-3, q4_0=0.2)  # largest relative difference
ODD = [
    "", " a", "two  spaces ", "\ttab", "line\nbreak\r\n", "\u3000全角　空格", "ABC123 中英mixed混排3.14", "，。！？",
    "\U0001f600\u200d\U0001f44d\U0001f3fd", "\U00020bb7野家", "龘靐", "e\u0301", "\ufffd", "哈" * 300, "-" * 300,
]  # fmt: skip


class LlamaCpp:
    """llama-server of a .gguf file, asked over HTTP."""

    def __init__(self, folder):
        params = xllamacpp.CommonParams()
        params.model.path = str(folder / "model.gguf")
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 256, 1, False, 0
        params.cpuparams.n_threads = 1
        # the defaults, 16 bits in the cache and in flash attention, cost about 2e-3 nats
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(params)

    def post(self, path, **body):
        url = f"{self.server.listening_address}/{path}"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)

    def encode(self, text, **options):
        return self.post("tokenize", content=text, **options)["tokens"]

    def greedy(self, ids, n_predict):
        """(new ids, the five likeliest [(id, log-probability)] at each)."""
        options = dict(temperature=0, n_predict=n_predict, n_probs=5, return_tokens=True, cache_prompt=False)
        reply = self.post("completion", prompt=ids, **options)
        top = [[(t["id"], t["logprob"]) for t in p["top_logprobs"]] for p in reply["completion_probabilities"]]
        return reply["tokens"], top

    def nll(self, ids, vocab_size):
        """-log p of each token after the first, asked one at a time."""
        out = []
        for t in range(1, len(ids)):
            options = dict(n_predict=1, n_probs=vocab_size, temperature=1.0, cache_prompt=True)
            reply = self.post("completion", prompt=ids[:t], **options)
            logps = {p["id"]: p["logprob"] for p in reply["completion_probabilities"][0]["top_logprobs"]}
            out.append(-logps[ids[t]])
        return out


@pytest.fixture(scope="module")
def tok():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 2), model_writer=model, vocab_size=360, model_type="bpe", byte_fallback=True,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2, remove_extra_whitespaces=False,
        normalization_rule_name="identity", add_dummy_prefix=False, hard_vocab_limit=False,
    )  # fmt: skip
    return Tokenizer(model.getvalue())


def save(directory, model, tok, stage):
    facts = dict(stage=stage, step=1, tokens_seen=9, config={}, document_ids=(tok.opening_id, tok.closing_id))
    checkpoint.save(directory / "ckpt.pt", model=model, tokenizer=tok.model_bytes, **facts)
    return directory


def random_model(tok, **changes):
    torch.manual_seed(0)
    shape = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=4, vocab_size=tok.vocab_size, max_seq_len=256)
    model = Llama(ModelConfig(**shape | changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.15) if p.dim() == 2 else p.uniform_(0.5, 1.5)
        model.head_weight[3:259] = 0  # no bytes in greedy text: the server waits for the rest of a character
    return model


@pytest.fixture(scope="module")
def trained(tok, tmp_path_factory):
    """A model that has learnt the sentences above, in random order, as far as a few seconds allow."""
    order = torch.Generator().manual_seed(0)
    ids = [i for k in torch.randint(len(SENTENCES), (4000,), generator=order).tolist()
           for i in (*tok.encode(SENTENCES[k]), tok.eos_id)]  # fmt: skip
    ids = torch.tensor(ids)
    torch.manual_seed(0)
    model = Llama(ModelConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=tok.vocab_size, max_seq_len=256))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        starts = torch.randint(len(ids) - 65, (16,), generator=order)
        rows = torch.stack([ids[s : s + 65] for s in starts])
        loss = model(rows[:, :-1], rows[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 2.5  # ln 360 = 5.9 untrained
    return save(tmp_path_factory.mktemp("trained"), model.eval(), tok, "pretrain"), ids[:160].tolist()


def convert(ckpt, out, **options):
    export.main(["--format=gguf", f"--ckpt={ckpt}", f"--out={out}", *(f"--{k}={v}" for k, v in options.items())])
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_NAMES)
@torch.no_grad()
def test_f32_greedy_text_and_log_probabilities_are_ours(tmp_path, tok, shape):
    model = random_model(tok, **shape)
    cpp = LlamaCpp(convert(save(tmp_path, model, tok, "sft"), tmp_path / "gguf"))
    prompts = [encode_prompt(tok, [dict(role="user", content=text)]) for text in SENTENCES[::7][:20]]
    assert len(prompts) == 20
    for prompt in prompts:
        ids, top = cpp.greedy(prompt, 64)
        assert ids == model.generate([prompt], 64, temperature=0).tokens[0]
        logps = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1].log_softmax(-1)  # (n, V)
        for ours, theirs in zip(logps, top, strict=True):
            values, tokens = ours.topk(5)
            assert tokens[0] == theirs[0][0]
            assert max(abs(ours[token].item() - logp) for token, logp in theirs) < 1e-3
            assert max(abs(value - logp) for value, (_, logp) in zip(values.tolist(), theirs, strict=True)) < 1e-3


@torch.no_grad()
def test_a_base_model_opens_its_documents(tmp_path, tok, trained):
    model = checkpoint.build_model(checkpoint.load(trained[0])).eval()
    cpp = LlamaCpp(convert(trained[0], tmp_path / "gguf"))
    assert cpp.encode("酒店", add_special=True) == encode_opening(tok, "酒店")
    assert cpp.encode("酒店", add_special=False) == tok.encode("酒店")
    assert cpp.greedy("酒店", 40)[0] == model.generate([encode_opening(tok, "酒店")], 40, temperature=0).tokens[0]


@pytest.mark.parametrize("dtype, limit", PERPLEXITY.items())
def test_perplexity_in_llama_cpp(tmp_path, tok, trained, dtype, limit):
    ckpt, ids = trained
    cpp = LlamaCpp(convert(ckpt, tmp_path / "gguf", dtype=dtype))
    model = checkpoint.build_model(checkpoint.load(ckpt)).eval()
    with torch.no_grad():
        before = model(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]])).exp().item()
    after = math.exp(np.mean(cpp.nll(ids, tok.vocab_size)))
    assert abs(after / before - 1) < limit, (before, after)
    share = dict(float32=1.0, bfloat16=0.6, float16=0.6, q8_0=0.4, q4_0=0.35)[dtype]
    assert (tmp_path / "gguf" / "model.gguf").stat().st_size < share * (ckpt / "ckpt.pt").stat().st_size


def test_ids_are_the_tokenizers(tmp_path, tok, shared_data):
    for name, one in dict(
        ours=tok, chatglm=Tokenizer.load(shared_data / "tokenizer" / "chatglm3_tokenizer.model")
    ).items():
        model = random_model(one, dim=32, n_layers=1, n_heads=2, n_kv_heads=2)
        cpp = LlamaCpp(convert(save(tmp_path / name, model, one, "sft"), tmp_path / name / "gguf"))
        lines = (shared_data / "pretrain" / "readwiki_zh.jsonl").read_text(encoding="utf-8").splitlines()
        lines = [line for article in lines[:20] for line in json.loads(article)["text"].split("\n")]
        for line in [*ODD, *lines, "\n".join(lines[:500])]:
            assert cpp.encode(line, add_special=True) == one.encode(line), (name, line[:80])


def test_chat_template_renders_our_prompt_format(tmp_path, tok):
    cpp = LlamaCpp(convert(save(tmp_path, random_model(tok), tok, "sft"), tmp_path / "gguf"))
    chat = [dict(role="user", content=" 写一条\n酒店好评。 ")]
    longer = [dict(role="system", content="简短。"), *chat, dict(role="assistant", content="很好"), *chat]
    for messages in (chat, longer):
        text = cpp.post("apply-template", messages=messages)["prompt"]
        assert cpp.encode(text, add_special=True, parse_special=True) == encode_prompt(tok, messages)


def test_any_jinja_reads_the_chat_template(tmp_path, tok):
    """Not only that of transformers, which knows a tag more: programs compile it when they open the file."""
    reader = gguf.GGUFReader(convert(save(tmp_path, random_model(tok), tok, "sft"), tmp_path / "gguf") / "model.gguf")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(reader.fields["tokenizer.chat_template"].contents())
    chat = [dict(role=role, content=text) for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    assert template.render(messages=chat, bos_token="<s>", eos_token="</s>") == "a<s>b</s>c<s>"


def test_bf16_weights_are_the_rounded_ones(tmp_path, tok, trained):
    reader = gguf.GGUFReader(convert(trained[0], tmp_path / "gguf", dtype="bf16") / "model.gguf")
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_BF16
    theirs = {tensor.name: tensor for tensor in reader.tensors}
    for name, weight in checkpoint.load(trained[0]).weights.items():
        tensor = theirs[exchange.renamed(name, 2)]
        assert tensor.tensor_type.name == ("F32" if weight.dim() == 1 else "BF16")
        found = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(found, weight if weight.dim() == 1 else weight.bfloat16().float())


def test_metadata_and_modelfile(tmp_path, tok, trained):
    folder = convert(trained[0], tmp_path / "gguf", dtype="q4_0")
    reader = gguf.GGUFReader(folder / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert json.loads(fields[exchange.FACTS]) == provenance(checkpoint.load(trained[0]))
    assert fields["llama.context_length"] == 256 and fields["general.file_type"] == 2
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.add_bos_token"]) == (2, True)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["token_embd.weight"] == "Q8_0" and kinds["blk.1.ffn_up.weight"] == "Q4_0"
    assert kinds["output_norm.weight"] == "F32" and "output.weight" not in kinds
    text = (folder / "Modelfile").read_text(encoding="utf-8")
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """{{ .Prompt }}"""\n')
    assert "PARAMETER temperature 0.8\n" in text and "PARAMETER num_ctx 256\n" in text
    chat = convert(save(tmp_path / "sft", random_model(tok), tok, "sft"), tmp_path / "chat")
    template = "{{ if .System }}{{ .System }}\n{{ end }}{{ .Prompt }}<s>{{ .Response }}</s>"
    assert f'TEMPLATE """{template}"""\n' in (chat / "Modelfile").read_text(encoding="utf-8")

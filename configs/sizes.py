# The five models of the project. The names are nominal: exact parameter counts, with the ChatGLM3 vocabulary of 64,793
# rows, tied embeddings and hidden size 32 * ceil(int(8 * dim / 3) / 32), are printed by `python -m configs.sizes`.
sizes = {
    "tiny-llama2-9m": dict(dim=64, n_layers=5, n_heads=8, n_kv_heads=4, max_seq_len=512),
    "tiny-llama2-24m": dict(dim=288, n_layers=6, n_heads=6, n_kv_heads=6, max_seq_len=512),
    "tiny-llama2-58m": dict(dim=512, n_layers=8, n_heads=8, n_kv_heads=8, max_seq_len=512),
    "tiny-llama2-134m": dict(dim=768, n_layers=12, n_heads=12, n_kv_heads=12, max_seq_len=512),
    "tiny-llama2-256m": dict(dim=1024, n_layers=16, n_heads=16, n_kv_heads=16, max_seq_len=1024),
}


def count_parameters(dim, n_layers, n_heads, n_kv_heads, max_seq_len=None, vocab_size=64793, tied=True):
    """Exact number of parameters of a model with these sizes (max_seq_len has no parameters)."""
    hidden_dim = -(-int(8 * dim / 3) // 32) * 32
    attention = 2 * dim * dim + 2 * dim * (dim // n_heads * n_kv_heads)  # wq, wo; wk, wv
    block = attention + 3 * dim * hidden_dim + 2 * dim  # and w1, w2, w3; two norms
    return n_layers * block + dim + vocab_size * dim * (1 if tied else 2)


if __name__ == "__main__":
    for name, size in sizes.items():
        print(f"{name:18s} {count_parameters(**size):>12,d}  {size}")

from configs.recipes import DATA, TOKENIZER, VOCAB, in_smoke
from configs.tokenizer import config as base

# of the training split only, which data_process writes
recipe = dict(input=[f"{DATA}/corpus.txt"], out=TOKENIZER, vocab_size=int(VOCAB or base["vocab_size"]))
config = base | recipe | in_smoke(character_coverage=0.98)

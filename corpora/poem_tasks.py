"""What the poet is asked and answers: rows for fine-tuning, the reward model, RL and the comparison, from real poems.

A request is drawn as the poems have it: title, form and rhyme are those of one. Rows of write_tasks, as
corpora/layouts.py and corpora/preferences.py read them:

    sft.jsonl               {"instruction", "output"}: eight tasks, each with several wordings
    rm.jsonl                {"prompt", "chosen", "rejected"}: a real poem, and the same spoilt where no rule sees it
    prompts.jsonl           {"prompt", "title", "form", "rhyme", "heads", "words"}: requests for RL, on training titles
    heldout_prompts.jsonl   the same of held-out poems, for the comparison alone
"""

import random
from collections import defaultdict
from pathlib import Path

from common.files import write_rows
from verse import HAN, ends_of, form_of, render, rhyme_class
from verse.tables import LEVEL

LONGEST_TITLE = 12  # characters; nine in ten are shorter
SFT_ROWS = dict(write=19_000, given_words=4_000, acrostic=5_000, continued=2_000, next_line=4_000, told=1_000)
SFT_ROWS |= dict(rhyme_words=12_000, rhyme_of=2_000)  # short ones: what rhymes is told apart, so that poems can use it
RM_ROWS, PROMPTS, HELDOUT_PROMPTS = 9_000, 8_000, 1_000
NAMED_RHYME = 0.9  # share of the requests for fine-tuning that name a rhyme, as all of RL do
SHARES = dict(write=0.8, given_words=0.1, acrostic=0.1)  # of the requests for RL
SHORT = ("五绝", "七绝")  # what RL asks for: a reward for two rhyme words tells more of each than one for four

# of marks only those that poems have too: “”、？ would be three tokens of bytes each
WORDINGS = dict(
    write=(
        "以《{title}》为题写一首{form}{rhyme}。",
        "写{form}，题为《{title}》{rhyme}。",
        "作{form}《{title}》{rhyme}。",
    ),
    given_words=("以《{title}》为题，用{words}写一首{form}{rhyme}。", "用{words}作{form}《{title}》{rhyme}。"),
    acrostic=("以{heads}为各句首字写一首{form}{rhyme}。", "以{heads}藏头作{form}{rhyme}。"),
    continued=("以{first}开头写一首{form}{rhyme}。", "把{first}续成{form}{rhyme}。"),
    next_line=("{first}的下一句{rhyme}。", "对下句：{first}{rhyme}。"),
    told=("这首诗是什么体，押什么韵：\n{text}", "说出诗体和韵：\n{text}"),
    rhyme_words=("押{name}韵的字。", "属于{name}韵的字。"),
    rhyme_of=("{end}押什么韵。", "{end}字是什么韵。"),
)


def fields_of(poem, tables):
    """What may be asked of a poem: its title, form and rhyme; None if no short request can ask for it.

    Regulated verse rhymes on level tones: few poems do not, and what rhymes with these is rarely told.
    """
    plain = 0 < len(poem.title) <= LONGEST_TITLE and HAN.fullmatch(poem.title)
    rhyme = rhyme_class(poem.lines, tables)
    level = tables.tones.get(rhyme) == LEVEL
    return dict(title=poem.title, form=form_of(poem.lines), rhyme=rhyme) if plain and level else None


def request(task, poem, fields, rng, named=True):
    """(text, fields for rewards) of a request that this poem answers; with the rhyme's name if `named`."""
    asked = dict(fields, rhyme=fields["rhyme"] if named else None, heads="", words=[])
    if task == "acrostic":
        asked |= dict(title="", heads="".join(line[0] for line in poem.lines))
    if task == "given_words":  # the first two characters of a line are a word, as a rule
        asked["words"] = [line[:2] for line in poem.lines[: rng.choice([1, 2])]]
    rhyme = f"，押{fields['rhyme']}韵" if named else ""
    said = dict(asked, rhyme=rhyme, words="和".join(asked["words"]), first=poem.lines[0], text=render(poem.lines))
    return rng.choice(WORDINGS[task]).format(**said), asked


def sft_row(task, poem, fields, rng):
    """One row of fine-tuning: what is asked, and the poem or what is to be said of it."""
    text, _ = request(task, poem, fields, rng, rng.random() < NAMED_RHYME)
    others = dict(next_line=poem.lines[1], told=f"{fields['form']}，押{fields['rhyme']}韵。")
    return dict(instruction=text, output=others.get(task) or render(poem.lines))


def rhyme_words(poems):
    """class -> the rhyme words of its poems, each as often as it is used."""
    known = defaultdict(list)
    for poem, fields in poems:
        known[fields["rhyme"]] += ends_of(poem.lines)
    return dict(sorted(known.items()))


def rhyme_row(task, known, rng):
    """One row of what rhymes; a rare class comes up more often than in poems, which tell too little of it."""
    name = rng.choices(list(known), [len(ends) ** 0.5 for ends in known.values()])[0]
    ends = list(dict.fromkeys(rng.choices(known[name], k=16)))[:8]
    answers = dict(rhyme_words="，".join(ends), rhyme_of=f"{name}韵。")
    return dict(instruction=rng.choice(WORDINGS[task]).format(name=name, end=ends[0]), output=answers[task])


def swapped(poem, others, alike, rng):
    """The first lines of two couplets in each other's place: lengths, rhymes and nearly all tones stay."""
    lines = list(poem.lines)
    i, j = rng.sample(range(0, len(lines), 2), 2)
    lines[i], lines[j] = lines[j], lines[i]
    return lines


def replaced(poem, others, alike, rng):
    """Every word of two characters before the last three is another of the same tones, however rare."""
    lines = list(poem.lines)
    for i, line in enumerate(lines):
        for at in range(0, len(line) - 3, 2):
            line = line[:at] + rng.choice(alike(line[at : at + 2])) + line[at + 2 :]
        lines[i] = line
    return lines


def elsewhere(poem, others, alike, rng):
    """The poem of another title."""
    return rng.choice(others).lines


FAULTS = (swapped, replaced, elsewhere)  # a third of the pairs each


def words_alike(poems, tables):
    """word -> all words of two characters that begin a line of the poems and have its tones, each once."""
    known = defaultdict(list)
    for word in sorted({line[:2] for poem, _ in poems for line in poem.lines}):
        known[tuple(map(tables.tones.get, word))].append(word)
    return lambda word: known[tuple(map(tables.tones.get, word))] or [word]


def rm_rows(poems, tables, n, rng):
    """A real poem against one of equal form and rhyme that does not hang together, or is on something else."""
    same, alike, rows = defaultdict(list), words_alike(poems, tables), []
    for poem, fields in poems:
        same[fields["form"], fields["rhyme"]].append(poem)
    for i, (poem, fields) in enumerate(poems):
        rejected = FAULTS[i % len(FAULTS)](poem, same[fields["form"], fields["rhyme"]], alike, rng)
        if rejected != poem.lines:
            text, _ = request("write", poem, fields, rng)
            rows.append(dict(prompt=text, chosen=render(poem.lines), rejected=render(rejected)))
        if len(rows) == n:
            break
    return rows


def prompt_rows(poems, n, rng):
    """Requests for short poems that name form and rhyme, in the shares of SHARES."""
    rows = []
    for poem, fields in [pair for pair in poems if pair[1]["form"] in SHORT][:n]:
        task = rng.choices(list(SHARES), SHARES.values())[0]
        text, asked = request(task, poem, fields, rng)
        rows.append(dict(prompt=text) | asked)
    return rows


def write_tasks(training, heldout, tables, folder, seed):
    """Write the rows of all tasks into `folder`; the Poems are those to train on and those held out.

    No poem is in two of the files, as far as there are enough; the rows of fewer poems are as many as they can be.
    """
    rng = random.Random(seed)
    known, kept = ([(p, f) for p in poems if (f := fields_of(p, tables))] for poems in (training, heldout))
    for poems in (known, kept):
        rng.shuffle(poems)
    tasks = [task for task, n in SFT_ROWS.items() for _ in range(n)]
    tasks = rng.sample(tasks, len(tasks))
    rows, parts = dict(heldout_prompts=prompt_rows(kept, HELDOUT_PROMPTS, rng)), len(known) // 4
    rows["prompts"] = prompt_rows(known[:parts], PROMPTS, rng)
    rows["rm"] = rm_rows(known[parts : 2 * parts], tables, RM_ROWS, rng)
    rest, ends = known[2 * parts :], rhyme_words(known)
    rows["sft"] = [
        rhyme_row(task, ends, rng) if task.startswith("rhyme") else sft_row(task, *pair, rng)
        for task, pair in zip(tasks, rest, strict=False)
    ]
    for name, found in rows.items():
        write_rows(Path(folder) / f"{name}.jsonl", found)

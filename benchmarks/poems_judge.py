"""How often the rules of verse/ accept real poems, and find the breach in the same poems with one rule broken.

    python -m corpora.poems --poems=chinese-poetry-2.0.1.tgz --out=data/poems/rows
    python benchmarks/poems_judge.py --data=data/poems/rows

The poems are held out: neither the tables of tones nor those of rhymes were counted from them. Verse in the old style
also has lines of five or seven characters, but no rules of tones; so the accepted ones are counted among those whose
own tones, which the corpus gives with each poem, keep the rules. A breach is found where a poem that is accepted is
refused once it is broken. Last comes one line of JSON.
"""

import json
import random

from harness import argument_parser, print_figures

from common.config import ConfigError, run
from corpora.poems import is_text
from dataset.formats import DataError
from verse import FORMS, ends_of, form_of, judge, render, rhyme_class, right_patterns
from verse.tables import LEVEL, OBLIQUE, load_tables

DRAWS = 100_000  # after which no character is like the one that is sought
RULES = ("form", "rhyme", "tones", "all_right")


def put(lines, i, j, character):
    """The lines with another character at one place."""
    line = lines[i]
    j %= len(line)
    return [*lines[:i], line[:j] + character + line[j + 1 :], *lines[i + 1 :]]


class Breaker:
    """A method for each kind of breach: (lines, tones) of a poem -> (broken lines, what is asked of them)."""

    def __init__(self, poems, tables, seed):
        self.tables, self.rng = tables, random.Random(seed)
        self.ends = [end for poem in poems for end in ends_of(poem["lines"])]
        self.characters = [c for poem in poems for line in poem["lines"] for c in line]

    def one_of(self, characters, fits):
        """One of the characters, as often as each is used, that fits."""
        drawn = (self.rng.choice(characters) for _ in range(DRAWS))
        if (found := next(filter(fits, drawn), None)) is None:
            raise DataError(f"{len(self.ends)} rhyme words: too few poems to break the rules of one with another's")
        return found

    def tone(self, tone):
        return self.one_of(self.characters, lambda c: self.tables.tones.get(c) == tone)

    def line_short(self, lines, tones):
        i, j = self.rng.randrange(len(lines)), self.rng.randrange(len(lines[0]))
        return put(lines, i, j, ""), {}

    def rhyme_of_another_class(self, lines, tones):
        name = rhyme_class(lines, self.tables)
        end = self.one_of(self.ends, lambda c: c in self.tables.rhymes and self.tables.rhymes[c][0] != name)
        return put(lines, self.rng.randrange(1, len(lines), 2), -1, end), {}

    def rhyme_word_twice(self, lines, tones):
        i, j = self.rng.sample(range(1, len(lines), 2), 2)
        return put(lines, i, -1, lines[j][-1]), {}

    def tone_wrong(self, lines, tones):
        places = [(i, j) for i, line in enumerate(tones) for j in (1, 3) if line[j] in (LEVEL, OBLIQUE)]
        i, j = self.rng.choice(places)
        return put(lines, i, j, self.tone(OBLIQUE if tones[i][j] == LEVEL else LEVEL)), {}

    def couplet_not_opposed(self, lines, tones):
        i = self.rng.randrange(len(lines))
        for j in range(1, len(lines[0]) - 1, 2):
            lines = put(lines, i, j, self.tone(OBLIQUE if tones[i][j] == LEVEL else LEVEL))
        return lines, {}

    def another_form_asked(self, lines, tones):
        shape = len(lines), len(lines[0])
        return lines, dict(form=self.rng.choice([form for form, known in FORMS.items() if known != shape]))

    def another_rhyme_asked(self, lines, tones):
        name = rhyme_class(lines, self.tables)
        classes = [self.tables.rhymes[c][0] for c in self.ends if c in self.tables.rhymes]
        return lines, dict(rhyme=self.one_of(classes, lambda other: other != name))

    def head_wrong(self, lines, tones):
        i, heads = self.rng.randrange(len(lines)), "".join(line[0] for line in lines)
        return put(lines, i, 0, self.one_of(self.characters, lambda c: c != heads[i])), dict(heads=heads)

    def word_missing(self, lines, tones):
        i = self.rng.randrange(len(lines))
        word = lines[i][:2]  # where it is there twice, both go
        other = self.one_of(self.characters, lambda c: c not in word)
        return [line.replace(word, other + word[1]) for line in lines], dict(words=[word])


KINDS = [name for name in vars(Breaker) if not name.startswith("_") and name not in ("one_of", "tone")]


def accepts(lines, tables, asked):
    found = judge(render(lines), tables, **asked)
    return found["all_right"] and found["asked"]


def measure(poems, tables, seed):
    """The figures of a list of rows of heldout.jsonl whose tones keep the rules."""
    breaker = Breaker(poems, tables, seed)
    accepted = [poem for poem in poems if accepts(poem["lines"], tables, {})]
    finds = {}
    for kind in KINDS:
        broken = [getattr(breaker, kind)(poem["lines"], poem["tones"]) for poem in accepted]
        finds[kind] = sum(not accepts(lines, tables, asked) for lines, asked in broken) / len(broken)
    return len(accepted) / len(poems), finds


def by_rule(poems, tables):
    judged = [judge(render(poem["lines"]), tables) for poem in poems]
    return {rule: round(sum(found[rule] for found in judged) / len(judged), 4) for rule in RULES}


def shuffled(poems, seed):
    """The poems with the rhyme words of all put in each other's place: what rhymes by chance."""
    ends = [end for poem in poems for end in ends_of(poem["lines"])]
    random.Random(seed).shuffle(ends)
    made = [dict(poem, lines=list(poem["lines"])) for poem in poems]
    for poem in made:
        for i in range(1, len(poem["lines"]), 2):
            poem["lines"][i] = poem["lines"][i][:-1] + ends.pop()
    return made


def read_heldout(folder):
    path = f"{folder}/heldout.jsonl"
    rows, number = [], 0
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                number += 1
                rows.append(row := json.loads(line))
                lines, tones = row["lines"], row["tones"]
                if not is_text(lines, list) or form_of(lines) is None:
                    raise ValueError("lines of a regular poem are needed")
                if tones is not None and not (is_text(tones, list) and list(map(len, tones)) == list(map(len, lines))):
                    raise ValueError("tones: null or a sign a character is needed")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; corpora/poems.py writes it") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path}:{number}: not a poem that corpora/poems.py wrote: {error}") from None
    return rows


def main(argv=None):
    parser = argument_parser(__doc__)
    parser.add_argument("--data", default="data/poems/rows", help="what corpora/poems.py wrote")
    parser.add_argument("--poems", type=int, default=5000, help="how many")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if options.poems < 1:
        raise ConfigError(f"poems={options.poems}: at least 1 is needed")
    tables, rows = load_tables(f"{options.data}/verse.json"), read_heldout(options.data)
    regulated = [row for row in rows if row["tones"] and all(right_patterns(row["tones"]))][: options.poems]
    if not regulated:
        raise DataError(f"{options.data}/heldout.jsonl: no poem in it whose tones keep the rules")
    accepted, finds = measure(regulated, tables, options.seed)
    table = {f"{len(regulated):,} that keep the rules": by_rule(regulated, tables)}
    table[f"all {len(rows):,} held out"] = by_rule(rows, tables)
    table["all, rhyme words of others"] = by_rule(shuffled(rows, options.seed), tables)
    print(f"{'accepted':<28}", *(f"{rule:>10}" for rule in RULES))
    for name, rates in table.items():
        print(f"{name:<28}", *(f"{rates[rule]:>10.1%}" for rule in RULES))
    print(f"\n{'breach':<28} {'found':>10}")
    for kind, rate in finds.items():
        print(f"{kind:<28} {rate:>10.1%}")
    finds = {kind: round(rate, 4) for kind, rate in finds.items()}
    print_figures(dict(judge_accepts=round(accepted, 4), judge_finds=min(finds.values()), finds=finds, accepts=table))


if __name__ == "__main__":
    run(main)

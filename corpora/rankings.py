"""Several answers to one question: where they stand in a row, and what says which of them are better.

Scores are numbers, more is better. Where a row has some that cannot be told, it is dropped rather than taken in the
order in which its answers stand.
"""

import re
from collections import defaultdict

from corpora.fields import Drop, as_text, by_number, missing, unpacked
from corpora.layouts import adapter, present, prompt_turns
from corpora.preferences import every_pair, preference

RANKED = ("output", "outputs", "responses", "answers", "completions", "candidates", "replies")
SCORES = "score scores overall_score overall_scores rating ratings reward rewards rm_score rm_scores".split()
RANKS = ("rank", "ranks")  # 1 is the best
CHOICE = "better_response_id"  # PKU-SafeRLHF

_SCORED = re.compile(
    "(?i)score|rank|rating|reward|grade|vote|annotation|[得评]分|分数|排[名序]|赞|(?<![a-z])(?:like|star|thumb)s?(?![a-z])"
)
_CHOOSING = re.compile("(?i)better|best|safer|winner|prefer|chosen|label|correct")
_GRADING = re.compile("(?i)good|quality|level")  # each answer, where others do not have the same
_POINTING = re.compile(r"(?i)(?:.*[^a-z\d])?([a-h]|\d)")  # B, answer_b, response 2
_COUNTING = re.compile("(?i)(.*[ _-])?(ids?|idx|index|indices|lens?|lengths?|tokens|num|no|counts?|times?)")
_PLACE = re.compile(r"(\D*[^\d _-])[ _-]?(\d+)|(.+)[ _-]([A-Za-z])")  # answer1, response_0, reply_b
_ANSWERING = re.compile(
    "(?i)answer|response|output|reply|completion|candidate|text|good|bad|best|worst|[回解]答|答案|回复|[好差优劣]"
)
_ABOUT = re.compile(
    "(?i)(.*[ _-])?(id|idx|index|no|num|source|lang|language|type|category|label|score|split|seed|temperature"
    "|date|created|updated|timestamp|year)"
)


def as_numbers(values):
    """Values as numbers; None if one is none."""
    try:
        found = [float(value) for value in values]
    except (TypeError, ValueError, OverflowError):
        return None
    return None if any(map(missing, found)) else found


def told(fields):
    """The scores out of {name: a value for each answer}; None where there are no fields."""
    names = [name for name in (*SCORES, *RANKS) if name in fields]
    found = as_numbers(fields[names[0]]) if names else None
    if fields and found is None:
        raise Drop("answers with scores, not in order")
    return [-rank for rank in found] if names and names[0] in RANKS else found


def is_judging(name):
    """Whether a field says, of each answer, how good it is."""
    return any(words.search(name) for words in (_SCORED, _CHOOSING, _GRADING))


def may_judge(name, values):
    """Whether a field of each answer may say how good it is, such as its likes: a number that is of nothing else."""
    numbers = all(isinstance(value, (int, float)) or missing(value) for value in values)
    return numbers and not _COUNTING.fullmatch(name) and not _ABOUT.fullmatch(name)


def inner_fields(answers):
    """What answers that are objects have of scores."""
    objects = [answer if isinstance(answer, dict) else {} for answer in answers]
    names = dict.fromkeys(name for answer in objects for name in answer)
    fields = {name: [answer.get(name) for answer in objects] for name in names}
    fields = {name: values for name, values in fields.items() if is_judging(str(name)) or may_judge(str(name), values)}
    return {
        name: values for name, values in fields.items() if _SCORED.search(str(name)) or len({*map(repr, values)}) > 1
    }


def outer_fields(row, places, used):
    """What stands of scores beside the answers."""
    fields = {}
    for name in row:
        value, said = unpacked(row[name]), str(name)
        if name in used or missing(value):
            continue
        if isinstance(value, (list, tuple)):
            known = name in (*SCORES, *RANKS)
            kinds = (int, float, str) if is_judging(said) else (int, float)
            as_many = len(value) == len(places) and all(isinstance(item, kinds) for item in value)
            if known or as_many and not _COUNTING.fullmatch(said):
                fields[name] = value if len(value) == len(places) else [None]
        elif isinstance(value, dict) and _SCORED.search(said):
            fields[name] = [None]
        elif re.search("(?i)winner|prefer", said):
            fields[name] = [None]
        elif _CHOOSING.search(said) and (isinstance(value, (int, float)) or _POINTING.fullmatch(str(value).strip())):
            fields[name] = [None]
    return fields


def scores_of(row, answers, places, used):
    """The scores of answers at these places ("0", "1", ...; "a", "b"); None where the order is all there is."""
    if not missing(row.get(CHOICE)):
        number = as_text(row[CHOICE], [])
        return [float(number in (place, f"{place}.0")) for place in places]
    return told(inner_fields(answers) or outer_fields(row, places, used))


def columns(row, used):
    """({place: the column of an answer}, {name: {place: a column of scores}}) of answer1, answer2, ...; score1, ...

    Without such, the columns whose names say so are answers, two of them at least: a url or a date is none.
    """
    others = [name for name in row if name not in used and not missing(row[name]) and row[name] != ""]
    found, scored = defaultdict(dict), {}
    for name in others:
        if match := _PLACE.fullmatch(str(name)):
            found[match[1] or match[3]][match[2] or match[4].lower()] = name
    for stem in list(found):
        values = [row[name] for name in found[stem].values()]
        if as_numbers(values) and (_SCORED.search(stem) or not _ANSWERING.search(stem) and may_judge(stem, values)):
            scored[stem.lower()] = found.pop(stem)
        elif _ABOUT.fullmatch(stem) or len(found[stem]) < 2:
            del found[stem]
    if found:
        stem = max(found, key=lambda stem: (bool(_ANSWERING.search(stem)), len(found[stem])))
        return dict(sorted(found[stem].items(), key=lambda item: (*by_number(item[0]), item[0]))), scored
    others = [name for name in others if not (_SCORED.search(str(name)) and as_numbers([row[name]]))]
    names = [name for name in others if _ANSWERING.search(str(name)) and not _ABOUT.fullmatch(str(name))]
    if len(names) < 2:
        raise Drop("no output: answers are known by their columns' names, such as answer1, answer2")
    return {str(i): name for i, name in enumerate(names)}, scored


@adapter
def ranked(row, notes):
    turns, used = prompt_turns(row, notes, replies=True)
    name = present(row, RANKED)
    answers = unpacked(row[name]) if name else None
    if isinstance(answers, dict):
        raise Drop(f"{name} is an object")
    if isinstance(answers, (list, tuple)):
        scores = scores_of(row, answers, [str(i) for i in range(len(answers))], {*used, name})
    else:
        places, scored = columns(row, used)
        answers = [row[name] for name in places.values()]
        scores = told({stem: [row.get(found.get(place)) for place in places] for stem, found in scored.items()})
        scores = scores or scores_of(row, answers, places, {*used, *places.values()})
        notes += [] if scores else ["columns taken as answers, the best first"]
    return every_pair(answers, notes, lambda better, worse: preference(turns, better, worse, row, notes), scores)

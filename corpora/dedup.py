"""Near-duplicates, found in bounded memory.

A record becomes a MinHash signature (Broder 1997): two signatures agree in about the share of shingles that their texts
have in common (Jaccard similarity). Locality-sensitive hashing finds the pairs worth comparing: those whose signatures
agree in a whole band. Only the signatures are kept, on disk if they are many. A record goes only if it resembles one
that stays: not for a chain of others between them.

A conversation can share most of its text with others and yet be one of its own: a long instruction, a list of options,
a stock answer. So can a short document: another name in the same news. Whether two are copies is told by where they
differ, in `is_copied_conversation` and `is_copied_document`.
"""

import itertools
import operator
import re
import zlib
from collections import Counter
from difflib import SequenceMatcher

import numpy as np
import rensa

from corpora.clean import char_ngrams, content_key

# A copy with 10 % of its characters edited keeps a shingle of three with 0.9**3 = 0.73, so its Jaccard similarity
# is s = 0.73 / (2 - 0.73) = 0.57 (measured on 500 characters: 0.58 to 0.60 +- 0.02); neighbouring pages of one novel
# have 0.01. With pairs of characters the copy has 0.70, the neighbours 0.03; with four, 0.49 and 0.002.
SHINGLE = 3
# A pair shares a band with 1 - (1 - s**ROWS)**BANDS: 0.995 at s = 0.57, 0.96 at 0.5, 0.3 at 0.3, 5e-7 at 0.01.
# Four values of 16 bits are one uint64, so a band's key is read from the signature as it lies.
BANDS, ROWS = 48, 4
# Share of equal values. It errs by 0.03 with 192 values, so that hardly a copy edited by 10 % falls below, and fewer
# than 1 in 1,000 of the pairs that share half their shingles (s = 0.33) reach it.
THRESHOLD = 0.45
# Documents of fewer characters than SHORT are copies if more agrees, up to CLOSE at SHORTEST, and by where they differ.
SHORT, SHORTEST, CLOSE = 200, 100, 0.9
# Of conversations, by pairs of characters: a copy has 0.70 +- 0.1, as they are short; where they differ tells the rest.
CONVERSATION_THRESHOLD = 0.3

# rensa errs less than as many independent hash functions (0.029 against 0.036 at s = 0.58) and takes 8 us a document
# where numpy takes 50 and datasketch 370. Its digests change between its versions and with the seed: pin both.
_SEED = 42
_BLOCK = 1 << 12  # documents handled at once: two pairs each, 10 MB in all
_TRIED = 8  # records that one is compared with before it stays, lest a thousand of one template be compared with all
# Words of an alphabet (Latin, Greek, Cyrillic, Arabic, Indic...): three letters of them are in any text.
_WORD = re.compile("[0-9a-z\u00c0-\u0dff\u0e80-\u109f\u1200-\u1fff]{2,}")
_PRIVATE = 0xF0000  # 65,534 characters from here on are no text: a word becomes one of them
_IDEOGRAPHS = 0x2E80  # characters below it are of alphabets


def signature(text):
    """MinHash of a document's shingles of letters and digits, in an alphabet of words: (BANDS * ROWS,) uint16."""
    key = content_key(text)
    if (code_points(key) < _IDEOGRAPHS).any():
        key = re.sub(r"[\W_]+", " ", text.lower())
        key = _WORD.sub(lambda word: chr(_PRIVATE + zlib.crc32(word[0].encode()) % 65_534), key).replace(" ", "")
    return min_hashes(char_ngrams(key, max(1, min(SHINGLE, len(key)))))


def code_points(text):
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def conversation_signature(text):
    """The same of a conversation, which is short: of pairs of its letters and digits, in an alphabet threes."""
    key = content_key(text)
    if len(key) < SHINGLE:
        return min_hashes(char_ngrams(key, max(1, len(key))))
    alphabetic = code_points(key) < _IDEOGRAPHS
    threes = alphabetic[:-2] & alphabetic[1:-1] & alphabetic[2:]
    twos = ~(alphabetic[:-1] & alphabetic[1:])
    return min_hashes(np.concatenate([char_ngrams(key, 2)[twos], char_ngrams(key, 3)[threes]]))


def min_hashes(shingles):
    """(BANDS * ROWS,) uint16, the low 16 bits of each minimum: two that differ agree in them once in 65,536."""
    rows = np.array([0, len(shingles)], np.uint64)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(shingles, rows, BANDS * ROWS, _SEED)
    return np.array(matrix.to_rows()[0], np.uint32).astype(np.uint16)


def near_duplicates(signatures, prefer=None, confirm=None, threshold=THRESHOLD, memory=256 << 20):
    """Which of N documents each repeats (N,) int64, -1 where it stays, from their signatures (N, BANDS * ROWS) uint16,
    maybe an np.memmap.

    Documents are linked when their signatures agree in a whole band and in a `threshold` share of all values, and
    `confirm(i, j)`, if given, says so too. One after the other, those of `prefer` (N,) bool first, each stays unless it
    is linked to one that stays.

    Uses about `memory` bytes, or 40 N where that is more: 32 N to sort one band, and 8 N for each band read in one pass
    over the signatures, so that 430 N is enough to read them once; and 40 bytes a link.
    """
    n = len(signatures)
    rank = np.arange(n) if prefer is None else np.argsort(np.argsort(~prefer, kind="stable"), kind="stable")
    links = _links(signatures, threshold, memory)
    a, b = (links >> np.uint64(32)).astype(np.int64), (links & np.uint64(0xFFFFFFFF)).astype(np.int64)
    a, b = np.where(rank[a] < rank[b], a, b), np.where(rank[a] < rank[b], b, a)
    order = np.lexsort((rank[a], rank[b]))
    repeats, agree = np.full(n, -1), threshold * BANDS * ROWS
    for later, group in itertools.groupby(zip(b[order], a[order], strict=True), operator.itemgetter(0)):
        tried = set()
        for _, earlier in group:
            kept = earlier if repeats[earlier] < 0 else repeats[earlier]
            if kept in tried or len(tried) == _TRIED:
                continue
            tried.add(kept)
            alike = kept == earlier or np.count_nonzero(signatures[kept] == signatures[later]) >= agree
            if alike and (confirm is None or confirm(kept, later)):
                repeats[later] = kept
                break
    return repeats


def _links(signatures, threshold, memory):
    """The pairs (a, b), a < b, of alike signatures, each once, as a * 2**32 + b: (L,) uint64 in order."""
    n, found = len(signatures), np.empty(0, np.uint64)
    together = int(np.clip(memory // (8 * max(n, 1)) - 4, 1, BANDS))
    for low in range(0, BANDS, together):
        keys = _band_keys(signatures, low, min(low + together, BANDS))
        for band in keys:
            new = []
            for a, b in _candidates(band):
                links = (a.astype(np.uint64) << np.uint64(32)) | b.astype(np.uint64)
                if len(found):
                    fresh = found[np.minimum(np.searchsorted(found, links), len(found) - 1)] != links
                    a, b, links = a[fresh], b[fresh], links[fresh]
                alike = np.count_nonzero(signatures[a] == signatures[b], axis=1) >= threshold * BANDS * ROWS
                new.append(links[alike])
            if new:
                found = np.union1d(found, np.concatenate(new))
        del keys, band
    return found


def _band_keys(signatures, low, high):
    """The keys of bands low..high of all documents: (high - low, N) uint64."""
    keys = np.empty((high - low, len(signatures)), np.uint64)
    for start in range(0, len(signatures), _BLOCK):
        block = np.ascontiguousarray(signatures[start : start + _BLOCK, low * ROWS : high * ROWS])
        keys[:, start : start + _BLOCK] = block.view(np.uint64).T
    return keys


def _candidates(keys):
    """Pairs (a, b) of documents with equal keys, in blocks: each with the first of its key and with the one before
    it, so that a thousand documents with one key make two thousand pairs, not half a million."""
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    first = 0  # where in `order` the run of equal keys began
    for start in range(1, len(keys), _BLOCK):
        stop = min(start + _BLOCK, len(keys))
        same = keys[start:stop] == keys[start - 1 : stop - 1]
        place = np.arange(start, stop)
        firsts = np.maximum.accumulate(np.where(same, first, place))
        first = firsts[-1]
        place, firsts = place[same], firsts[same]
        later = place - 1 > firsts  # the second of a run has one partner, not two
        a = np.concatenate([firsts, place[later] - 1])
        b = np.concatenate([place, place[later]])
        if len(a):
            yield order[a], order[b]


# conversations and short documents

COPY = 0.5  # share of common pairs of characters: of copies with 10 % edited 0.8 +- 0.1
PHRASE = 8  # units that differ in one place are another phrase: so many edits in a row do not happen to a copy
STOCK = 10  # units: a shorter answer is like many others
EDITS = 3  # of their own: fewer are what a template leaves open, a name or a number
_COMPARED = 1000  # units of either text that are looked at closely; the signatures compare the rest
# A word, a number, a sign between numbers (1:2 is not 12), a character; punctuation is none.
_UNIT = re.compile(r"(?<=\d)[,:](?=\d)|[0-9A-Za-z\u00c0-\u1fff]+|[^\s，。、；：？！“”‘’（）…—《》【】,:;?]")


def is_copied_conversation(a, b):
    """Whether the texts of a conversation, question and answer in turn, are an edited copy of another's.

    Records of a template (name the capital of ...; an instruction, and a line to judge) differ in little as well: in a
    word or two, or in the same words in question and answer. A copy was edited in several places, and in each in
    another way, or in punctuation alone. Short answers must be equal, and so must the last one if it is short.
    """
    if len(a) != len(b):
        return False
    a, b = ([_UNIT.findall(text) for text in texts] for texts in (a, b))
    answers = [(sum(texts[1::2], []), texts[-1]) for texts in (a, b)]
    if any(min(len(one), len(other)) < STOCK and one != other for one, other in zip(*answers, strict=True)):
        return False
    edits = [edits_of(one, other) for one, other in zip(a, b, strict=True)]
    if None in edits or any(max(map(len, edit)) >= PHRASE for turn in edits[::2] for edit in turn):
        return False
    edited = [edit for turn in edits for edit in turn]
    return not edited or own_edits(edited) >= EDITS


def is_copied_document(a, b):
    """Whether the turns of a document, [its text] if that is SHORT, else none, are an edited copy of another's."""
    if not (a and b):
        return True  # of long ones the signatures tell
    least = np.interp(min(len(a[0]), len(b[0])), [SHORTEST, SHORT], [CLOSE, THRESHOLD])
    return np.mean(signature(a[0]) == signature(b[0])) >= least and is_copied_conversation(a, b)


def edits_of(a, b):
    """[(units of a, what b has for them), ...] if they are of much the same characters, else None."""
    cut = max(len(a), len(b)) > _COMPARED  # what one has more of at its end, the other may have after it
    a, b = a[:_COMPARED], b[:_COMPARED]
    pairs = [Counter(map(str.__add__, text, text[1:])) for text in map("".join, (a, b))]
    if 2 * (pairs[0] & pairs[1]).total() < COPY * (pairs[0] + pairs[1]).total():
        return None
    places = []  # [from, to in a, from, to in b]; one equal character inside a word that was changed is chance
    for how, *place in SequenceMatcher(None, a, b, autojunk=False).get_opcodes()[: -1 if cut else None]:
        if how == "equal":
            continue
        joined = places and [places[-1][0], place[1], places[-1][2], place[3]]
        if (
            joined
            and place[0] - places[-1][1] < 2
            and has_letters(a[joined[0] : joined[1]], b[joined[2] : joined[3]], all)
        ):
            places[-1] = joined
        else:
            places.append(place)
    return [(tuple(a[i:j]), tuple(b[k:m])) for i, j, k, m in places]


def has_letters(units, others, which=any):
    return which(map(str.isalpha, [*units, *others]))


def own_edits(edits):
    """How many edits change letters, not just digits and signs, and are not made a second time."""
    times = Counter(edits)
    return sum(n == 1 and has_letters(*edit) for edit, n in times.items())

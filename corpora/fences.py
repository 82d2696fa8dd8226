"""Code in a text: set aside, so that what mends prose leaves it alone, and put back."""

import re

CODE = "\ufdd0"  # stands for a piece of code: a noncharacter, which Unicode keeps for internal use
# Backticks that are closed in their line by as many; a fence, up to its close or the end of the text. Chat models put
# a fence's backticks behind words too, and go on right after its close. Five tildes and more are a rule.
_CODE = re.compile(
    r"(?m)(?<!`)(`+)(?!`)[^\n]*?(?<!`)\1(?!`)"
    r"|(?<!`)(`{3,})(?!`)(?s:.*?)(?:\n[ \t>]*\2`*(?![`a-zA-Z\d{])|\2`*(?=[ \t\r]*$)|\Z)"
    r"|^[ \t>]*(~{3,4})[ \t]*[a-zA-Z\d_+#.\-]*[ \t\r]*$(?s:.*?)(?:\n[ \t>]*\3~*(?=[ \t\r]*$)|\Z)"
    f"|{CODE}"
)
_NO_TEXT = re.compile("[\0\ud800-\udfff]")


def outside_code(change, text, repair):
    """change(text), which sees a CODE in place of each piece of code and must return them all, in order.

    In the code itself `repair` takes away NUL and lone surrogates, and writes line ends as \\n; nothing else.
    """
    if "`" not in text and "~~~" not in text:
        return change(text)
    found = []

    def set_aside(match):
        found.append(_NO_TEXT.sub("", match[0].replace("\r\n", "\n")) if repair else match[0])
        return CODE

    prose = change(_CODE.sub(set_aside, text))
    pieces = iter(found)
    return re.sub(CODE, lambda _: next(pieces), prose)

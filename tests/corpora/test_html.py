"""corpora/clean.py: which HTML goes from documents, and what only looks like it."""

import pytest

from configs.data_process import config
from corpora.clean import clean_document, clean_text

DEFAULTS = config["clean"]
TAGS = [
    *("<p>", "</p>", "<P>", "<br>", "<br/>", "<BR />", "</p >", "<p\n>", "<br clear=all>", "<p align=center id='a'>"),
    *("<p class='a'style=\"text-indent: 2em;\n color: red\">", "<p width=100% hidden>", "<p data-v-7ba5bd90>"),
    *(
        '<p @click="f(x)" :key="k">',
        '<p v-if="a" nowrap />',
        "<p class='' title='a>b'>",
        "<p style=color:red;>",
        "<p lang=zh-CN>",
    ),
]


@pytest.mark.parametrize("tag", TAGS)
def test_tags_go(tag):
    assert clean_text(f"天{tag}地", DEFAULTS, document=True) == "天\n地"


@pytest.mark.parametrize(
    "text",
    [
        "若 n <p 则由费马小定理知结论成立，证明从略。\n下面考虑第二种情形，此时 q>2 恒成立，得证。",
        "设 1<p 且 q>1，1/p+1/q=1",
        "当检验的 α<P 时不能拒绝原假设；当 α>P 时拒绝原假设。",
        "若 n <p mod=3，则q>2；若 n <p max=3 且 q>2",
        "设 a <br 且 c> 2，b <p = 3> y，x <p a b>c，0<p and p>q",
        "class List<P extends Object>，List<P> 与 Map<K, P>",
        "<b and c>，<i 且 j>，<s 或 t>，<a 与 b>",
    ],
)
def test_mathematics_is_no_tag(text):
    assert clean_text(text, DEFAULTS, document=True) == text


def test_a_tag_that_entities_wrote_is_text():
    text = '在 HTML 中，&lt;br&gt; 表示换行，&lt;p class="a"&gt; 表示段落。<br>&amp;lt;p&amp;gt; 也是。'
    expected = '在 HTML 中，<br> 表示换行，<p class="a"> 表示段落。\n<p> 也是。'
    assert clean_document(text, DEFAULTS) == (expected, None)

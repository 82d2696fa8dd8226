"""Personal data: what is masked, in texts, in the fields of prompts and in samples of what was dropped."""

import json

import pytest

from corpora.clean import clean_text, mask_personal
from corpora.records import clean_record
from data_process import main


@pytest.mark.parametrize(
    "text, expected",
    [
        ("电话13812345678。", "电话【手机号】。"),
        ("+86 138-1234-5678或139 1234 5678", "【手机号】或【手机号】"),
        ("写信到zhang.san+1@mail.example.com.cn联系", "写信到【邮箱】联系"),
        ("13812345678@qq.com", "【邮箱】"),
        ("11010519491231002X、440524188001010014", "【身份证号】、【身份证号】"),  # the examples of GB 11643-1999
        ("身份证130503670401001", "身份证【身份证号】"),
        ("手机１３８００１３８０００，＋８６　１３８－００１３－８０００", "手机【手机号】，【手机号】"),
        ("138.0013.8000、1380013 8000、138 00138000、138—0013—8000", "【手机号】、【手机号】、【手机号】、【手机号】"),
        ("138·0013·8000；电话13800138000.2.地址", "【手机号】；电话【手机号】.2.地址"),
        ("(+86)13800138000元旦打", "(+86)【手机号】元旦打"),
        ("110105 19491231 002X，1101 0519 4912 3100 2X", "【身份证号】，【身份证号】"),
        ("110105-1949-1231-002x和１１０１０５１９４９１２３１００２Ｘ", "【身份证号】和【身份证号】"),
        ("130503 670401 001", "【身份证号】"),
        ("邮箱ｚｈａｎｇ＠ｑｑ．ｃｏｍ、a@163.com、b@vip.sina.com.cn。", "邮箱【邮箱】、【邮箱】、【邮箱】。"),
        ("a@b.com:13800138000，a@b.com.2. c@d.cn", "【邮箱】:【手机号】，【邮箱】.2. 【邮箱】"),
    ],
)
def test_mask_personal(text, expected):
    assert mask_personal(text) == expected
    assert clean_text(text, dict(mask_personal=True)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "12812345678",  # no mobile number begins with 128
        "1381234567",
        "138123456789",
        "圆周率3.13812345678",
        "110105194912310021",  # the last digit should be X
        "110105194902300020",  # 30 February; the checksum is right
        "130503671301001",  # month 13
        "@王小明 和 user@localhost",
        "138 1234-5678",
        "npm i react@18.2.0 vue@3.4.21 lodash@4.17.21.tgz @types/node@v20.1.0-beta pkg@1.0.beta",
        "ssh root@192.168.1.10，git@github.com:a/b，me@host.example.com:docs/a.txt，logo@2x.png",
        "价格13812345678.50元，共13812345678元，￥13812345678，13812345678%，137.03599908",
        "合同150-20240501号",
        "１９９８年——２００８年　共１０年",
        "110105 19491231 0021，1101 0519 4902 3000 20",
    ],
)
def test_mask_personal_leaves_other_numbers(text):
    assert mask_personal(text) == text


def test_checksum_of_the_february_number_is_right():
    weights = [7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2]  # as the standard prints them
    remainder = sum(int(digit) * weight for digit, weight in zip("11010519490230002", weights, strict=True)) % 11
    assert "10X98765432"[remainder] == "0"


def test_what_is_masked_keeps_the_rest_as_it_was_typed():
    assert mask_personal("Ａ　１２３－４：１３８００１３８０００") == "Ａ　１２３－４：【手机号】"


def test_fields_of_prompts_are_masked():
    fields = dict(
        answer="打13800138000", tests=[dict(input="a@b.com", n=13800138000), None], code="`a@b.com`", right=True
    )
    record = dict(messages=[dict(role="user", content="他的电话？")], fields=fields)
    masked = dict(
        answer="打【手机号】", tests=[dict(input="【邮箱】", n="【手机号】"), None], code="`a@b.com`", right=True
    )
    assert clean_record(record, dict(mask_personal=True))[0]["fields"] == masked
    assert clean_record(record, dict(mask_personal=False))[0]["fields"] == fields


@pytest.mark.parametrize("mask", [True, False])
def test_samples_of_what_was_dropped_are_masked(tmp_path, mask):
    texts = [*(f"{a}是一个汉字，它在字典里有一页。" for a in "山川河流城市乡村老师学生"), "打１３８００１３８０００"]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(dict(text=text)) + "\n" for text in texts), encoding="utf-8")
    options = [f"--sources=x:text_rows={path}", "--parts=text", f"--out={tmp_path / 'out'}", "--val_share=0.2"]
    main([*options, f"--clean.mask_personal={mask}", "--clean.min_characters=13"])
    samples = [
        json.loads(line)["text"] for line in (tmp_path / "out" / "dropped.jsonl").read_text("utf-8").splitlines()
    ]
    assert samples == ["打【手机号】" if mask else texts[-1]]

"""The page of web_demo.py in a headless Chromium: talk, stop, regenerate, edit, compare, plots, family tree."""

import os
import shutil

import pytest
import torch
from chains import make_data
from tiny import tiny
from web import served, until

from common import checkpoint
from common.metrics import MetricLog
from tokenizer import Tokenizer

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two chat models and a base model, parent and children, with plots and samples."""
    folder = tmp_path_factory.mktemp("page")
    make_data(folder, "prompts")
    vocabulary, root = Tokenizer.load(folder / "tokenizer"), folder / "out"
    parent = None
    for seed, stage in enumerate(("pretrain", "sft", "dpo")):
        out = root / "demo" / stage
        log = MetricLog(out)
        for step in range(3):
            log.write(step, {"train/loss": 3.0 - step})
            log.samples(step, [("<b>酒店</b>", f"第 {step} 步")])
        log.plot([("loss", ["train/loss"])])
        model = tiny(seed, vocab_size=vocabulary.vocab_size, max_seq_len=1024)
        with torch.no_grad():  # one channel speaks against <eos>, which would end what the test wants to stop
            model.tok_embeddings.weight[:, 0] = 4
            model.tok_embeddings.weight[vocabulary.eos_id, 0] = -4
        facts = dict(stage=stage, step=seed, tokens_seen=9, config={}, tokenizer=vocabulary.model_bytes)
        checkpoint.save(out, model=model, parent=parent, **facts)
        parent = checkpoint.parent_of(checkpoint.load(out))
    return root


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium: apt-get install chromium, or CHROMIUM=path of one")
    with playwright.sync_playwright() as started:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]  # root has no sandbox
        with started.chromium.launch(executable_path=CHROMIUM, args=flags) as browser:
            yield browser


@pytest.fixture(scope="module")
def server(runs):
    with served(runs, top_p=1.0, max_new_tokens=512) as server:
        yield server


@pytest.fixture
def page(browser, server):
    """A page that is ready; whatever its console says of errors fails the test."""
    context = browser.new_context(viewport=dict(width=1200, height=800), locale="zh-CN")
    page, errors = context.new_page(), []
    page.set_default_timeout(60_000)
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"http://127.0.0.1:{server.port}/")
    page.wait_for_selector("body[data-ready]")
    yield page
    assert errors == []
    context.close()


def choose(page, model, other=""):
    page.select_option("#model", model)
    page.select_option("#other", other)


def limit(page, tokens):
    """The longest reply, by its slider."""
    page.locator("#max_new_tokens").fill(str(tokens))


def ask(page, text):
    page.fill("#question", text)
    page.press("#question", "Enter")


def finished(page):
    page.wait_for_selector("#send:not([hidden])")
    page.wait_for_selector(".reply:last-child .token", state="attached")  # the first may be of no visible character


def test_talk_stop_regenerate_and_edit(page, server):
    worker = server.site.worker
    choose(page, "demo/sft")
    limit(page, 1024)
    ask(page, "<img src=x onerror=alert(1)>")
    until(lambda: page.locator(".token").count() > 5)
    assert "词元/秒" in page.inner_text(".facts") and worker.job is not None
    page.keyboard.press("Escape")  # in the middle
    until(lambda: worker.job is None)
    finished(page)
    assert "已停止" in page.inner_text(".facts")
    assert page.inner_text(".question p") == "<img src=x onerror=alert(1)>" and page.locator(".turn img").count() == 0
    limit(page, 16)
    first = page.inner_text(".text")
    page.click("text=重新生成")
    finished(page)
    assert page.inner_text(".text") != first and "到了长度上限" in page.inner_text(".facts")
    ask(page, "第二句")
    until(lambda: page.locator(".turn").count() == 2)
    finished(page)
    page.press("#question", "ArrowUp")
    page.fill(".edit textarea", "改过的第二句")
    page.press(".edit textarea", "Enter")
    finished(page)
    assert page.locator(".question p").all_inner_texts()[1] == "改过的第二句"
    page.locator(".question button").first.click()  # to edit the first question drops the second
    page.click("text=重新问")
    finished(page)
    assert page.locator(".turn").count() == 1


def test_probabilities_by_pointer_and_keys(page):
    choose(page, "demo/sft")
    limit(page, 16)
    ask(page, "好")
    finished(page)
    page.hover(".token:visible >> nth=0")  # a line break alone has no width
    page.wait_for_selector("#tip:not([hidden])")
    tokens = page.locator("#tip p").count()  # more than one where each has a part of a character
    assert tokens >= 1 and page.locator("#tip div").count() == 5 * tokens
    assert page.inner_text("#tip").count("%") >= 6 * tokens
    page.mouse.move(0, 0)
    page.focus(".text")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator(".token.shown").count() == 1


def test_escape_in_an_input_method_or_a_dialog_stops_nothing(page, server):
    choose(page, "demo/sft")
    limit(page, 8)
    ask(page, "一")
    finished(page)
    page.press("#question", "ArrowUp")
    page.fill(".edit textarea", "改过的")
    dismiss = "new KeyboardEvent('keydown', {key: 'Escape', isComposing: true, keyCode: 229, bubbles: true})"
    page.eval_on_selector(".edit textarea", f"field => field.dispatchEvent({dismiss})")
    assert page.input_value(".edit textarea") == "改过的"
    page.press(".edit textarea", "Escape")
    assert page.locator(".edit").count() == 0
    limit(page, 1024)
    ask(page, "二")
    until(lambda: page.locator(".turn >> nth=1").locator(".token").count() > 5)
    page.eval_on_selector("#question", f"field => field.dispatchEvent({dismiss})")
    page.keyboard.press("Alt+2")
    page.click(".plot >> nth=0")
    page.wait_for_selector("#picture-dialog[open]")
    page.keyboard.press("Escape")
    page.wait_for_selector("#picture-dialog:not([open])", state="attached")
    assert server.site.worker.job is not None
    page.keyboard.press("Alt+1")
    page.keyboard.press("Escape")
    finished(page)
    assert page.locator(".facts").all_inner_texts()[1].count("已停止") == 1


def test_a_finger_leaves_the_probabilities_open(browser, server):
    context = browser.new_context(viewport=dict(width=400, height=700), has_touch=True)
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.goto(f"http://127.0.0.1:{server.port}/")
    page.wait_for_selector("body[data-ready]")
    page.evaluate("document.querySelector('#max_new_tokens').value = 16")
    ask(page, "好")
    finished(page)
    page.tap(".token:visible >> nth=0")
    page.wait_for_selector("#tip:not([hidden])")
    page.wait_for_timeout(200)
    assert page.is_visible("#tip")
    context.close()


def test_what_cannot_be_asked_is_told_and_loses_nothing(page):
    choose(page, "demo/sft")
    limit(page, 8)
    page.fill("#seed", "１２")  # as an input method writes it
    ask(page, "一")
    finished(page)
    assert "种子\u00a012" in page.inner_text(".facts")
    text = page.inner_text(".text")
    page.fill("#seed", "一二")
    page.click("text=重新生成")
    page.fill("#question", "二")
    page.press("#question", "Enter")
    assert page.inner_text("#status").startswith("种子要是") and page.inner_text(".text") == text
    assert page.input_value("#question") == "二" and page.locator(".turn").count() == 1
    page.fill("#seed", "")
    page.evaluate("document.querySelector('#model').replaceChildren()")  # as where the only run was replaced meanwhile
    page.click("text=重新生成")
    assert page.inner_text("#status") == "先选一个检查点" and page.inner_text(".text") == text
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")  # as on http:// addresses
    page.click("text=复制")
    until(lambda: page.inner_text("#status") == "浏览器不让复制")


def test_the_servers_defaults_can_be_chosen_whatever_they_are(browser, runs):
    odd = dict(temperature=0.77, top_p=0.97, top_k=500, repetition_penalty=0.9, max_new_tokens=2048)
    with served(runs, **odd) as server:
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.wait_for_selector("body[data-ready]")
        for _ in range(2):
            assert {key: float(page.input_value(f"#{key}")) for key in odd} == odd
            page.evaluate("document.querySelector('#defaults').click()")
        page.close()


def test_switch_compare_and_continue(page):
    choose(page, "demo/sft", "demo/dpo")
    limit(page, 32)
    page.fill("#seed", "3")
    ask(page, "比一比")
    finished(page)
    assert page.locator(".who").all_inner_texts() == ["demo/sft", "demo/dpo"]
    texts = page.locator(".text").all_inner_texts()
    assert texts[0] != texts[1] and all(texts)
    choose(page, "demo/pretrain")
    ask(page, "酒店的")
    until(lambda: page.locator(".reply").count() == 3)
    finished(page)
    assert page.locator(".who").all_inner_texts()[2] == "demo/pretrain" and page.locator(".error").count() == 0


def test_plots_samples_and_family_tree(page):
    page.keyboard.press("Alt+2")
    until(lambda: page.evaluate("[...document.querySelectorAll('.plot img')].filter(i => i.naturalWidth).length") == 3)
    page.locator("summary", has_text="训练中的样例").first.click()
    page.wait_for_selector(".sample")
    assert page.inner_text(".sample >> nth=0").split() == ["<b>酒店</b>", "第", "2", "步"]
    page.click(".plot >> nth=0")
    page.wait_for_selector("#picture-dialog[open]")
    page.keyboard.press("Escape")
    page.keyboard.press("Alt+3")
    page.wait_for_selector(".branch .branch .branch")
    assert page.locator(".node b").all_inner_texts() == ["demo/pretrain", "demo/sft", "demo/dpo"]
    page.locator("text=和它说话").nth(2).click()
    page.wait_for_selector("#chat:not([hidden])")
    assert page.input_value("#model") == "demo/dpo"


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_a_phone_in_light_and_dark(page, width, scheme):
    page.set_viewport_size(dict(width=width, height=700))
    page.emulate_media(color_scheme=scheme)
    for keys in ("Alt+2", "Alt+3", "Alt+1"):
        page.keyboard.press(keys)
        page.wait_for_selector("[role=tabpanel]:not([hidden]) *")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor").removeprefix("rgb(").split(",")[0]
    assert (int(dark) < 128) == (scheme == "dark")
    assert page.evaluate("document.activeElement.id") == "tab-chat"

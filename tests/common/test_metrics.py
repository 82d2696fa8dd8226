"""Logs, plots, guards and statistics of common/metrics.py."""

import io
import json
import math
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from chains import ROOT

from common import compare
from common.config import ConfigError, UserError
from common.distributed import Env
from common.loggers import open_logger, run_id
from common.metrics import (
    FiniteGuard,
    MetricLog,
    NonFiniteError,
    TextLoss,
    distinct_2,
    points,
    share,
    source_losses,
    wilson_interval,
)
from common.optim import build_optimizer
from common.plots import Line, draw, smooth
from common.progress import Progress
from common.stage import Stage
from common.tables import format_table, markdown_table
from configs.pretrain import config as pretraining
from dataset.corpus import Corpus
from dataset.formats import BinWriter, DataError, save_meta
from model import Llama, ModelConfig

ENV = Env(0, 1, torch.device("cpu"))


def tiny_llama():
    torch.manual_seed(0)
    shape = dict(dim=16, n_layers=1, n_heads=2, n_kv_heads=2, vocab_size=50, max_seq_len=8)
    return Llama(ModelConfig(**shape)).eval()


def test_write_rounds_and_replaces_non_finite(tmp_path):
    log = MetricLog(tmp_path / "run")
    values = {"train/loss": 1.23456789, "a": math.nan, "b": math.inf, "n": 7, "t": torch.tensor(0.5)}
    log.write(3, values | {"np": np.float32(1e-7), "none": None})
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert row.pop("seconds") >= 0
    expected = {"step": 3, "train/loss": 1.23457, "a": None, "b": None, "n": 7, "t": 0.5}
    assert row == expected | {"np": 1e-7, "none": None}


def test_resume_drops_later_steps_and_a_cut_line(tmp_path):
    log = MetricLog(tmp_path)
    for step in (1, 2, 3):
        log.write(step, {"train/loss": float(step)})
        log.samples(step, [("问", f"答\nstep 1\r\nstep 9\x85{step}")])
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 2, "sec')
    log = MetricLog(tmp_path, resume_step=2)
    assert [row["step"] for row in log.read()] == [1, 2]
    log.write(3, {"train/loss": 30.0})
    assert [row["train/loss"] for row in log.read()] == [1.0, 2.0, 30.0]
    seconds = [row["seconds"] for row in log.read()]
    assert seconds == sorted(seconds)
    headers = [line for line in (tmp_path / "samples.txt").read_text().splitlines() if line.startswith("step")]
    assert headers == ["step 1", "step 2"]  # the replies hold such lines too, indented


def test_what_somebody_wrote_into_the_logs_is_no_trouble(tmp_path):
    log = MetricLog(tmp_path)
    for step in (1, 2):
        log.write(step, {"val/loss": 3.0 - step})
        log.samples(step, [("问", "答")])
    odd = [
        '{"step": 2, "seconds": "x", "val/loss": "low"}',
        '{"step": -1}',
        '{"step": true}',
        '{"step": 1e3}',
        "[1]",
        "?",
    ]
    odd += ['{"step": 2, "seconds": null, "val/loss": [0]}', '{"step": 2, "val/loss": 1' + "0" * 400 + "}"]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.writelines(line + "\n" for line in odd)
    notes = "step x\nstep\nstep 9 is the best\nstep ²\nstep 1e3\n"
    with open(tmp_path / "samples.txt", "a") as file:
        file.write(notes + "step 3\nof a run that went on\n")
    log = MetricLog(tmp_path, resume_step=2)
    assert points(log.read(), "val/loss")[1].tolist() == [2.0, 1.0]
    assert (tmp_path / "samples.txt").read_text().endswith("\n\n" + notes)
    log.write(3, {"val/loss": 0.5})
    log.plot([("loss", ["val/loss"])])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    run = compare.read_run(str(tmp_path), "val/loss")
    assert run.val[1].tolist() == [2.0, 1.0, 0.5] and run.steps == 3


def test_resume_of_an_empty_directory_and_fresh_start(tmp_path):
    log = MetricLog(tmp_path, resume_step=0)
    assert log.read() == [] and list(tmp_path.iterdir()) == []
    log.write(1, {"x": 1})
    log.samples(1, [("p", "")])
    assert MetricLog(tmp_path).read() == [] and list(tmp_path.iterdir()) == []


def test_samples_layout(tmp_path):
    MetricLog(tmp_path).samples(10, [("你好", "很好\n再见"), ("二", "")])
    text = (tmp_path / "samples.txt").read_text(encoding="utf-8")
    assert text == "step 10\n  prompt: 你好\n  reply: 很好\n    再见\n\n  prompt: 二\n  reply: \n\n"


def test_plot_draws_panels_with_data_only(tmp_path):
    log = MetricLog(tmp_path)
    log.plot([("loss (nats/token)", ["train/loss"])])
    assert list(tmp_path.iterdir()) == []  # no data, no file
    log.write(0, {"val/loss": 6.0})
    log.plot([("loss (nats/token)", ["val/loss"])])
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]  # one point is no curve
    for step in range(1, 60):
        log.write(step, {"train/loss": 5 / step if step != 7 else math.nan})
        if step % 20 == 0:
            log.write(step, {"val/loss": 6 / step})
    panels = [("loss (nats/token)", ["train/loss", "val/loss"]), ("KL (nats)", ["ppo/kl"])]
    log.plot(panels)
    one = png_size(tmp_path / "loss.png")
    log.plot([*panels, ("validation loss (nats/token)", ["val/loss"])])
    two = png_size(tmp_path / "loss.png")
    assert one == (1260, 600) and two == (1260, 480)  # 8.4 x 4.0 and 8.4 x 3.2 inches at 150 dpi
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_smooth_is_a_centred_mean_that_keeps_constants():
    assert smooth(np.array([0.0, 3.0, 6.0, 0.0]), 3).tolist() == [1.5, 3.0, 3.0, 3.0]
    assert smooth(np.array([1.0, 5.0]), 1).tolist() == [1.0, 5.0]
    assert np.allclose(smooth(np.full(50, 2.0), 5), 2.0)


def test_progress_plain_lines(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("common.metrics.time.monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    progress = Progress(total=100, initial=10, desc="sft")
    for step in range(11, 41):
        now[0] += 1.0
        progress.update(step, 1000, loss=2.5)
    progress.close()
    lines = sys.stderr.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["11/100", "21/100", "31/100", "40/100"]
    assert lines[0] == "sft 11/100 1,000 tokens/s, ETA 0:01:29, loss 2.5"
    assert lines[-1] == "sft 40/100 1,000 tokens/s, ETA 0:01:00, loss 2.5"


def test_progress_prints_the_last_line_once(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    progress = Progress(total=2)
    progress.close()
    assert sys.stderr.getvalue() == ""
    progress.update(1, 10)
    progress.close()
    assert sys.stderr.getvalue().count("\n") == 1


def test_progress_bar_on_a_terminal(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress(total=20, initial=5, desc="rm")
    progress.update(20, 10, loss=0.25)
    progress.close()
    last = terminal.getvalue().split("\r")[-1]
    assert "rm: 100%" in last and "20/20" in last and "tokens/s" in last and "loss 0.25" in last


def test_finite_guard_skips_then_gives_up(capsys):
    guard = FiniteGuard(limit=3)
    assert guard.ok(1, 2.0, 1.0)
    assert not guard.ok(2, math.nan, 1.0)
    assert not guard.ok(3, 2.0, math.inf)
    assert guard.ok(4, torch.tensor(2.0), torch.tensor(1.0))  # the count starts again
    assert not guard.ok(5, math.nan, 1.0)
    assert not guard.ok(6, math.nan, 1.0)
    captured = capsys.readouterr().err.strip().splitlines()
    assert len(captured) == 4 and captured[0].startswith("step 2: loss nan, gradient norm 1: update skipped")
    with pytest.raises(NonFiniteError, match=r"step 7: .*3 times in a row; the last good checkpoint is kept"):
        guard.ok(7, math.nan, 1.0)
    assert issubclass(NonFiniteError, UserError)


def test_markdown_shows_texts_as_they_are():
    table = markdown_table(["a|b", "people_daily"], [["_x_ \\| <b> 好_好", "1\n2\r*"], ["", "`~~$[1](2)&amp;"]])
    assert table.split("\n") == [
        r"| a\|b | people_daily |",
        "|---|---|",
        r"| \_x\_ \\\| \<b\> 好_好 | 1\n2\r\* |",
        r"|  | \`\~\~\$\[1\](2)\&amp; |",
    ]


def test_a_figure_that_is_none_is_a_dash():
    rows = [dict(name="nan-run", bits=float("nan"), low=float("nan"), high=float("nan"))]
    table = format_table({"run": "{name}", "bits": "{bits:.2f}", "interval": "{low:.3f} to {high:.3f}"}, rows)
    assert table.splitlines()[-1] == "| nan-run | - | - |"


def test_format_table_and_share():
    rows = [dict(name="a", share=share([True, False])), dict(name="b", share=share([]))]
    table = format_table({"who": "{name}", "what": "{share:.1%}"}, rows)
    assert table.split("\n")[2:] == ["| a | 50.0% |", "| b | - |"]


def val_text(directory, counts, ids):
    """Validation text, ids, whose sources are {name: (tokens, characters)}."""
    sources, files, start = {}, {}, 0
    for name, (tokens, characters) in counts.items():
        with BinWriter(directory / f"val.{name}.bin", 50) as file:
            file.write(ids[start : start + tokens])
        start += tokens
        files[file.path.name] = dict(part="pretrain", tokens=tokens)
        counted = dict(documents=1, tokens=tokens, characters=characters)
        sources[name] = dict(train=counted, val=counted)
    save_meta(directory, dict(format_version=2, vocab_size=50, dtype="uint16", sources=sources, files=files))
    return Corpus(directory, "val")


def test_source_losses_of_a_uniform_model(tmp_path):
    model = tiny_llama().train()
    model.tok_embeddings.weight.data.zero_()  # all logits are 0: each of 50 tokens is equally likely
    val = val_text(tmp_path, {"a": (21, 42), "one": (1, 1), "b": (30, 15)}, [7] * 52)
    total, sources = source_losses(model, val, ENV)
    # the first token of a source is not predicted: 20 and 29 are, of 2 and 0.5 characters; none in "one"
    assert list(sources) == ["a", "b"] and (sources["a"].tokens, sources["b"].tokens) == (20, 29)
    assert sources["a"].perplexity == pytest.approx(50) == total.perplexity
    assert sources["a"].bits_per_char == pytest.approx(math.log2(50) / 2)
    assert sources["b"].bits_per_char == pytest.approx(math.log2(50) * 2)
    assert total.bits_per_char == pytest.approx(math.log2(50) * 49 / (20 * 2 + 29 / 2))
    assert model.training


def nats(model, ids):
    """Of each token after the first, given those before it in windows of 8."""
    total = 0.0
    for i in range(0, len(ids) - 1, 8):
        window = torch.tensor(ids[i : i + 9])
        logps = model(window[None, :-1])[0].log_softmax(-1)  # (T, V)
        total -= logps.gather(1, window[1:, None]).sum().item()
    return total


@torch.no_grad()
def test_source_losses_are_the_models_own_in_windows_of_its_context(tmp_path):
    model = tiny_llama()  # context 8
    ids = torch.randint(50, (30,), generator=torch.Generator().manual_seed(0)).tolist()
    val = val_text(tmp_path, {"a": (12, 12), "b": (18, 18)}, ids)
    a, b = nats(model, ids[:12]), nats(model, ids[12:])
    for batch_size in (1, 16):
        total, sources = source_losses(model, val, ENV, batch_size=batch_size)
        assert (sources["a"].nats, sources["b"].nats) == (pytest.approx(a, rel=1e-5), pytest.approx(b, rel=1e-5))
        assert total.per_token == pytest.approx((a + b) / 28, rel=1e-5)
    cut = source_losses(model, val, ENV, max_tokens=15)[1]["b"]  # half of the rows
    spaced = nats(model, ids[12:21]) + nats(model, ids[28:30])  # of 12 to 20, 20 to 28 and 28 to 29
    assert (cut.tokens, cut.nats) == (9, pytest.approx(spaced, rel=1e-5))


@torch.no_grad()
def test_source_losses_within_documents(tmp_path):
    """As training with mask_documents sees them: what stands before an eos is not there for what comes after."""
    model, eos = tiny_llama(), 2
    ids = [5, 6, 7, eos, 8, 9, 10, 11, eos]  # one row of context 8
    total, _ = source_losses(model, val_text(tmp_path, {"a": (9, 9)}, ids), ENV, eos_id=eos)
    expected = nats(model, ids[:5]) + nats(model, ids[4:])  # an eos still sees its own
    assert total.nats == pytest.approx(expected, rel=1e-6)
    across, _ = source_losses(model, val_text(tmp_path, {"a": (9, 9)}, ids), ENV)
    assert across.nats != pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("most", [1, 15, 16, 29, 30, 99])
def test_no_more_is_scored_than_asked_for_but_a_row(tmp_path, most):
    val = val_text(tmp_path, {"a": (400, 400)}, [7] * 400)
    assert source_losses(tiny_llama(), val, ENV, max_tokens=most)[0].tokens <= most + 8


def test_a_perplexity_beyond_all_numbers_is_infinite():
    assert TextLoss(nats=1e6, tokens=2, characters=2.0).perplexity == math.inf
    assert TextLoss(nats=4.0, tokens=2, characters=2.0).perplexity == pytest.approx(math.e**2)


def test_source_losses_without_text(tmp_path):
    with pytest.raises(DataError, match=r"val\.\*\.bin: no source"):
        source_losses(tiny_llama(), val_text(tmp_path, {"a": (1, 1)}, [3]), ENV)


def test_wilson_interval_known_values():
    # 5 of 10: centre 0.5, half width sqrt(0.25/10 + 3.8416/400) * 1.96 / (1 + 0.38416) = 0.2634
    assert wilson_interval(5, 10) == pytest.approx((0.236593, 0.763407), abs=1e-5)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 3.8416 / 13.8416))  # z^2 / (n + z^2)
    assert wilson_interval(10, 10) == pytest.approx((10 / 13.8416, 1.0))
    assert wilson_interval(0, 0) == (0.0, 1.0)
    low, high = wilson_interval(3, 7)
    assert wilson_interval(4, 7) == pytest.approx((1 - high, 1 - low))
    with pytest.raises(ValueError, match="4 successes out of 3"):
        wilson_interval(4, 3)


def test_distinct_2_counts_bigrams_within_replies():
    assert distinct_2(["abab"], 4) == 2 / 4  # ab, ba
    assert distinct_2(["ab", "cd"], 4) == 2 / 4  # bc crosses a boundary
    assert distinct_2(["abc", "abd"], 6) == 3 / 6  # ab bc bd
    assert distinct_2(["abc", "xyz"], 5) == 3 / 5  # ab bc xy: the sixth character is outside
    assert distinct_2(["好好好好"], 4) == 1 / 4
    assert distinct_2(["abcdef"], 3) == 2 / 3


def test_distinct_2_needs_enough_text():
    assert math.isnan(distinct_2(["ab"], 3))
    assert math.isnan(distinct_2([], 0))


def tensorboard_rows(folder):
    """{(name, step): value} of the event files, what a resumed run took back left out."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(str(folder), size_guidance=dict(scalars=0)).Reload()
    return {(tag, e.step): e.value for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}


def json_rows(folder):
    """The same of metrics.jsonl."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    values = {(name, row["step"]): value for row in rows for name, value in row.items()}
    return {key: value for key, value in values.items() if key[0] != "step" and value is not None}


def test_tensorboard_holds_what_metrics_jsonl_does(tmp_path):
    pytest.importorskip("tensorboard")
    config = dict(logger="tensorboard", out=str(tmp_path))

    def write(resume_step, steps, factor):
        log = MetricLog(tmp_path, resume_step, open_logger(config, resume_step))
        for step in steps:
            log.write(step, {"train/loss": factor / step, "train/grad_norm": math.nan if step == 2 else 1})
            log.write(step, {"val/loss": factor * step})
        log.close()

    for resume_step, steps, factor in ((None, (1, 2, 3, 4), 1.0), (2, (3, 4, 5), 10.0), (None, (1, 2), 7.0)):
        write(resume_step, steps, factor)
        expected = json_rows(tmp_path)
        # a new run removes the files of the old one, a resumed one adds to them
        assert tensorboard_rows(tmp_path / "tensorboard") == pytest.approx(expected, rel=1e-6)
        assert ("train/grad_norm", 2) not in expected and expected["train/loss", steps[-1]] == pytest.approx(
            factor / steps[-1], rel=1e-5
        )


def test_a_stage_writes_to_its_logger(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    config = pretraining | dict(out=str(tmp_path), logger="tensorboard", max_steps=1, log_interval=1, device="cpu")
    stage, model = Stage("pretrain", config, []), tiny_llama()
    stage.start(model, build_optimizer(model, config), SimpleNamespace(model_bytes=b"any"))
    stage.log(1, 8, {"train/loss": 2.0})
    stage.report(1, {"val/loss": 3.0})
    stage.save(1)  # from here on it has a place in `out`
    assert stage.ends(1)
    stage.close()
    written = tensorboard_rows(tmp_path / "tensorboard")
    assert written == pytest.approx(json_rows(tmp_path), rel=1e-6)
    assert (written["train/loss", 1], written["train/tokens", 1], written["val/loss", 1]) == (2.0, 8.0, 3.0)


@pytest.mark.parametrize("name", ["swanlab", "wandb"])
def test_a_logger_that_is_not_installed_is_named(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not
    with pytest.raises(ConfigError, match=f"logger={name}: its package is not installed: pip install {name}"):
        open_logger(dict(logger=name, out=str(tmp_path)))
    assert open_logger(dict(logger="none")) is None and list(tmp_path.iterdir()) == []


def test_a_resumed_run_keeps_its_id(tmp_path):
    first = run_id(tmp_path, None)
    assert run_id(tmp_path, 3) == first and len(first) == 21
    assert run_id(tmp_path, None) != first


def write_run(folder, rows):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_compare_draws_runs_and_tells_what_they_reached(tmp_path, capsys):
    # 100 tokens a second, but for a pause of 98 seconds; the metric is best at step 20
    rows = [{"step": 0, "seconds": 0, "val/loss": 9.0}]
    for step in range(10, 60, 10):
        seconds = step / 5 + (98 if step == 50 else 0)
        rows.append({"step": step, "seconds": seconds, "train/loss": 8 - step / 10, "train/tokens": step * 20})
    rows += [{"step": 20, "seconds": 5, "val/loss": 3.0, "val/accuracy": 0.5}]
    rows += [{"step": 45, "seconds": 9, "val/loss": 3.25, "val/accuracy": 0.25}]
    a = write_run(tmp_path / "a", rows)
    b = write_run(tmp_path / "b", [{"step": 7, "seconds": 1, "val/loss": 4.0, "val/accuracy": 0.125}])
    out = tmp_path / "new" / "plot.png"
    for _ in range(2):  # what it drew itself it replaces
        capsys.readouterr()
        compare.main([a, b, f"--out={out}"])
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "| run | steps | tokens | last val/loss (step) | best val/loss (step) | tokens/s |"
    assert [line.replace("\\_", "_") for line in table[2:4]] == [
        f"| {a} | 50 | 1,000 | 3.25 (45) | 3 (20) | 100 |",
        f"| {b} | 7 | - | 4 (7) | 4 (7) | - |",
    ]
    assert png_size(out) == (1260, 960)  # training and validation, against steps and tokens

    run = compare.read_run(a, "val/loss")
    assert run.tokens_at([0, 5, 20, 45]).tolist() == [0, 100, 400, 900]
    lines = {(x, y): drawn for x, y, drawn in compare.panels([run, compare.read_run(b, "val/loss")], "val/loss")}
    assert [line.label for line in lines["step", "val/loss"]] == [a, b]
    (only,) = lines["tokens", "val/loss"]  # b does not say how many tokens it saw
    assert (only.x.tolist(), only.y.tolist()) == ([0, 400, 900], [9.0, 3.0, 3.25])

    compare.main([a, f"--out={out}", "--metric=val/accuracy"])
    assert "| 0.25 (45) | 0.5 (20) |" in capsys.readouterr().out  # of accuracies the largest is the best


def test_compare_says_what_is_wrong_with_its_input(tmp_path):
    a = write_run(tmp_path / "a", [{"step": 1, "seconds": 1, "val/loss": 1.0}])
    for arguments, message in (
        ([str(tmp_path)], f"{tmp_path}/metrics.jsonl: not there or empty"),
        ([a, "--metric=val/los"], r"no value of val/los in it; it has val/loss"),
        ([a, "--out=plot.pdf"], r"plot.pdf: the name of a .png file is needed"),
        ([a, a], "a run is given twice"),
    ):
        with pytest.raises(UserError, match=message):
            compare.main(arguments)
    command = [sys.executable, "-m", "common.compare", str(tmp_path / "none")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1


def test_chinese_labels_are_drawn_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert draw([("步", "损失", [Line("loss", "小说", np.arange(30), np.arange(30.0))])]).startswith(b"\x89PNG")

"""What RL stages share: scores from models and functions, metrics, warnings and the picture of a run."""

import json
import math
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tiny import ENV, ragged

from alignment.comparison import compare
from alignment.functions import call, file_identity, length_reward, reward_function
from alignment.objective import add_up, average
from alignment.rewards import Reward, checked, final_scores
from alignment.rollout import Watch, reply_metrics, rollout
from alignment.tradeoff import plot_score_kl
from common import checkpoint
from common.config import ConfigError, UserError
from common.files import file_sha256
from common.metrics import MetricLog
from model import Llama, ModelConfig
from tokenizer import Tokenizer


def test_numbers_add_up_and_average_but_for_the_largest():
    parts = [dict(loss=1.0, ratio_max=3.0), dict(loss=2.0, ratio_max=2.0)]
    tensors = [{name: torch.tensor(number) for name, number in part.items()} for part in parts]
    assert add_up(tensors) == dict(loss=3.0, ratio_max=3.0)
    assert average(parts) == dict(loss=1.5, ratio_max=3.0)


def test_reply_metrics_count_real_tokens():
    batch = ragged((2, 3), (3, 1))
    logps, ref_logps = torch.full(batch.mask.shape, -2.0) * batch.mask, torch.full(batch.mask.shape, -3.0) * batch.mask
    words = SimpleNamespace(decode=lambda reply: {3: "好好好", 1: "棒"}[len(reply)])
    found = reply_metrics(batch, torch.tensor([1.0, 2]), logps, ref_logps, words)
    expected = dict(score=1.5, kl=2.0, entropy=2.0, length=2.0, eos_rate=0.0, distinct_2=0.25)
    assert found == pytest.approx(expected)
    assert math.isnan(reply_metrics(batch, torch.zeros(2), logps, None, words)["kl"])


# warnings


GOOD = dict(kl=1.0, length=20.0, distinct_2=0.8)


def warnings(capsys, *rows, watch=None):
    """The steps at which a Watch warns of metrics that follow one another, with the warnings."""
    watch, found = watch or Watch(), {}
    for step, row in enumerate(rows, 1):
        watch.look(step, GOOD | row)
        if lines := capsys.readouterr().err.splitlines():
            found[step] = " ".join(lines)
    return found


def test_ten_negative_kls_in_a_row_are_told_once(capsys):
    found = warnings(capsys, *[dict(kl=-0.1)] * 9, dict(kl=0.1), *[dict(kl=-0.25)] * 12, {}, *[dict(kl=-1.0)] * 10)
    assert list(found) == [20, 33]
    assert "step 20: the mean KL to the reference was negative 10 steps in a row, now -0.25" in found[20]


def test_silence_is_told_each_time_it_begins(capsys):
    silent = dict(length=1.5, distinct_2=math.nan)
    found = warnings(capsys, {}, dict(length=2.5), silent, silent, {}, silent)
    assert list(found) == [3, 6] and "step 3: replies have 1.5 tokens in the mean" in found[3]


def test_replies_that_become_alike_are_told(capsys):
    found = warnings(capsys, {}, dict(distinct_2=0.41), dict(distinct_2=0.39), dict(distinct_2=0.2))
    assert list(found) == [3] and "distinct-2 of the replies is 0.39, below half of the first step's 0.80" in found[3]
    assert warnings(capsys, *[dict(kl=math.nan)] * 12) == {}


def test_a_resumed_watch_remembers(capsys):
    watch = Watch()
    warnings(capsys, {}, *[dict(kl=-1.0)] * 6, dict(kl=-1.0, length=1.0), watch=watch)
    again = Watch(json.loads(json.dumps(watch.state)))
    rows = dict(kl=-1.0, length=1.0), dict(kl=-1.0, distinct_2=0.3), dict(kl=-1.0)
    assert list(warnings(capsys, *rows, watch=again)) == [2, 3]


# rewards


def test_final_scores_are_normalised_and_unended_replies_get_theirs():
    raw, ended = torch.tensor([3.0, 8.0, 0.0]), torch.tensor([True, False, True])
    assert final_scores(raw, ended, [1.0, 2.0], -3.0, score_clip=0.75).tolist() == [0.75, -3.0, -0.5]
    scores = final_scores(raw, ended, [1.0, 2.0], -3.0)
    assert scores.tolist() == [1, -3, -0.5]


def test_length_reward_falls_to_nothing_at_none_and_twice_the_longest():
    replies = ["", "字" * 10, "字" * 20, "字" * 60, "字" * 90, "字" * 130]
    assert length_reward([""] * 6, replies, 20, 60) == pytest.approx([0, 0.5, 1, 1, 0.5, 0])
    function, module = reward_function(dict(reward="length", reward_length=[0, 1]))
    assert module is None
    assert function(["", ""], ["", "字"]) == [0, 1]


def test_own_function_is_found(own_rewards):
    function, _ = reward_function(dict(reward="own_rewards:starts"))
    assert checked("reward=own_rewards:starts", function(["", ""], ["好", "差"]), 2) == [1, 0]


def test_a_function_is_found_beside_the_user_and_by_its_path(tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "helpers_of_mine.py").write_text("OFFSET = 2\n")
    text = "from helpers_of_mine import OFFSET\ndef score(prompts, replies):\n    return [OFFSET for _ in replies]\n"
    for name in ("score_of_mine.py", "model.py"):  # the second has the name of a module of ours
        (folder / name).write_text(text)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("helpers_of_mine", "score_of_mine"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ConfigError, match="cannot import score_of_mine: No module named 'score_of_mine'"):
        reward_function(dict(reward="score_of_mine:score"))
    for path in (folder / "score_of_mine.py", folder / "model.py"):
        function, module = reward_function(dict(reward=f"{path}:score"))
        assert function([""], ["", ""]) == [2, 2]
        assert file_identity(function, module) == dict(path=str(path), sha256=file_sha256(path))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(folder)])
    assert reward_function(dict(reward="score_of_mine:score"))[0]([""], [""]) == [2]
    assert reward_function(dict(reward="score_of_mine.py:score"))[0]([""], [""]) == [2]
    assert Llama.__module__ == "model" and sys.modules["model"].Llama is Llama


def test_the_file_of_a_function_is_known_whatever_kind_it_is(own_rewards):
    import own_rewards as module

    path = module.__file__
    for function in (module.starts, partial(module.starts, replies=[]), SimpleNamespace(__call__=0)):
        assert file_identity(function, module)["path"] == path
    assert file_identity(*reward_function(dict(reward="length", reward_length=[1, 2]))) is None
    assert file_identity(*reward_function(dict(reward="sys:exc_info"))) is None


def test_what_a_users_code_raises_is_one_line(tmp_path):
    cases = dict(
        syntax="def score(:\n",
        raises="\n1 / 0\n",
        exits="import sys\nsys.exit(0)\n",
        imports="import no_such_package\n",
        base="class Odd(BaseException):\n    __str__ = None\nraise Odd\n",
        lazy="def __getattr__(name):\n    raise ValueError(name)\n",
        null="def score(prompts, replies):\n    return '\0'\n",
    )
    words = dict(
        syntax=r"SyntaxError: invalid syntax \(.*syntax.py:1\)",
        exits=r"SystemExit: 0 \(.*exits.py:2\)",
        raises=r"ZeroDivisionError: division by zero \(.*raises.py:2\)",
        imports="cannot import .*imports.py: No module named 'no_such_package'",
        base=r"Odd: its text cannot be made, TypeError \(.*base.py:3\)",
        lazy=r"ValueError: .* \(.*lazy.py:2\)",
        null="null.py:score: cannot import .*null.py: SyntaxError: .* null bytes$",
    )
    for name, text in cases.items():
        (tmp_path / f"{name}.py").write_text(text)
        with pytest.raises(ConfigError, match=words[name]):
            reward_function(dict(reward=f"{tmp_path / name}.py:score"))
    (tmp_path / "called.py").write_text("def score(prompts, replies, answer):\n    return [{}[a] for a in answer]\n")
    function, _ = reward_function(dict(reward=f"{tmp_path / 'called.py'}:score"))
    with pytest.raises(ConfigError, match=r"reward=mine raised KeyError: 'x' \(.*called.py:2\)"):
        call("reward=mine", function, [""], [""], dict(answer=["x"]))
    with pytest.raises(ConfigError, match=r"reward=mine raised GeneratorExit \(.*test_rewards.py"):
        call("reward=mine", lambda *_: (_ for _ in ()).throw(GeneratorExit), [""], [""], {})


def test_a_users_code_leaves_our_texts_and_torch_alone(tmp_path):
    (tmp_path / "greedy.py").write_text(
        "import torch\ntorch.set_grad_enabled(False)\n"
        "def score(prompts, replies, answer):\n"
        "    prompts[0] = None\n    replies.clear()\n    answer[0].clear()\n"
        "    torch.set_grad_enabled(False)\n    torch.set_default_dtype(torch.bfloat16)\n    return [1]\n"
        "score.__wrapped__ = score\n"
    )
    function, module = reward_function(dict(reward=f"{tmp_path / 'greedy.py'}:score"))
    assert torch.is_grad_enabled() and file_identity(function, module)["path"] == str(tmp_path / "greedy.py")
    prompts, replies, fields = ["p"], ["r"], dict(answer=[["x"]])
    assert call("reward=mine", function, prompts, replies, fields) == [1]
    assert (prompts, replies, fields) == (["p"], ["r"], dict(answer=[["x"]]))
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    "reward, words",
    [
        ("nowhere.py:f", "reward=nowhere.py:f: cannot import nowhere.py: there is no file nowhere.py"),
        ("sys:f", "reward=sys:f: sys has no function f"),
        ("modle", "reward=modle: model, length, module:function or path/to/file.py:function is needed"),
        ("own_rewards:", "reward=own_rewards:: model, length"),
        ("./own_rewards:f", "./own_rewards is no name of a module; a file is written path/to/file.py:function"),
        ("no_such_module:f", "reward=no_such_module:f: cannot import no_such_module: No module named"),
        ("own_rewards:ends", "own_rewards.py has no function ends"),
    ],
)
def test_a_missing_function_is_named(own_rewards, reward, words):
    with pytest.raises(ConfigError, match=words):
        reward_function(dict(reward=reward))


@pytest.mark.parametrize("bounds", [[20], [60, 20], [0, 0]])
def test_bounds_that_no_reply_meets_are_refused(bounds):
    with pytest.raises(ConfigError, match="reward_length=.*: the shortest and the longest reply"):
        reward_function(dict(reward="length", reward_length=bounds))


class Unnumbered:
    def __float__(self):
        return {}["number"]


@pytest.mark.parametrize(
    "rewards, words",
    [
        ([1.0], "reward=f returned 1 rewards for 2 replies"),
        ([1.0, math.nan], "reward=f returned nan for reply 1 of 2"),
        ([-math.inf, 0], "reward=f returned -inf for reply 0 of 2"),
        (None, "reward=f must return a list of numbers"),
        (["good", 1], "reward=f must return a list of numbers"),
        ([1e308, 0], "reward=f returned 1e.308 for reply 0 of 2: it must return finite numbers"),
        ([1, Unnumbered()], "reward=f must return a list of numbers: KeyError"),
    ],
)
def test_rewards_that_are_no_finite_numbers_are_refused(rewards, words):
    with pytest.raises(ConfigError, match=words):
        checked("reward=f", rewards, 2)


def test_score_kl_picture_is_drawn_from_what_there_is(tmp_path):
    log = MetricLog(tmp_path)
    log.write(0, {"val/score": 0.1, "val/kl": 0.0})
    plot_score_kl(log, "grpo")
    first = (tmp_path / "score_kl.png").read_bytes()
    log.write(1, {"grpo/score": 0.3, "grpo/kl": math.nan})
    plot_score_kl(log, "grpo")
    log.write(2, {"grpo/score": 0.5, "grpo/kl": 1.5})
    plot_score_kl(log, "grpo")
    assert first.startswith(b"\x89PNG") and (tmp_path / "score_kl.png").read_bytes() != first


# what runs of RL start from


def test_a_function_reads_the_texts_and_a_constant_one_is_not_scaled(small, capsys):
    ckpt = checkpoint.load(small / "sft")
    words, seen = Tokenizer(ckpt.tokenizer), []
    reward = Reward(dict(reward="length", reward_length=[2, 8], score_clip=0.0), ckpt, words, ENV)
    reward.function = lambda prompts, replies: seen.append((prompts, replies)) or [0.7] * len(replies)
    questions = [words.encode("写一条酒店好评。"), words.encode("你好")]
    batch = rollout(checkpoint.build_model(ckpt), questions, 6, eos_id=words.eos_id, seed=1)
    reward.normalise_on(batch)
    assert seen == [(["写一条酒店好评。", "你好"], [words.decode(reply) for reply in batch.replies])]
    assert reward.norm == [pytest.approx(0.7), 1.0]
    assert "the reward is 0.700 for every reply of the reference: scores are not scaled" in capsys.readouterr().out


def test_a_model_and_a_function_add_up_by_their_weight(small, own_rewards):
    ckpt = checkpoint.load(small / "sft")
    words, scores = Tokenizer(ckpt.tokenizer), {}
    base = dict(reward_model=small / "rm", rule_weight=2.5, micro_batch_size=2, compile=False)
    batch = rollout(checkpoint.build_model(ckpt), [words.encode("你好"), words.encode("书")], 5, seed=1)
    for name in ("model", "own_rewards:odd", "model+own_rewards:odd"):
        scores[name] = Reward(base | dict(reward=name), ckpt, words, ENV).raw(batch)
    expected = scores["model"] + 2.5 * scores["own_rewards:odd"]
    torch.testing.assert_close(scores["model+own_rewards:odd"], expected, rtol=0, atol=1e-6)  # one addition
    with pytest.raises(ConfigError, match="reward=model:odd: cannot import|reward=model:odd: .*has no function odd"):
        Reward(base | dict(reward="model+model:odd"), ckpt, words, ENV)


def reward_of(small, folder, change=lambda model: None, **shape):
    """A Reward whose model is like small's but for its shape, and what `change` does to it."""
    ckpt = checkpoint.load(small / "rm")
    model = Llama(ModelConfig(**ckpt.model_config | shape))
    change(model)
    facts = dict(stage="rm", step=1, tokens_seen=1, tokenizer=ckpt.tokenizer, config={})
    checkpoint.save(folder / "ckpt.pt", model=model, **facts)
    policy = checkpoint.load(small / "sft")
    config = dict(reward="model", reward_model=folder, micro_batch_size=2, compile=False)
    return Reward(config, policy, Tokenizer(policy.tokenizer), ENV), policy


def test_a_reward_model_that_cannot_read_all_tokens_is_refused(small, tmp_path):
    rows = checkpoint.load(small / "sft").model_config["vocab_size"]
    with pytest.raises(UserError, match=rf"may write {rows} different tokens, .* reads {rows - 3} of them only"):
        reward_of(small, tmp_path, vocab_size=rows - 3)
    assert reward_of(small, tmp_path, vocab_size=rows + 8)[0].context == 64


def test_checkpoints_that_write_more_tokens_than_the_first_reads_are_not_compared(tmp_path):
    def loaded(rows):
        return SimpleNamespace(ckpt=SimpleNamespace(path=f"{rows} rows", model_config=dict(vocab_size=rows)))

    for models, judge in (([448, 440], 440), ([440, 448], 448)):
        models = {str(rows): loaded(rows) for rows in models}
        with pytest.raises(UserError, match="448 rows may write 448 different tokens, 440 rows reads 440 of them only"):
            compare(models, tmp_path, {}, loaded(judge))


def test_a_reward_model_with_a_shorter_context_is_told(small, tmp_path, capsys):
    reward, _ = reward_of(small, tmp_path, max_seq_len=48)
    assert (
        reward.context == 48
        and "reads 48 tokens of 64: prompts and replies must be as short" in capsys.readouterr().out
    )


def test_scores_that_are_not_finite_are_refused_by_name(small, tmp_path):
    def swell(model):  # its weights are finite
        torch.nn.init.constant_(model.scalar.weight, 3e38)
        torch.nn.init.constant_(model.norm.weight, 3e38)

    reward, policy = reward_of(small, tmp_path, swell)
    batch = rollout(checkpoint.build_model(policy), [[5, 6], [7]], 4, seed=1)
    with pytest.raises(ConfigError, match=r"reward_model=.*ckpt.pt returned (nan|-?inf) for reply 0 of 2"):
        reward.raw(batch)


@pytest.mark.parametrize(
    "odd", ["12", b"12", {1: 0, 2: 0}, {1, 2}, ["1", "2"], [None, 1], [[1], 2], [object(), 1], 7, None]
)
def test_what_is_no_list_of_numbers_is_told_by_the_functions_name(odd):
    with pytest.raises(ConfigError, match="^reward=mine must return a list of numbers: TypeError: "):
        checked("reward=mine", odd, 2)

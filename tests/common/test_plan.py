"""The plan of common/plan.py: its floating-point operations against torch's count, its times, what it says."""

import pytest
import torch
from planning import SHAPE, config_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import pretrain
from common import plan
from common.config import ConfigError
from common.distributed import Env
from configs.sizes import sizes
from configs.tokenizer import config as train_defaults
from model import Llama, ModelConfig
from tokenizer import Tokenizer
from tokenizer.train import Corpus, train_bpe


def test_an_untied_output_is_counted_by_itself():
    tied, untied = (plan.count_parameters(ModelConfig(**SHAPE, tied=tied)) for tied in (True, False))
    assert untied == tied | dict(output=512 * 64)
    flops = [plan.flops_per_token(ModelConfig(**SHAPE, tied=tied), 64) for tied in (True, False)]
    assert flops[0] == flops[1]  # one of the two is looked up


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_that_torch_counts(tied):
    model, T = Llama(ModelConfig(**SHAPE, tied=tied)), 64
    ids = torch.randint(0, 512, (2, T + 1))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids[:, :-1], ids[:, 1:]).backward()
    causal = 12 * 3 * 64 * T / 2  # torch counts the half above the diagonal too
    vectors = 6 * sum(p.numel() for p in model.parameters() if p.dim() == 1)  # but no products of elements
    in_place = 2 * 64 * 512  # nor addmm_, by which the loss adds to the gradient of the projection
    expected = 2 * T * (plan.flops_per_token(model.config, T) + causal - vectors - in_place)
    assert counter.get_total_flops() == expected


def test_plan_needs_no_files_and_leaves_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pretrain.main(["--plan", "--max_steps=1000", "--grad_accumulation_steps=4"])
    text, traffic = capsys.readouterr().out, plan.traffic_per_token(ModelConfig(**sizes["tiny-llama2-58m"]), 32 * 512)
    assert list(tmp_path.iterdir()) == []
    assert "parameters: 58,479,616 (trunk 25,305,600, embedding 33,174,016; vocabulary 64,793" in text
    # 6 * 58,479,616 + 12 * 8 * 512 * 512 / 2
    assert "compute: 363.5 MFLOP a token" in text
    # 1000 * 32 * 4 * 512 tokens; 20 * 58,479,616 / 65,536 steps
    assert "tokens: 65,536,000 in 1,000 steps of 65,536" in text and "are 17,847 steps" in text
    # 363.46 MFLOP / (312 TFLOP/s * 0.7), to which traffic_per_token / (2.039 TB/s * 0.75) comes
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    on, rate, share, time, products, fits = next(row for row in rows if row[0] == "A100 80 GB")
    assert products == "600,890" and fits == "yes"
    rate = int(rate.replace(",", ""))
    assert rate == pytest.approx(1 / (1 / 600890 + traffic / (2.039e12 * 0.75)), rel=1e-4)
    assert share == f"{rate * 363.46e6 / 312e12:.0%} of 312 TFLOP/s" and time == plan.duration(65_536_000 / rate)


def test_traffic_grows_with_what_is_moved():
    """By hand for dim 64, 3 layers, 512 rows of vocabulary and 1,024 tokens."""
    expected = 14 * 512 + 512 * 64 * (12 + 54) / 1024 + plan.TRAFFIC * 3 * 64
    assert plan.traffic_per_token(ModelConfig(**SHAPE), 1024) == pytest.approx(expected)


def test_a_plan_with_recomputing_takes_less_memory_and_a_third_more_time():
    def row(text, name):
        return [cell.strip().replace(",", "") for cell in next(x for x in text.splitlines() if name in x).split("|")]

    plain, again = (plan.report(config_of(recompute=recompute)) for recompute in (False, True))
    for column in (2, 3):  # CPU, GPU
        kept, fewer = (float(row(text, "activations of a micro-batch")[column]) for text in (plain, again))
        assert fewer < kept / 3
    rates = [int(row(text, "A100 80 GB")[2]) for text in (plain, again)]
    assert rates[1] == pytest.approx(rates[0] * 3 / 4, abs=1)


def test_plan_asks_the_tokenizer_if_there_is_one(tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("酒店很好，房间干净\n" * 20, encoding="utf-8")
    options = train_defaults | dict(vocab_size=365, character_coverage=1.0)
    (tmp_path / "tokenizer").mkdir()
    config = config_of(tokenizer=str(tmp_path / "tokenizer"))
    assert plan.vocabulary(config)[0] == 64793  # a folder without one
    (tmp_path / "tokenizer" / "tokenizer.model").write_bytes(train_bpe(Corpus([str(corpus)], 1000), options))
    for path in (tmp_path / "tokenizer", tmp_path / "tokenizer" / "tokenizer.model"):
        config = config_of(tokenizer=str(path))
        assert plan.vocabulary(config) == (Tokenizer.load(path).vocab_size, str(path))
        assert f"embedding {512 * Tokenizer.load(path).vocab_size:,};" in plan.report(config)


def test_durations():
    assert [plan.duration(s) for s in (59.6, 150, 7200, 90000, 200000)] == [
        "60 seconds",
        "2.5 minutes",
        "2.0 hours",
        "25.0 hours",
        "2.3 days",
    ]


def test_measured_peak_is_a_rate_of_this_machine():
    assert 1e8 < plan.measured_peak(size=256, seconds=0.05) < 1e14


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(n_heads=7), "model: dim=512 is not a multiple of n_heads=7"),
        (dict(seq_len=1024), "seq_len=1024 exceeds model.max_seq_len=512"),
    ],
)
def test_what_cannot_be_trained_is_not_planned(changes, message):
    with pytest.raises(ConfigError, match=message):
        plan.report(config_of(**changes))


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_that_this_machine_cannot_hold_is_refused(monkeypatch, tied):
    shape, env = ModelConfig(**SHAPE, tied=tied), Env(0, 2, torch.device("cpu"))
    n = sum(plan.count_parameters(shape).values())
    sharded = dict(parallel="fsdp")  # and a copy in one piece
    for bytes_each, changes in ((16, {}), (12, dict(optimizer="muon")), (8 + 4, sharded)):
        config = dict(optimizer="adamw", parallel="ddp", batch_size=1, seq_len=1, recompute=False) | changes
        monkeypatch.setattr(plan, "machine_memory", lambda device, has=bytes_each * n: has)
        plan.check_fits(shape, config, env)
        monkeypatch.setattr(plan, "machine_memory", lambda device, has=bytes_each * n - 1: has)
        with pytest.raises(ConfigError, match=f"^model: {n:,} parameters need 0 GB .* and cpu has 0 GB: choose"):
            plan.check_fits(shape, config, env)


def test_a_batch_that_this_machine_cannot_hold_is_refused(monkeypatch):
    shape, env = ModelConfig(**SHAPE), Env(0, 1, torch.device("cpu"))
    config = dict(optimizer="adamw", parallel="ddp", batch_size=1000, seq_len=1000)
    for recompute in (False, True):
        needed = plan.activation_bytes(shape, 1_000_000, 4, False, recompute)
        monkeypatch.setattr(plan, "machine_memory", lambda device, has=needed: has)
        plan.check_fits(shape, config | dict(recompute=recompute), env)
        monkeypatch.setattr(plan, "machine_memory", lambda device, has=needed - 1: has)
        with pytest.raises(
            ConfigError, match="^batch_size=1000: 1,000,000 tokens at once need .* choose a smaller one"
        ):
            plan.check_fits(shape, config | dict(recompute=recompute), env)


def test_memory_of_this_machine():
    assert 1e8 < plan.machine_memory(torch.device("cpu"))


def test_utilisation_is_beside_the_measured_peak(monkeypatch):
    monkeypatch.setattr(plan, "measured_peak", lambda: 80e9)
    line = plan.utilisation(20e9, Env(0, 1, torch.device("cpu")))
    assert line == "20 GFLOP/s a process, 25.0% of the 80 of matrix products measured here"


@pytest.mark.parametrize(
    "name, share",
    [("NVIDIA H100 80GB HBM3", "10.1%"), ("NVIDIA H100 PCIe", "13.2%"), ("NVIDIA GeForce RTX 4090", "60.5%")],
)
def test_utilisation_of_a_known_gpu_is_beside_its_data_sheet(monkeypatch, name, share):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert share in plan.utilisation(100e12, Env(0, 1, torch.device("cuda")))


@pytest.mark.parametrize(
    "name",
    [
        "GeForce 256",
        "NVIDIA H100 NVL",
        "NVIDIA H200 NVL",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GB200",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    ],
)
def test_utilisation_of_an_unknown_gpu_says_so(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert f"the peak of {name} is not known" in plan.utilisation(1e12, Env(0, 1, torch.device("cuda")))

"""Where the rows of metrics.jsonl go as well: TensorBoard, SwanLab or Weights & Biases, imported only when asked for.

A logger has log(row) and close(). The two services read their own environment variables: keys, hosts, offline modes.
"""

import importlib
import uuid
from pathlib import Path

from common.config import ConfigError

PROJECT = "tiny-llama2-zh"  # under which the services file a run


def open_logger(config: dict, resume_step: int | None = None):
    """The logger of a run, to go on after resume_step or, without it, to start anew; None for logger=none."""
    module = logger_module(config)
    kinds = dict(tensorboard=TensorBoard, swanlab=SwanLab, wandb=WandB)
    return kinds[config["logger"]](module, config, resume_step) if module else None


def logger_module(config: dict):
    """The package behind the config's logger, None for logger=none; ConfigError if it is not there."""
    name = config["logger"]
    if name == "none":
        return None
    try:
        return importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError:
        raise ConfigError(f"logger={name}: its package is not installed: pip install {name}") from None


def numbers(row: dict) -> dict[str, float]:
    """What of a row can be drawn: all numbers but the step, which is where they are drawn."""
    return {name: value for name, value in row.items() if name != "step" and isinstance(value, int | float)}


class TensorBoard:
    """Event files in out/tensorboard. A resumed run adds one, which hides what the others hold after resume_step."""

    def __init__(self, module, config, resume_step):
        folder = Path(config["out"]) / "tensorboard"
        if resume_step is None:
            for file in folder.glob("events.out.tfevents.*"):
                file.unlink()
        purge_step = None if resume_step is None else resume_step + 1
        self.writer = module.SummaryWriter(folder, purge_step=purge_step, flush_secs=10)

    def log(self, row):
        for name, value in numbers(row).items():
            self.writer.add_scalar(name, value, row["step"])

    def close(self):
        self.writer.close()


class SwanLab:
    """An experiment of SwanLab, named after the run directory; resuming goes on with the same one."""

    def __init__(self, module, config, resume_step):
        out = Path(config["out"])
        settings = dict(project=PROJECT, experiment_name=str(out), config=config, logdir=str(out / "swanlab"))
        self.run = module.init(**settings, id=run_id(out, resume_step), resume="allow")

    def log(self, row):
        self.run.log(numbers(row), step=row["step"])

    def close(self):
        self.run.finish()


class WandB:
    """A run of Weights & Biases, named after the run directory; resuming goes on with the same one."""

    def __init__(self, module, config, resume_step):
        out = Path(config["out"])
        settings = dict(project=PROJECT, name=str(out), config=config, dir=str(out))
        self.run = module.init(**settings, id=run_id(out, resume_step), resume="allow")
        # its own step never goes back, as that of a run resumed from an older checkpoint does
        self.run.define_metric("*", step_metric="step")

    def log(self, row):
        self.run.log(numbers(row) | {"step": row["step"]})

    def close(self):
        self.run.finish()


def run_id(out: Path, resume_step: int | None) -> str:
    """The id a service knows the run by, kept in out/logger_id.txt; a new one for a run that starts anew."""
    file = out / "logger_id.txt"
    if resume_step is None or not file.exists():
        file.write_text(uuid.uuid4().hex[:21] + "\n")  # SwanLab once took 21 characters only
    return file.read_text().strip()

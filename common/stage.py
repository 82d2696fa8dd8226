"""What every training stage does around its loop: start or resume, save, report, stop cleanly, say how long it took."""

import functools
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from common import checkpoint, distributed, resume
from common.config import UserError
from common.files import save_config, unlock
from common.loggers import logger_module, open_logger
from common.metrics import FiniteGuard, MetricLog, NonFiniteError, plain, points
from common.optim import keep_decay, never_low
from common.progress import Progress, peak_memory_gb
from dataset.formats import load_meta


class Interrupt:
    """Inside it SIGINT and SIGTERM only set `requested`, so a loop can save and stop; a second Ctrl-C raises.

    Under torchrun a signal reaches the ranks at different steps: let them decide together, by
    `all_sum(interrupt.requested, env)`. `at_end(error)` is called before signals act again, error being None or what
    ended the block.
    """

    def __init__(self, at_end=lambda error: None):
        self.requested, self.at_end = False, at_end

    def __enter__(self) -> "Interrupt":
        self._previous = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self.at_end(error)
        finally:
            for number, handler in self._previous.items():
                signal.signal(number, handler)

    def exit(self, out) -> None:
        """Say how to go on and leave with the shell's code for an interrupted program."""
        print(f"stopped and saved; the same command with --resume goes on from {out}")
        raise SystemExit(130)

    def _handle(self, number, _frame) -> None:
        # SIGTERM is no second wish: torchrun follows a Ctrl-C with one
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        # os.write, because print is not safe to re-enter from a signal handler
        os.write(2, b"\nstopping after this step; press Ctrl-C again to stop at once\n")


class Stage:
    """One run of a training stage. The loop stays in the script; this keeps its run directory.

        stage = Stage("sft", config, PANELS)
        if stage.finished: return
        parent, tokenizer = stage.load_parent()
        stage.check_data("sft.pkl")
        ...
        stage.start(model, optimizer, tokenizer, parent)
        with stage.interrupt:
            for step in range(stage.first, config["max_steps"] + 1):
                if stage.due(step, "eval_interval"): stage.report(step, evaluate(...), samples)
                if stage.due(step, "save_interval"): stage.save(step)
                if stage.ends(step): break
                ...
                stage.log(step + 1, tokens, {"train/loss": loss})
        stage.close()

    A step's number is how many optimizer steps were done: metrics of the first update stand at step 1.
    """

    def __init__(self, name, config, panels):
        self.started = time.perf_counter()
        self.name, self.config, self.panels = name, config, panels
        self.env = distributed.setup(config["device"], config["dtype"], config["seed"])
        config["processes"] = self.env.world_size
        self.out = Path(config["out"])
        unsaved = config["overwrite"] and (self.out / resume.NEW).exists()  # then the old run would be resumed
        if distributed.restarted(self.env) and not unsaved:
            config.update(resume=True, overwrite=False)
        self.resumed = resume.begin(config, name)
        self.finished = self.resumed is not None and self.resumed.step >= config["max_steps"]
        if self.resumed and (line := keep_decay(config, self.resumed.step, self.resumed.config)) and self.env.is_main:
            print(line)
        self.folder = self.out if self.resumed else self.out / resume.NEW  # until the first save
        self.first = self.resumed.step if self.resumed else 0
        self.tokens_seen = self.resumed.tokens_seen if self.resumed else 0
        self.interrupt, self.guard = Interrupt(self._end), FiniteGuard()
        # The values of a CPU's tensors change while a thread writes, and a copy of them would add weights and optimizer
        # state to the peak memory; so there a save is waited for.
        self.background = checkpoint.Background() if self.env.device.type == "cuda" else None
        self.stopping = False  # whether a signal had come when this step was to be saved
        # what else the stage must keep for --resume, tensors and plain values by name; a resumed run finds it here
        self.extra = (self.resumed and self.resumed.training and self.resumed.training.get("extra")) or {}
        self.data, self.loop_seconds = None, 0.0
        if self.finished:
            if self.env.is_main:
                resume.still_finished(self.resumed, config)
                unlock(self.out)
                print(f"{self.out} is finished (step {self.first}): nothing to do")
            distributed.cleanup(self.env)

    def load_parent(self):
        """The checkpoint of init_from and its tokenizer, which must be the one that the data was made with."""
        parent = checkpoint.load(self.config["init_from"], training=False)
        checkpoint.refuse_quantized(parent)
        if parent.model_config["scalar_head"]:
            raise UserError(f"{parent.path} is a reward model (stage {parent.stage}): init_from wants a language model")
        steps = (parent.config or {}).get("max_steps", 0)
        if parent.path.name == "ckpt.pt" and parent.step < steps and self.env.is_main:
            print(f"note: {parent.path} is of step {parent.step} of {steps}: that run has not finished")
        if parent.stage == "pretrain" and self.name != "sft" and self.env.is_main:
            print(f"note: {parent.path} is a pretrained model that was never taught to answer; SFT teaches it")
        tokenizer, data = checkpoint.tokenizer_of(parent), Path(self.config["data"])
        checkpoint.check_data(tokenizer, parent.path, load_meta(data), data / "meta.json")
        return parent, tokenizer

    def check_data(self, *files):
        """Refuse files of `data`, before they are read, that are not what meta.json says or what was trained on."""
        data = self.config["data"]
        self.data = resume.hashes_of(data, files)
        if self.resumed:
            resume.same_data(self.resumed, data, self.data)
        if self.env.is_main and self.config["verify_data"]:
            resume.verify_data(data, self.data)
        elif self.env.is_main:
            print(f"verify_data=False: the files in {data} are taken to be what meta.json says")

    def start(self, model, optimizer, tokenizer, parent=None, trained=None):
        """Restore what is resumed and open the logs.

        parent is the Checkpoint that the stage starts from, whose weights are forgotten; trained holds all that the
        optimizer updates, where that is more than the model of the checkpoint (PPO's value model).
        """
        self.model, self.optimizer, self.tokenizer = model, optimizer, tokenizer
        # what rank 0 evaluates and saves: with FSDP a copy in one piece, made when due
        self.whole, self.whole_optimizer = model, optimizer
        self.trained = model if trained is None else trained
        self.parent = checkpoint.parent_of(parent) if parent else None
        if self.resumed:
            resume.same_file(self.resumed, self.resumed.parent, self.parent)
            checkpoint.restore(self.resumed, model, optimizer)
        for ckpt in filter(None, (parent, self.resumed)):
            ckpt.drop()
        logger_module(self.config)
        if self.env.is_main:
            if line := never_low(self.config):
                print(line)
            self.progress = Progress(self.config["max_steps"], self.first, self.name)
        self.tick = time.perf_counter()

    @functools.cached_property
    def metric_log(self):
        """The log of the run, opened when there is something to write."""
        if self.folder != self.out:
            resume.make_new(self.out)
        save_config(self.config, self.folder)
        if self.resumed:
            return MetricLog(self.folder, self.first, open_logger(self.config, self.first))
        return MetricLog(self.folder)

    @functools.cached_property
    def best(self):
        """The lowest validation loss so far, of those whose weights are kept."""
        if not (path := self.out / checkpoint.BEST_NAME).exists():
            return math.inf
        kept = checkpoint.load(path)
        measured = [key for key in self.config if key.startswith("eval_") and key != "eval_interval"]
        if any(kept.config.get(key) != self.config[key] for key in measured):
            return math.inf  # of other text, or less of it
        losses = dict(zip(*points(self.metric_log.read(), "val/loss"), strict=True))
        return losses.get(kept.step, min(losses.values(), default=math.inf))

    def _begin_anew(self):
        """At the first save: only now does this run take the place of what was there."""
        if self.background:
            self.background.wait()
        resume.commit(self.out)
        self.folder = self.metric_log.out_dir = self.out
        self.metric_log.logger = open_logger(self.config)
        for row in self.metric_log.read() if self.metric_log.logger else ():
            self.metric_log.logger.log(row)

    def _end(self, error):
        """After the loop, whatever ended it: a save may still be on its way."""
        try:
            if self.background:
                self.background.wait()
        except UserError as failed:
            if error is None:
                raise
            print(f"error: {failed}", file=sys.stderr)
        finally:
            if self.env.is_main:
                unlock(self.out)
        if isinstance(error, FloatingPointError | NonFiniteError) and not self.guard.stepped:
            if begun := self.resumed.path if self.resumed else self.parent and self.parent["path"]:
                raise NonFiniteError(f"{begun}, from which this run goes on: {error}") from None

    def due(self, step, interval):
        """Whether this process evaluates or saves at this step; a resumed run does not repeat its first."""
        saves = interval == "save_interval"
        if saves:  # a signal after this, to whichever process, stops the next step, else it went unsaved
            self.stopping = distributed.all_sum(self.interrupt.requested, self.env) > 0
        if self.resumed and step == self.first:
            return False
        due = (saves and self.stopping) or step == self.config["max_steps"] or step % self.config[interval] == 0
        if due and distributed.is_sharded(self.model):
            optimizer = self.optimizer if saves else None
            self.whole = self.whole_optimizer = None  # the copy that was evaluated, before there is another
            self.whole, self.whole_optimizer = distributed.gather(self.model, optimizer, self.env)
        return due and self.env.is_main

    def ends(self, step):
        """Whether the loop is over: the last step, or a stop asked for by a signal to any process."""
        self.finished = step == self.config["max_steps"]
        torch.manual_seed(distributed.step_seed(self.config["seed"], step, self.env))  # of the step's dropout
        if self.background:
            self.background.check()
        if distributed.is_sharded(self.model):
            self.whole = self.whole_optimizer = None  # its memory is needed again
        self.tick = time.perf_counter()
        return self.finished or self.stopping

    def validates_on_all(self, step):
        """As eval_all says: at the end, but always where best.pt is kept, as only losses on the same data compare."""
        return self.config["eval_all"] and (self.config["keep_best"] or step == self.config["max_steps"])

    def report(self, step, metrics, samples=()):
        """Validation metrics and samples [(prompt, reply)] to the log, the plot and the terminal."""
        if not self.guard.stepped and math.isnan(metrics.get("val/loss", 0)):
            raise NonFiniteError("the validation loss is nan: weights are too large, or training diverged")
        loss = plain(metrics.get("val/loss"))  # as the log has it, from which a resumed run takes the best
        if self.config.get("keep_best") and loss is not None and loss < self.best:
            self.best = loss
            self._write(checkpoint.BEST_NAME, step)
        self.metric_log.write(step, metrics)
        if samples:
            self.metric_log.samples(step, samples)
        self.metric_log.plot(self.panels)
        numbers = " ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        tqdm.write(f"step {step}: {numbers}")

    def save(self, step):
        """All that --resume needs."""
        if odd := checkpoint.not_finite(self.whole.state_dict()):
            kept = "the last good checkpoint is kept" if self.folder == self.out else "nothing is saved"
            raise NonFiniteError(f"step {step}: {odd} holds values that are not finite: {kept}")
        training = dict(optimizer=self.whole_optimizer, extra=self.extra or None, data=self.data)
        self._write(checkpoint.FILE_NAME, step, **training, keep_last=self.config["keep_last"])
        if self.folder != self.out:
            self._begin_anew()

    def _write(self, name, step, **training):
        checkpoint.save(
            self.folder / name,
            stage=self.name,
            step=step,
            tokens_seen=self.tokens_seen,
            model=self.whole,
            tokenizer=self.tokenizer.model_bytes,
            config=self.config,
            parent=self.parent,
            background=self.background,
            **training,
        )

    def clip_and_step(self, step, loss):
        """Clip the gradients, step unless something is not finite. Returns the gradient norm."""
        grad_norm = distributed.clip_gradients(self.trained.parameters(), self.config["grad_clip"])
        if self.guard.ok(step, loss, grad_norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm

    def log(self, step, tokens, metrics, shown=("train/loss",)):
        """Count the tokens of one optimizer step and, every log_interval steps, write its metrics."""
        self.tokens_seen += tokens
        self.loop_seconds += time.perf_counter() - self.tick
        if self.env.is_main:
            self.progress.update(step, tokens, **{name.split("/")[1]: metrics[name] for name in shown})
            if step % self.config["log_interval"] == 0:
                so_far = {"train/tokens": self.tokens_seen}
                if self.env.device.type == "cuda":  # a CPU's differs from run to run, and nothing else there does
                    so_far["train/memory_gb"] = peak_memory_gb(self.env.device)
                self.metric_log.write(step, metrics | so_far)

    def close(self):
        """Close the progress line and say what came out; exit code 130 where a signal stopped the run."""
        if self.env.is_main:
            self.progress.close()
            self.metric_log.close()
            total = time.perf_counter() - self.started
            share = f"{self.loop_seconds:.0f} s of {total:.0f} s ({self.loop_seconds / total:.1%})"
            print(f"training steps took {share}; peak memory {peak_memory_gb(self.env.device):.2f} GB")
        distributed.cleanup(self.env)
        if not self.finished:
            self.interrupt.exit(self.out)
        if self.env.is_main:
            print(f"finished {self.out / checkpoint.FILE_NAME}")

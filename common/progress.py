"""What a run tells people while it lasts: speed, time left, memory."""

import math
import re
import sys
import time
from collections import deque
from datetime import timedelta
from pathlib import Path

from tqdm import tqdm


class Progress:
    """Speed and time left: a tqdm bar on a terminal, else a plain line on stderr at most every 10 seconds."""

    def __init__(self, total: int, initial: int = 0, desc: str = "", counted: str = "tokens"):
        self.total, self.step, self.desc, self.counted = total, initial, desc, counted
        self.tokens = 0
        # Rates are taken over the last 100 updates, so that a pause for evaluation fades out.
        self.window = deque([(time.monotonic(), initial, 0)], maxlen=100)
        self.line, self.printed_at = "", -math.inf
        self.bar = None
        if sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=initial, desc=desc, unit="step", dynamic_ncols=True)

    def update(self, step: int, tokens: int, **shown: float) -> None:
        """`step` steps are done; `tokens`, or what else is counted, were processed since the last call; `shown` numbers
        go beside."""
        now = time.monotonic()
        self.tokens += tokens
        self.window.append((now, step, self.tokens))
        then, old_step, old_tokens = self.window[0]
        elapsed = max(now - then, 1e-9)
        speed = f"{(self.tokens - old_tokens) / elapsed:,.0f} {self.counted}/s"
        numbers = [f"{name} {value:.4g}" for name, value in shown.items()]
        if self.bar is not None:
            self.bar.set_postfix_str(", ".join([speed, *numbers]), refresh=False)
            self.bar.update(step - self.step)
        self.step = step
        steps_per_second = (step - old_step) / elapsed
        left = "?"
        if steps_per_second > 0:
            left = timedelta(seconds=round((self.total - step) / steps_per_second))
        self.line = f"{self.desc} {step}/{self.total} {', '.join([speed, f'ETA {left}', *numbers])}".strip()
        if self.bar is None and now - self.printed_at >= 10:
            self._print(now)

    def close(self) -> None:
        """Finish the bar, or print the last line if it was held back."""
        if self.bar is not None:
            self.bar.close()
        elif self.line:
            self._print(time.monotonic())

    def _print(self, now: float) -> None:
        print(self.line, file=sys.stderr, flush=True)
        self.line, self.printed_at = "", now


def peak_memory_gb(device=None) -> float:
    """The most that tensors of this process took of a CUDA device so far; else its largest resident memory.

    nan where the system does not tell (Windows).
    """
    if device is not None and device.type == "cuda":
        import torch  # not for data_process.py's many processes, which need none of it

        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")  # Linux; getrusage would count what the parent had before this began
    if status.exists() and (peak := re.search(r"VmHWM:\s*(\d+)", status.read_text())):
        return int(peak[1]) * 1024 / 1e9
    try:
        import resource
    except ImportError:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9

"""The one terminal line of a training step."""

import time


class Progress:
    """Prints step, figures, speed and the time left.

    Args:
        name: of the stage.
        total: steps of the whole training.
        done: steps that an earlier process did.
    """

    def __init__(self, name: str, total: int, done: int = 0):
        self.name, self.total, self.done = name, total, done
        self.started = self.last = time.perf_counter()

    def step(self, step: int, tokens: int, **figures: float) -> dict[str, float]:
        """Print the line of a finished step; returns its speed, for the metrics."""
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        left = (now - self.started) / (step - self.done) * (self.total - step)
        shown = "  ".join(f"{name} {value:.3f}" for name, value in figures.items())
        speed = tokens / seconds
        print(
            f"{self.name} step {step:{len(str(self.total))}d}/{self.total}  {shown}  {speed:.0f} tokens/s  "
            f"{clock(left)} left",
            flush=True,
        )
        return {"seconds": seconds, "tokens_per_second": speed}


def clock(seconds: float) -> str:
    """
    >>> clock(59.6), clock(3661)
    ('1:00', '1:01:01')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"

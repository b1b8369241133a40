"""The libraries' own words on the terminal."""

import logging
import warnings


def quiet() -> None:
    """Silence the progress bars and advice of the libraries; their errors and everything of ours still show."""
    # First, because bitsandbytes advises on an optional package while it is imported
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Their own deprecations between minors that we bound
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|trl")
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()

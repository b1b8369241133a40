"""Chat templates that write the date of the day: here it is always the same day.

Otherwise the same text has other tokens tomorrow, so a resumed run, a reference and a reward model read on another day
what nobody trained on.
"""

import json
import re
from datetime import datetime

from transformers import PreTrainedTokenizerBase

DAY = datetime(2024, 7, 26)  # what Llama 3's templates write themselves where there is no clock
CLOCK = "strftime_now"  # transformers' only one for templates
CODES = re.compile(r"%-?[aAbBcdDeFfGHIjmMpRSTuUVwWxXyY]")


def dated_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The tokenizer's chat template with the clock stopped at `DAY`; None where it asks for no date.

    A macro of the clock's name hides it: transformers passes no function on to a template, and has no option for this.
    """
    template = str(tokenizer.get_chat_template()) if tokenizer.chat_template is not None else ""
    return stopped(template) if CLOCK in template else None


def stopped(template: str) -> str:
    """
    >>> stopped("{{ strftime_now('%d %b') }}").splitlines()[0]
    '{% macro strftime_now(format) %}{{ format | replace("%b", "Jul") | replace("%d", "26") }}{% endmacro %}'
    """
    codes = sorted(set(CODES.findall(template)))
    written = "".join(f" | replace({json.dumps(code)}, {json.dumps(DAY.strftime(code))})" for code in codes)
    # The line break ends with the macro's own block, so that the template begins at the start of a line as before
    return f"{{% macro {CLOCK}(format) %}}{{{{ format{written} }}}}{{% endmacro %}}\n{template}"

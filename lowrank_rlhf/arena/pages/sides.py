"""Text of prompts and answers as HTML that cannot do anything: what a model or a person wrote never becomes markup.

Answers are CommonMark with tables. Raw HTML, links, images and references stay the characters they are, so a page
never fetches what an answer names and a reader sees the address that was written. Prompts are shown as written.

`gr.HTML` compiles only its `html_template`; a value is handed in as data, so `${…}` and `{{…}}` in it stay text. Its
page does translate the marker of gradio's own `gr.I18n` wherever a value has it: that marker is written as entities.
"""

from collections.abc import Sequence
from html import escape
from typing import Any, Literal

import gradio as gr
from markdown_it import MarkdownIt

from lowrank_rlhf.arena.votes.records import Message

LONGEST_MARKDOWN = 20_000  # characters; longer text is shown as written: parsing it at every token would be slow
State = Literal["waiting", "streaming", "done"]

_PARSER = (
    MarkdownIt("commonmark", {"html": False, "breaks": True})
    .enable(["table", "strikethrough"])
    .disable(["link", "image", "autolink", "reference", "html_inline", "html_block"])
)


def plain(text: str) -> str:
    """Text as it was written: escaped for an element or a quoted attribute.

    >>> plain("<b>${x}</b>")
    '&lt;b&gt;${x}&lt;/b&gt;'
    """
    return _unmarked(escape(text.replace("\0", "�")))


def markdown(text: str) -> str:
    """CommonMark as HTML; markup, links and images in it stay text.

    >>> markdown("**so** <i>it</i> is")
    '<p><strong>so</strong> &lt;i&gt;it&lt;/i&gt; is</p>\\n'
    >>> markdown("![a](http://x.y/z.png) [b](javascript:c)")
    '<p>![a](http://x.y/z.png) [b](javascript:c)</p>\\n'
    """
    if len(text) > LONGEST_MARKDOWN:
        return f'<pre class="plain">{plain(text)}</pre>'
    return _unmarked(_PARSER.render(text))


def answer(text: str, state: State = "done") -> str:
    """One answer; "streaming" adds a cursor, "waiting" says that nothing has come yet, and an empty answer says so."""
    if state == "waiting" or (state == "streaming" and not text.strip()):
        return '<div class="answer waiting streaming"><p></p></div>'
    if not text.strip():
        return '<div class="answer silent">(an empty answer)</div>'
    cursor = " streaming" if state == "streaming" else ""
    return f'<div class="answer{cursor}" dir="auto">{markdown(text)}</div>'


def turns(messages: Sequence[Message]) -> str:
    """A conversation so far, oldest turn first."""
    return "".join(map(_turn, messages))


def prompt(messages: Sequence[Message], system: str = "") -> str:
    """What is to be answered: a single question as it is, a conversation turn by turn, a system prompt above it."""
    above = _turn({"role": "system", "content": system}) if system else ""
    if len(messages) == 1 and not above:
        return f'<div class="prompt" dir="auto">{plain(messages[0]["content"])}</div>'
    return f'<div class="prompt">{above}{turns(messages)}</div>'


def side(letter: str, text: str, state: State = "done", *, name: str = "", foot: str = "", chosen: bool = False) -> str:
    """One of the answers of a comparison in its frame.

    Args:
        letter: "A", "B", ….
        name: of the speaker; "" while names are hidden.
        foot: one line below: tokens per second, the score of a reward model.
        chosen: draws the frame in the accent colour.
    """
    label = f'<span class="letter">{plain(letter)}</span>' + (
        f'<span class="name">{plain(name)}</span>' if name else ""
    )
    return (
        f'<div class="side{" chosen" if chosen else ""}"><div class="label">{label}</div>'
        f'{answer(text, state)}<div class="foot">{plain(foot)}</div></div>'
    )


def note(text: str, *, problem: bool = False) -> str:
    """A sentence to the reader in a box; one about something that went wrong is drawn in amber."""
    role = ' role="alert"' if problem else ""
    return f'<div class="note{" problem" if problem else ""}"{role}>{plain(text)}</div>' if text else ""


def empty(text: str) -> str:
    """What stands where there is nothing yet: what to do about it."""
    return f'<div class="empty">{plain(text)}</div>'


def text_box(value: str = "", *, live: bool = False, **options: Any) -> gr.HTML:
    """A `gr.HTML` for what this module writes; a `live` one keeps its end in view while it grows."""
    classes = ["flush", *options.pop("elem_classes", [])]
    return gr.HTML(value, apply_default_css=False, js_on_load=None, autoscroll=live, elem_classes=classes, **options)


def _turn(message: Message) -> str:
    role, content = message["role"], message["content"]
    if role == "assistant":
        return f'<div class="turn assistant">{answer(content)}</div>'
    return f'<div class="turn {plain(role)}" dir="auto">{plain(content)}</div>'


def _unmarked(html: str) -> str:
    return html.replace("__i18n__", "&#95;_i18n_&#95;")

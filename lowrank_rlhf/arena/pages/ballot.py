"""What a vote is made of, on any page: the choice, its strength, reasons and comment, and the keys for them.

A page that puts `HEAD` into its head has the keys; they press what has one of the classes below, so a page decides by
these what its keys do. Nothing is pressed that is hidden or disabled, nor while somebody types.
"""

from dataclasses import dataclass

import gradio as gr

from lowrank_rlhf.arena.seat import Details
from lowrank_rlhf.arena.votes.records import REASONS, STRENGTHS

CHOICES = {"a": "A is better", "b": "B is better", "tie": "Tie", "both_bad": "Both bad"}
STRENGTH_CLASS = "key-strength"  # on a Radio: Shift and a digit choose one of it
AGAIN_CLASS, NEXT_CLASS = "key-r", "key-n"

KEYS = """
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || event.repeat) return;
  const at = event.target;
  const types = at.closest?.("textarea, select, [contenteditable]:not([contenteditable=false])")
    || (at.tagName === "INPUT" && !["radio", "checkbox", "button"].includes(at.type));
  if (types) return;
  const press = (found) => {
    const open = [...found].find((e) => !e.disabled && e.getClientRects().length);
    if (!open) return;
    event.preventDefault();
    open.click();
  };
  const digit = /^(?:Digit|Numpad)([1-4])$/.exec(event.code)?.[1];
  if (digit && event.shiftKey) {
    for (const group of document.querySelectorAll(".key-strength")) {
      const radios = [...group.querySelectorAll("input[type=radio]")];
      if (group.getClientRects().length && radios.length >= digit) press([radios[digit - 1].closest("label")]);
    }
  } else if (digit) press(document.querySelectorAll(".key-" + digit));
  else if (!event.shiftKey && ["r", "n"].includes(event.key.toLowerCase()))
    press(document.querySelectorAll(".key-" + event.key.toLowerCase()));
});
"""

STYLE = """
.ballot-buttons { gap: 8px; }
button.key { white-space: nowrap; }
button.key::after { display: inline-block; margin-inline-start: .6em; min-width: 1.5em; border-radius: 4px;
  border: 1px solid currentColor; opacity: .55; font: .8em/1.5 var(--font-mono); text-align: center; }
button.key-1::after { content: "1"; } button.key-2::after { content: "2"; } button.key-3::after { content: "3"; }
button.key-4::after { content: "4"; } button.key-r::after { content: "r"; } button.key-n::after { content: "n"; }
@media (max-width: 640px) { button.key::after { display: none; } }
"""

HEAD = f"<style>{STYLE}</style><script>{KEYS}</script>"


@dataclass(frozen=True)
class DetailFields:
    """The optional part of a vote; `inputs` are what `details` reads, in its order."""

    strength: gr.Radio
    reasons: gr.CheckboxGroup
    comment: gr.Textbox

    @property
    def inputs(self) -> list[gr.Radio | gr.CheckboxGroup | gr.Textbox]:
        return [self.strength, self.reasons, self.comment]


def choice_buttons(page: str) -> dict[str, gr.Button]:
    """A button with a key for each choice between two answers; `page` begins their ids."""
    with gr.Row(elem_classes="ballot-buttons"):
        return {
            choice: gr.Button(
                label,
                variant="primary" if choice in ("a", "b") else "secondary",
                elem_id=f"{page}-{choice}",
                elem_classes=["key", f"key-{number}"],
                min_width=130,
            )
            for number, (choice, label) in enumerate(CHOICES.items(), start=1)
        }


def strength_field(page: str, *, visible: bool = True) -> gr.Radio:
    """How much better the chosen one is; none chosen is fine."""
    return gr.Radio(
        [(text, number) for number, text in STRENGTHS.items()],
        label="How much better? (optional; Shift and 1 to 4)",
        elem_id=f"{page}-strength",
        elem_classes=STRENGTH_CLASS,
        visible=visible,
    )


def reason_fields(page: str) -> tuple[gr.CheckboxGroup, gr.Textbox]:
    """Why, as ticks and as text."""
    reasons = gr.CheckboxGroup(list(REASONS), label="Because of", elem_id=f"{page}-reasons")
    comment = gr.Textbox(label="Comment", lines=1, max_lines=5, max_length=10_000, elem_id=f"{page}-comment")
    return reasons, comment


def details(strength: int | None, reasons: list[str] | None, comment: str | None) -> Details:
    """What the fields hold.

    >>> details(3, ["helpful"], None)
    Details(strength=3, reasons=('helpful',), comment='')
    """
    return Details(strength, tuple(reasons or ()), comment or "")

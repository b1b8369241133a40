"""How every page of the app looks: one theme, one style sheet, and nothing fetched from outside.

`mount_gradio_app` (or `launch`) takes THEME, CSS and HEAD; a Blocks does not. gradio writes every rule of CSS
twice, plain and under its own container; it drops `@supports` and splits selectors at commas, so neither `@supports`
nor `:is(a, b)` works here. Colours are gradio's variables, which change with its dark mode.
"""

import gradio as gr

# The system's own fonts: a name that is a plain string makes gradio load nothing.
SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Liberation Mono", "monospace")

THEME = gr.themes.Default(
    primary_hue="indigo", secondary_hue="indigo", neutral_hue="slate", radius_size="md", font=SANS, font_mono=MONO
).set(
    body_background_fill="*neutral_50",
    body_background_fill_dark="*neutral_950",
    block_shadow="none",
    block_shadow_dark="none",
    button_primary_background_fill="*primary_600",
    button_primary_background_fill_hover="*primary_700",
    button_primary_background_fill_dark="*primary_500",
    button_primary_background_fill_hover_dark="*primary_600",
    button_primary_text_color="white",
    button_primary_text_color_dark="white",
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_400",
)

HEAD = '<meta name="referrer" content="no-referrer"><meta name="color-scheme" content="light dark">'

# Blocks that several pages use. .answer, .turn and .side are written by sides.py.
CSS = """
.gradio-container { overflow-x: hidden; }
.answer, .turn, .prompt { overflow-wrap: anywhere; line-height: 1.55; color: var(--body-text-color); }
.turn { margin: 0 0 12px; }
.turn.user, .prompt { white-space: pre-wrap; }
.turn.user { margin-inline-start: 12%; padding: 8px 12px; border-radius: 12px 12px 2px 12px;
  background: var(--secondary-100); color: var(--neutral-900); }
.dark .turn.user { background: var(--secondary-900); color: var(--neutral-100); }
.turn.system { font-size: var(--text-sm); color: var(--body-text-color-subdued); white-space: pre-wrap;
  border-inline-start: 3px solid var(--border-color-primary); padding-inline-start: 10px; }
.prompt { padding: 12px 16px; border-radius: 10px; background: var(--background-fill-secondary);
  border: 1px solid var(--border-color-primary); max-height: 40vh; overflow-y: auto; }
.prompt .turn:last-child { margin-bottom: 0; }
.side { border: 1px solid var(--border-color-primary); border-radius: 10px; padding: 12px 16px;
  background: var(--background-fill-primary); min-height: 96px; box-sizing: border-box; }
.side .label { display: flex; align-items: baseline; gap: 8px; margin-bottom: 8px; font-weight: 600;
  color: var(--body-text-color); }
.side .label .name { overflow-wrap: anywhere; }
.side .foot { margin-top: 10px; font-size: var(--text-sm); color: var(--body-text-color-subdued);
  font-variant-numeric: tabular-nums; min-height: 1.4em; }
.side .turn.assistant:last-child { margin-bottom: 0; }
.side-column { gap: 4px; max-height: 70vh; overflow-y: auto; flex-wrap: nowrap !important; }
.side-column > * { flex: 0 0 auto; }
.side-column > .side-head { position: sticky; top: -12px; z-index: 2; padding: 4px 0; margin: -4px 0;
  background: var(--background-fill-primary); }
.side-head .label { margin: 0; }
.flush .html-container { padding: 0; }
.side-column .turn.user { margin-top: 4px; }
.side.chosen { border-color: var(--color-accent); box-shadow: 0 0 0 1px var(--color-accent); }
.letter { display: inline-block; min-width: 1.5em; padding: 0 .3em; text-align: center; border-radius: 6px;
  background: var(--color-accent); color: white; font-weight: 700; line-height: 1.5; box-sizing: border-box; }
.answer p, .answer ul, .answer ol, .answer pre, .answer table, .answer blockquote { margin: 0 0 .7em; }
.answer > :last-child { margin-bottom: 0; }
.answer h1, .answer h2, .answer h3, .answer h4, .answer h5, .answer h6 { font-size: 1.05em; font-weight: 700;
  margin: .9em 0 .4em; }
.answer > :first-child { margin-top: 0; }
.answer ul { list-style: disc; padding-inline-start: 1.5em; }
.answer ol { list-style: decimal; padding-inline-start: 1.6em; }
.answer li { margin: .15em 0; }
.answer code { font-family: var(--font-mono); font-size: .9em; background: var(--background-fill-secondary);
  padding: .1em .3em; border-radius: 4px; }
.answer pre { background: var(--background-fill-secondary); border: 1px solid var(--border-color-primary);
  border-radius: 8px; padding: 10px 12px; overflow-x: auto; overflow-wrap: normal; }
.answer pre code { background: none; padding: 0; white-space: pre; }
.answer pre.plain { white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; border: none; background: none;
  padding: 0; }
.answer blockquote { border-inline-start: 3px solid var(--border-color-primary); padding-inline-start: 12px;
  color: var(--body-text-color-subdued); }
.answer table { display: block; overflow-x: auto; border-collapse: collapse; width: max-content; max-width: 100%; }
.answer th, .answer td { border: 1px solid var(--border-color-primary); padding: 4px 8px; }
.answer strong { font-weight: 700; }
.answer em { font-style: italic; }
.answer hr { border: none; border-top: 1px solid var(--border-color-primary); margin: 1em 0; }
.answer.streaming > p:last-child::after, .answer.streaming > ol:last-child > li:last-child::after,
.answer.streaming > ul:last-child > li:last-child::after, .answer.streaming > pre:last-child > code::after {
  content: "▍"; color: var(--color-accent); animation: blink 1s steps(2) infinite; }
.answer.waiting, .muted { color: var(--body-text-color-subdued); }
.answer.silent { font-style: italic; color: var(--body-text-color-subdued); }
@keyframes blink { 50% { opacity: 0; } }
@media (prefers-reduced-motion: reduce) { .answer.streaming ::after { animation: none; } }
.sides { align-items: stretch; gap: 12px; }
.note { padding: 10px 14px; border-radius: 8px; border: 1px solid var(--border-color-primary); overflow-wrap: anywhere;
  background: var(--background-fill-secondary); color: var(--body-text-color); line-height: 1.5; }
.note.problem { border-color: #d97706; background: #fef3c7; color: #451a03; }
.dark .note.problem { border-color: #b45309; background: #3b2506; color: #fde68a; }
.empty { padding: 32px 16px; text-align: center; color: var(--body-text-color-subdued); line-height: 1.6; }
.message-line:not(:has(.note)) { display: none; }
.buttons { gap: 8px; }
.toolbar { align-items: end; }
.ranks .wrap { gap: 4px; }
.ranks .wrap label { padding: 4px 7px; }
.scroll-x { overflow-x: auto; max-width: 100%; }
kbd { font-family: var(--font-mono); font-size: .85em; padding: 0 .35em; border-radius: 4px;
  border: 1px solid var(--border-color-primary); background: var(--background-fill-secondary); }
@media (max-width: 640px) {
  .side { padding: 10px 12px; }
  .turn.user { margin-inline-start: 6%; }
  .main { padding-inline: 10px; }
}
"""

"""How the page looks: colours that read well in dark and in light, fonts that every system has, one style sheet."""

from __future__ import annotations

import gradio as gr

_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "Noto Sans CJK SC", "sans-serif")
_MONO_FONTS = ("ui-monospace", "SFMono-Regular", "Consolas", "monospace")

CSS = """
.gradio-container { width: 100%; min-width: 0 !important; max-width: min(1080px, 100vw) !important;
  margin: 0 auto !important; }
.gradio-container .fillable { min-width: 0; max-width: 100%; padding: 1rem clamp(.6rem, 3vw, 2rem) !important; }
#head h1 { font-size: 1.6rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
#head .what { font-size: 1.05rem; margin: .3rem 0 0; }
#head .learned { opacity: .75; font-size: .9rem; margin: .25rem 0 0; }
:root, .light { --color-accent: var(--primary-700); }
.dark { --color-accent: var(--primary-400); }
.note .html-container { padding: 0; }
.note p { margin: 0; padding: .6rem .8rem; border-left: 3px solid var(--color-accent); font-size: .92rem;
  background: var(--block-background-fill); }
.status, .hint { font-size: .88rem; opacity: .85; }
.status { min-height: 1.4em; margin-top: -.4rem; }
.hint p { margin: 0; }
.picture .image-frame img { width: 100%; height: 100%; object-fit: contain; }
.said textarea { font-size: 1.15rem; line-height: 1.5; }
#chat .image-frame img { max-height: 180px; width: auto; margin: 0; border-radius: var(--radius-sm); }
#chat .placeholder { padding: 0 1rem; text-align: center; }
#chat button[aria-label=Share] { display: none; }
#chat .example { border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg); }
#queries .grid-wrap { height: auto !important; max-height: none !important; min-height: 0 !important; }
#queries .caption-label { padding: 0 .35rem; font-size: .75rem; }
#queries .grid-container { padding-top: 0; }
table.answers { width: 100%; border-collapse: collapse; font-size: .98rem; margin: 0; }
table.answers th { text-align: left; font-weight: 600; font-size: .85rem; opacity: .75; }
table.answers, table.answers * { border: 0 !important; background: none; }
table.answers th, table.answers td { padding: .5rem .6rem .5rem 0; vertical-align: top; overflow-wrap: anywhere;
  border-bottom: 1px solid var(--border-color-primary) !important; }
table.answers .answer { font-weight: 600; }
table.answers .others { font-weight: 400; font-size: .88rem; opacity: .75; }
table.answers .sure { width: 6.5rem; white-space: nowrap; font-variant-numeric: tabular-nums; padding-right: 0; }
table.answers .bar { background: var(--border-color-primary); }
.bar { display: block; height: .3rem; margin-top: .3rem; border-radius: 9px; }
table.answers .bar i { display: block; height: 100%; border-radius: 9px; background: var(--color-accent); }
.about dl { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1rem; margin: 0; }
.about dt { opacity: .75; }
.about dd { margin: 0; overflow-wrap: anywhere; }
.about p { margin: .8rem 0 0; opacity: .75; font-size: .9rem; }
[data-testid=status-tracker]:has(.error) { display: none !important; }
footer .divider { display: none !important; }
button:focus-visible, [role=tab]:focus-visible, input:focus-visible { outline: 2px solid var(--color-accent) !important;
  outline-offset: 2px; }
@media (max-width: 640px) {
  #tabs .tab-container button { padding: .3rem .4rem; font-size: .92rem; }
  #queries .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)) !important; }
  #queries .thumbnail-item { min-width: 0; }
  #found .grid-container { grid-template-columns: repeat(2, minmax(0, 1fr)) !important; }
  table.answers thead { display: none; }
  table.answers tr { display: grid; grid-template-columns: 1fr 5.5rem;
    border-bottom: 1px solid var(--border-color-primary) !important; }
  table.answers td { border: 0 !important; }
  table.answers td:first-child { grid-column: 1 / -1; padding-bottom: 0; }
  #found { height: auto !important; max-height: 520px; }
  .picture { height: 280px !important; }
  .about dl { grid-template-columns: 1fr; gap: .1rem; }
  .about dd { margin-bottom: .5rem; }
}
"""


def make_theme() -> gr.themes.Base:
    """The look, with fonts that every system has: the library's own come from elsewhere."""
    return gr.themes.Soft(
        primary_hue="teal",
        neutral_hue="slate",
        radius_size="md",
        font=_FONTS,
        font_mono=_MONO_FONTS,
    ).set(  # the theme's own colours are too pale to read well
        background_fill_primary="*neutral_50",
        background_fill_secondary="*neutral_50",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
        block_title_text_color="*primary_700",
        block_label_text_color="*primary_700",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        checkbox_label_background_fill_selected="*primary_700",
        checkbox_label_background_fill_selected_dark="*primary_700",
        slider_color="*primary_600",
        slider_color_dark="*primary_500",
    )

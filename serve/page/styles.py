"""The page's style sheet: room for what is worked with, on a desk and on a phone."""

CSS = """
.gradio-container { width: 100%; min-width: 0 !important; max-width: min(1080px, 100vw) !important;
  margin: 0 auto !important; }
.gradio-container .fillable { min-width: 0; max-width: 100%; padding: .5rem clamp(.6rem, 3vw, 2rem) !important; }
.gradio-container .fillable > .column, .gradio-container main { gap: .5rem; }
#top { align-items: center; flex-wrap: nowrap; gap: .75rem; }
#head { min-width: 0; flex: 1 1 auto; overflow: hidden; }
#head .html-container { display: flex; align-items: baseline; gap: .9rem; }
#head .html-container > * { min-width: 0; max-width: 100%; }  /* else a long description lies under the chooser */
#head h1 { font-size: 1.25rem; line-height: 1.3; margin: 0; white-space: nowrap; overflow: hidden;
  text-overflow: ellipsis; font-weight: 650; flex: 0 1 auto; max-width: 100%; }
#head h1 { color: var(--color-accent); }
#head h1 .name { color: var(--body-text-color); }
#top:has(#adapter) .name { display: none; }  /* the chooser says it */
#head .what { font-size: .95rem; margin: 0; white-space: nowrap; overflow: hidden; text-overflow: ellipsis;
  min-width: 0; flex: 1 1 0; color: var(--block-info-text-color); }
#adapter { flex: 0 0 auto; width: 11rem; }
:root, .light { --color-accent: var(--primary-700); }
.dark { --color-accent: var(--primary-400); }
.note .html-container { padding: 0; }
.note p { margin: 0; padding: .6rem .8rem; border-left: 3px solid var(--color-accent); font-size: .92rem;
  background: var(--block-background-fill); }
.status, .hint { font-size: .88rem; color: var(--block-info-text-color); }
.status { min-height: 1.4em; margin-top: -.4rem; }
.hint p { margin: 0; }
.picture .image-frame img { width: 100%; height: 100%; object-fit: contain; }
.said textarea { font-size: 1.15rem; line-height: 1.5; }
#chat .image-frame img { max-height: 180px; width: auto; margin: 0; border-radius: var(--radius-sm); }
#chat .bot em:last-child, #thoughts .bot em:last-child { font-size: .85rem; font-style: normal;
  color: var(--body-text-color) !important; }
.typing { display: inline-flex; gap: .3rem; padding: .35rem .1rem; }
.typing i { width: .45rem; height: .45rem; border-radius: 50%; background: var(--block-info-text-color);
  animation: typing 1.2s infinite ease-in-out; }
.typing i:nth-child(2) { animation-delay: .2s; }
.typing i:nth-child(3) { animation-delay: .4s; }
@keyframes typing { 0%, 60%, 100% { opacity: .3; } 30% { opacity: 1; } }
@media (prefers-reduced-motion: reduce) { .typing i { animation: none; } }
.toast-wrap { top: .5rem !important; bottom: auto !important; pointer-events: none; max-width: min(26rem, 94vw); }
.toast-title-row .toast-title { font-size: 0 !important; }  /* it says "Error" whatever the title is */
.toast-body strong { display: block; }
.toast-wrap > * { pointer-events: auto; }
.or, .show-api, .max_value, .min_value, input.subdued { color: var(--block-info-text-color) !important; }
.examples button img { width: 5rem; height: 4rem; object-fit: cover; }
button { min-width: 24px; min-height: 24px; }
#chat .placeholder { padding: 0 1rem; text-align: center; }
#chat button[aria-label=Share] { display: none; }
#chat .example { border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg); }
#queries .grid-wrap { height: auto !important; max-height: none !important; min-height: 0 !important; }
#queries .caption-label { padding: 0 .35rem; font-size: .75rem; }
#queries .grid-container { padding-top: 0; }
/* room for what comes, so that nothing below it moves */
#answers { min-height: 8rem; }
#compared { min-height: 9rem; }
#found { min-height: 24rem; }
#found .thumbnail-item { aspect-ratio: auto; height: auto; display: flex; flex-direction: column; }
#found .thumbnail-item > img { aspect-ratio: 1; height: auto; min-height: 0; object-fit: contain; }
#found .caption-label { position: static; width: 100%; max-width: 100%; padding: .35rem .5rem; border: 0; margin: 0;
  white-space: normal; overflow-wrap: anywhere; text-overflow: clip; text-align: left; font-size: .88rem;
  line-height: 1.35; color: var(--body-text-color); background: var(--block-background-fill); }
#search-files .file-preview-holder { max-height: none; overflow: visible; }
table.answers { width: 100%; border-collapse: collapse; font-size: .98rem; margin: 0; }
table.answers th { text-align: left; font-weight: 600; font-size: .85rem; color: var(--block-info-text-color); }
table.answers, table.answers * { border: 0 !important; background: none; }
table.answers th, table.answers td { padding: .5rem .6rem .5rem 0; vertical-align: top; overflow-wrap: anywhere;
  border-bottom: 1px solid var(--border-color-primary) !important; }
table.answers .answer { font-weight: 600; }
table.answers .others { font-weight: 400; font-size: .88rem; color: var(--block-info-text-color); }
table.answers .sure { width: 6.5rem; white-space: nowrap; font-variant-numeric: tabular-nums; padding-right: 0; }
.bar { background: var(--border-color-primary); max-width: 100%; overflow: hidden; }
.bar { display: block; height: .3rem; margin-top: .3rem; border-radius: 9px; }
.bar i { display: block; height: 100%; border-radius: 9px; background: var(--color-accent); }
.compared { display: grid; grid-template-columns: 1fr 1fr; gap: .75rem; }
.compared section { background: var(--block-background-fill); padding: .8rem; border-radius: var(--radius-lg);
  overflow-wrap: anywhere; min-width: 0; }
.compared h3 { margin: 0; font-size: 1rem; }
.compared p { margin: .3rem 0 0; }
.compared .how, .compared .went { font-size: .85rem; color: var(--block-info-text-color); }
.compared .answer { font-size: 1.1rem; }
#votes { flex-wrap: wrap; gap: .5rem; }
#votes button { flex: 1 1 8rem; min-width: 8rem; }
table.batch .small { width: 5rem; }
table.batch img { max-width: 72px; max-height: 72px; border-radius: var(--radius-sm); }
.curve { margin: .5rem 0; }
.curve svg { width: 100%; height: auto; max-height: 260px; background: var(--block-background-fill); }
.curve polyline { fill: none; stroke: var(--color-accent); stroke-width: 1.5; vector-effect: non-scaling-stroke; }
.curve .val { stroke-width: 4; }
.curve figcaption { font-size: .88rem; color: var(--block-info-text-color); }
.about dl { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1rem; margin: 0; }
.about dt { color: var(--block-info-text-color); }
.about dd { margin: 0; overflow-wrap: anywhere; }
.about p { margin: .8rem 0 0; color: var(--block-info-text-color); font-size: .9rem; }
[data-testid=status-tracker]:has(.error) { display: none !important; }
footer .divider { display: none !important; }
#chat-box textarea:focus-visible, #chat-box .full-container:focus-within {
  outline: 2px solid var(--color-accent) !important; outline-offset: 2px; }
button:focus-visible, [role=tab]:focus-visible, input:focus-visible { outline: 2px solid var(--color-accent) !important;
  outline-offset: 2px; }
@media (max-width: 640px) {
  .gradio-container .fillable { padding: .25rem .6rem !important; }
  textarea, input, select { font-size: 16px !important; }
  #head .what { display: none; }
  #adapter { width: 9rem; }
  #chat { height: max(12rem, calc(100dvh - 17rem)) !important; }
  #search-like { height: 150px !important; }
  #tabs .tab-container button { padding: .3rem .4rem; font-size: .92rem; }
  #queries .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)) !important; }
  #queries .thumbnail-item { min-width: 0; }
  #found .grid-container { grid-template-columns: repeat(2, minmax(0, 1fr)) !important; }
  table.answers thead { display: none; }
  table.answers tr { display: grid; grid-template-columns: 1fr 5.5rem;
    border-bottom: 1px solid var(--border-color-primary) !important; }
  table.answers td { border: 0 !important; }
  table.answers td:first-child { grid-column: 1 / -1; padding-bottom: 0; }
  #answers { min-height: 19rem; }
  #compared { min-height: 12rem; }
  .picture { height: 190px !important; }
  .about dl { grid-template-columns: 1fr; gap: .1rem; }
  .about dd { margin-bottom: .5rem; }
}
"""

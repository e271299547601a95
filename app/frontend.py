"""What Gradio's own parts cannot do: style, and the few lines of JavaScript, in one place.

Words of strangers (names in adapters' headers) are only ever put into the page as text: `gr.HTML`'s templates are
evaluated after they are filled in, so nothing but what is written here goes through them.
"""

from __future__ import annotations

# Around what Gradio's `css` reaches, which is the page's content alone.
PAGE_CSS = """
.gradio-container {width: 100% !important; max-width: 1180px !important; margin: auto !important}
.gradio-container > .main {padding: 12px 20px !important}
.dark {--color-accent: var(--primary-400) !important}
footer {display: none !important}
@media (max-width: 720px) {.gradio-container > .main {padding: 4px 10px !important}}
@media (prefers-reduced-motion: reduce) {
  *, *::before, *::after {transition: none !important; animation: none !important}
}
"""

CSS = """
#masthead {padding: 4px 2px 0 !important}
#masthead .html-container {padding: 0}
#masthead h1 {font-size: 1.5rem; margin: 0}
#masthead p {margin: 0; color: var(--body-text-color-subdued)}
.beside {align-self: flex-end; height: 44px}
:is(button, input, textarea, select, a, [role=tab], [role=slider], [tabindex]):focus-visible,
.tile:has(:focus-visible) {outline: 3px solid var(--color-accent) !important; outline-offset: 2px}

/* Adapters as pictures: a strip, or a wall. */
.tiles {border: 0; margin: 0; padding: 0; min-width: 0}
.tiles legend {font-size: var(--block-label-text-size); color: var(--body-text-color); padding: 0 0 4px}
.tiles .all {display: flex; gap: 8px; overflow-x: auto; padding: 4px; scroll-snap-type: x proximity}
.tiles.wall .all {flex-wrap: wrap; overflow: hidden auto; max-height: 520px}
.tile {flex: none; width: 96px; cursor: pointer; border-radius: 8px; border: 2px solid transparent; padding: 3px;
  background: var(--background-fill-secondary); position: relative; scroll-snap-align: start}
.tiles.wall .tile {width: 128px}
.tile:has(input:checked) {border-color: var(--primary-600)}
.dark .tile:has(input:checked) {border-color: var(--primary-300)}
.tile input {position: absolute; opacity: 0; inset: 0; width: 100%; height: 100%; margin: 0; cursor: pointer}
.tile img, .tile .blank {display: block; width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 5px}
.tile .blank {background: var(--neutral-200)}
.dark .tile .blank {background: var(--neutral-700)}
.tile span {display: block; font-size: 12px; line-height: 1.3; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; color: var(--body-text-color)}
.tiles.wall .tile span {white-space: normal}
.tiles .none {color: var(--body-text-color-subdued); padding: 8px 2px; margin: 0}

/* Generate: the picture beside what was asked for; on a phone between that and the settings. */
#stage {display: grid !important; grid-template-columns: minmax(0, 5fr) minmax(0, 6fr); align-items: start;
  grid-template-areas: "ask frame" "rest frame"; grid-template-rows: auto 1fr}
#ask {grid-area: ask} #frame {grid-area: frame} #rest {grid-area: rest}
#canvas {position: relative; aspect-ratio: 1; flex: none !important}
#canvas:has(.thumbnail-item:nth-of-type(5)) {aspect-ratio: auto}
#results {height: 100% !important; max-height: none !important}
#results .grid-wrap {height: auto !important; max-height: none !important; overflow: visible}
#results .grid-container:not(:has(> :nth-child(2))) {grid-template-columns: minmax(0, 1fr) !important}
#preview {position: absolute !important; inset: 0; z-index: 2; margin: 0; pointer-events: none}
#preview:not(:has(img)) {display: none}
#preview img {width: 100%; height: 100%; object-fit: contain}
#canvas:has(#results img) #preview {inset: auto 10px 10px auto; width: 34%; height: 34%}
#tokens, #status, #compare-status, #exported {padding: 0 2px !important; margin-top: -10px}
:is(#tokens, #status, #compare-status, #exported, .bare) .html-container {padding: 0}
.line {min-height: 1.6em; font-size: 0.95rem; color: var(--body-text-color); overflow-wrap: anywhere}
.line.small {font-size: 0.8rem; min-height: 1.3em; color: var(--body-text-color-subdued)}
.line.warns, .line.warns.small {color: #b42318}
.dark .line.warns, .dark .line.warns.small {color: #fda29b}
.photos {display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 8px}
.photos label {display: flex; gap: 8px; align-items: center}
.photos img {width: 56px; height: 56px; object-fit: cover; border-radius: 5px}
.photos input {flex: 1; min-width: 0; padding: 8px; border-radius: 6px; border: 1px solid var(--input-border-color);
  background: var(--input-background-fill); color: var(--body-text-color)}
.photos input::placeholder {color: var(--input-placeholder-color); opacity: 1}
.menu span {display: block; font-size: var(--block-label-text-size); padding-bottom: 4px}
.menu select {width: 100%; padding: 9px; border-radius: 6px; border: 1px solid var(--input-border-color);
  background: var(--input-background-fill); color: var(--body-text-color)}
#sheet .icon-button-wrapper {top: auto !important; bottom: 6px !important}
:is(#about, #image-settings) thead {display: none}
:is(#about, #image-settings) :is(table, tbody, tr) {border: 0 !important}
:is(#about, #image-settings) table {width: 100%}
:is(#about, #image-settings) td {border: 0 !important; border-top: 1px solid var(--border-color-primary) !important;
  padding: 5px 4px !important}
:is(#about, #image-settings) td:first-child {color: var(--body-text-color-subdued); white-space: nowrap; width: 1%}
:is(#restore, #upload) .icon-wrap {display: none}
#others {align-self: flex-end}
:is(#about, #training) h2 {font-size: 1.15rem; margin: 0 0 8px}
.dark .download-link {color: var(--primary-300) !important}
/* A button within a button, which no screen reader can name: the cross beside it lets go of the photos. */
.icon-button:has(.upload-container) {display: none !important}
#stage.dropping #restore {outline: 3px dashed var(--primary-500)}

@media (max-width: 720px) {
  #masthead h1 {font-size: 1.2rem}
  #masthead p {font-size: 0.85rem}
  .tab-container button {padding: 0 6px !important; font-size: 13px !important}
  #stage {grid-template-columns: minmax(0, 1fr); grid-template-areas: "ask" "frame" "rest";
    grid-template-rows: none}
  .tile {width: 76px}
  .tiles.wall .all {flex-wrap: nowrap; overflow: auto hidden}
  .tiles.wall .tile {width: 104px}
}
"""

TILES_TEMPLATE = (
    '<fieldset class="tiles"><legend></legend><div class="all"></div><p class="none" hidden></p></fieldset>'
)

# Native radio buttons or checkboxes, so that keys and screen readers work as everywhere.
TILES_JS = """
const all = element.querySelector('.all'), nothing = element.querySelector('.none');
const kind = MANY ? 'checkbox' : 'radio', group = 'tiles-' + Math.random().toString(36).slice(2);
element.querySelector('legend').textContent = LABEL;
element.querySelector('fieldset').className = 'tiles ' + LOOK;
nothing.textContent = 'Nothing found.';
const chosen = () => MANY ? (props.value || []) : [props.value];
// What is gone from the library is let go of; the wall keeps what a search only hides.
function drop() {
  const there = new Set((props.choices || []).map(choice => choice.id));
  const kept = chosen().filter(id => !id || there.has(id));
  if (LOOK === 'wall' || kept.length === chosen().length) return;
  props.value = MANY ? kept : '';
  trigger('input');
}
function mark() {
  for (const input of all.querySelectorAll('input')) input.checked = chosen().includes(input.value);
}
function show() {
  all.replaceChildren(...(props.choices || []).map(choice => {
    const tile = document.createElement('label'), input = document.createElement('input');
    tile.className = 'tile';
    tile.title = choice.note || choice.label;
    Object.assign(input, {type: kind, name: group, value: choice.id});
    const picture = document.createElement(choice.picture ? 'img' : 'div');
    if (choice.picture) Object.assign(picture, {src: choice.picture, alt: ''});
    else picture.className = 'blank';
    const words = document.createElement('span');
    words.textContent = choice.label;
    tile.append(input, picture, words);
    return tile;
  }));
  nothing.hidden = all.childElementCount > 0;
  drop();
  mark();
}
all.addEventListener('change', () => {
  const now = [...all.querySelectorAll('input:checked')].map(input => input.value);
  props.value = MANY ? now : now[0];
  trigger('input');
});
watch('choices', show);
watch('value', mark);
show();
"""

MENU_TEMPLATE = '<label class="menu"><span></span><select></select></label>'

# The browser's own list: it closes when it is left, takes no free text, and fills a phone's screen.
MENU_JS = """
const list = element.querySelector('select');
element.querySelector('span').textContent = LABEL;
let before = null;
function show() {
  const now = JSON.stringify(props.choices), option = choice => new Option(choice.label ?? choice, choice.id ?? choice);
  if (now !== before) list.replaceChildren(...(props.choices || []).map(option));  // else an open list would close
  before = now;
  list.value = props.value;
}
list.addEventListener('change', () => {
  props.value = list.value;
  trigger('input');
});
watch('choices', show);
watch('value', () => {list.value = props.value;});
show();
"""

PHOTOS_TEMPLATE = '<div class="photos"></div>'

# A row for each photo: what it looks like, and a field for words of its own. Its value is the list of words.
PHOTOS_JS = """
const all = element.querySelector('.photos');
function show() {
  const before = new Map([...all.children].map(row => [row.dataset.name, row.querySelector('input').value]));
  all.replaceChildren(...(props.choices || []).map((photo, number) => {
    const row = document.createElement('label'), picture = document.createElement('img');
    const words = document.createElement('input');
    row.dataset.name = photo.name;
    Object.assign(picture, {src: photo.picture, alt: ''});
    Object.assign(words, {type: 'text', maxLength: LENGTH, placeholder: 'on a beach',
                          ariaLabel: `What else photo ${number + 1} shows`, value: before.get(photo.name) || ''});
    row.append(picture, words);
    return row;
  }));
  keep();
}
function keep() {props.value = [...all.querySelectorAll('input')].map(input => input.value);}
all.addEventListener('input', keep);
watch('choices', show);
show();
"""

# What was proposed for the words that stood there, unless others have been typed since: words of the proposal before
# this one, which came meanwhile, are none of those.
UNLESS_TYPED = """([before, after], now) => {
  if (now !== before && now !== window.s2ft.proposed) return now;
  window.s2ft.proposed = after;
  return after;
}"""

LINE_TEMPLATE = '<div class="line" role="status"></div>'

# One line of text; what begins with "!" is a warning.
LINE_JS = """
const line = element.querySelector('.line');
function show() {
  const text = props.value || '';
  line.textContent = text.replace(/^!/, '');
  line.className = 'line ' + LOOK + (/^(!|failed)/.test(text) ? ' warns' : '');
}
watch('value', show);
show();
"""

# The page's state in its address, and pictures dropped on the Generate tab.
HEAD_JS = """
window.s2ft = {
  proposed: null,  // the last words that took the place of others
  revealed: 0,  // how often, for who waits for it
  reveal(selector) {  // on a narrow page what was asked for may be above or below what is seen
    if (innerWidth > 720) return;
    setTimeout(() => {
      const behavior = matchMedia('(prefers-reduced-motion: reduce)').matches ? 'instant' : 'smooth';
      document.querySelector(selector)?.scrollIntoView({block: 'nearest', behavior});
      this.revealed++;
    }, 100);
  },
  picked: false,  // whether somebody chose the picture that stands large in the history
  closeUnpicked() {  // a gallery that was emptied shows the next list's first picture large, whatever it is told
    if (!this.picked) document.querySelector('#history .preview [aria-label="Close"]')?.click();
  },
  press(selector) {  // once the button's file is there
    setTimeout(() => document.querySelector(selector)?.closest('a, button')?.click(), 200);
  },
  begin(go, line, status) {  // the line and the two buttons: as they are, where the first is off
    const same = {__type__: 'update'};
    if (document.querySelector(go)?.disabled !== false) return [status, same, same];
    this.reveal(line);
    return ['queued', {...same, interactive: false}, {...same, interactive: true}];
  },
  start(random, seed, status) {
    const begun = this.begin('#generate', '#status', status), drawn = Math.floor(Math.random() * 2 ** 32);
    return [random && begun[1].interactive === false ? drawn : seed, ...begun];
  },
  able(stop, can) {  // whether a button may be on: not while what it began goes on
    const same = {__type__: 'update'};
    return document.querySelector(stop)?.disabled === false ? same : {...same, interactive: can};
  },
  write(changes, push) {
    const address = new URL(location);
    for (const [name, value] of Object.entries(changes))
      value === null ? address.searchParams.delete(name) : address.searchParams.set(name, value);
    if (address.href !== location.href) history[push ? 'pushState' : 'replaceState']({}, '', address);
  },
  tab(name) {
    if (!this.ready) return;  // until what the address says has been read
    const now = new URL(location).searchParams.get('tab') || 'generate';
    if (now !== name) this.write({tab: name}, true);
  },
  wanted(tabs) {
    const name = new URL(location).searchParams.get('tab');
    return {__type__: 'update', selected: tabs.includes(name) ? name : 'generate'};
  },
  remember(defaults, values, random) {
    if (!this.ready) return;
    clearTimeout(this.later);
    this.later = setTimeout(() => {
      const changes = {};
      for (const [name, value] of Object.entries(values))
        changes[name] = [null, ''].includes(value) || `${value}` === `${defaults[name]}` ? null : `${value}`;
      // Without one, a link has the prompt of its adapter.
      if (changes.adapter || (values.prompt === '' && defaults.prompt)) changes.prompt = values.prompt;
      changes.seed = random || !(Number.isInteger(values.seed) && values.seed >= 0) ? null : String(values.seed);
      this.write(changes, false);
    }, 300);
  },
};
// What Gradio's parts say to screen readers, put right: names that roles cannot have, or that are not what is seen.
function mend() {
  const each = (selector, act) => document.querySelectorAll(selector).forEach(act);
  each('.empty[aria-label]:not([role])', part => part.setAttribute('role', 'img'));
  each('button[aria-dropeffect]', part => {
    part.removeAttribute('aria-label');
    part.removeAttribute('aria-dropeffect');
  });
  each('.thumbnail-item:has(.caption-label)', part => {
    part.removeAttribute('aria-label');
    part.querySelector('img')?.setAttribute('alt', '');
  });
  each('#sheet button:has(img):not([aria-label])', part => part.setAttribute('aria-label', 'The sheet'));
  each('svg .role-mark:not([aria-hidden])', part => part.setAttribute('aria-hidden', 'true'));
}
new MutationObserver(() => {
  mend();
  if (!document.querySelector('#history .thumbnail-item')) s2ft.picked = false;  // nothing is left to choose
}).observe(document, {childList: true, subtree: true});
addEventListener('click', event => {
  if (event.target.closest?.('#history :is(.thumbnail-item, .preview)')) s2ft.picked = true;
}, true);
addEventListener('popstate', () => document.querySelector('#go-back')?.click());
for (const name of ['dragover', 'dragleave', 'drop'])
  addEventListener(name, event => {
    const stage = document.querySelector('#stage');
    const file = event.dataTransfer?.items?.[0]?.kind === 'file' || event.dataTransfer?.files?.length;
    if (!stage || !stage.contains(event.target) || !file || event.target.closest('#restore')) return;
    event.preventDefault();
    stage.classList.toggle('dropping', name === 'dragover');
    if (name !== 'drop') return;
    const input = document.querySelector('#restore input[type=file]');
    if (!input) return;
    input.files = event.dataTransfer.files;
    input.dispatchEvent(new Event('change', {bubbles: true}));
  }, true);
"""

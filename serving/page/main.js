// Pages, theme and keys.

import { getJSON, load } from './api.js';
import * as chat from './chat.js';
import { $, composing } from './dom.js';
import * as runs from './runs.js';
import * as settings from './settings.js';
import { hide } from './tokens.js';
import * as tree from './tree.js';

const PAGES = ['chat', 'runs', 'tree'];
const THEMES = { auto: '跟随系统', light: '浅色', dark: '深色' };

let loaded = '';

function loadChosen() {
  const model = $('model').value;
  if (model && model !== loaded) load(model);
  loaded = model;
}

async function refresh() {
  settings.showModels((await getJSON('/v1/models')).data);
  loadChosen();
}

const failed = (id) => (error) => $(id).replaceChildren(error.message);

function open(page, focus = true) {
  hide();
  for (const each of PAGES) {
    const tab = $(`tab-${each}`);
    tab.ariaSelected = String(each === page);
    tab.tabIndex = each === page ? 0 : -1;
    $(each).hidden = each !== page;
  }
  if (focus) $(`tab-${page}`).focus();
  if (page === 'chat') refresh().catch((error) => { $('status').textContent = error.message; });
  if (page === 'runs') runs.show().catch(failed('runs'));
  if (page === 'tree') tree.show(choose).catch(failed('tree'));
}

async function choose(id) {
  await refresh();
  $('model').value = id;
  $('settings').dispatchEvent(new Event('input'));
  loadChosen();
  open('chat');
  $('question').focus();
}

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  $('theme').textContent = THEMES[name];
  localStorage.setItem('theme', name);
}

document.addEventListener('keydown', (event) => {
  const closes = composing(event) || document.querySelector('dialog[open]'); // Escape is for that
  if (event.key === 'Escape' && !closes && chat.running()) chat.stop();
  if (!event.altKey || event.ctrlKey || event.metaKey) return;
  const digit = Number(event.code.replace('Digit', ''));
  const actions = { KeyR: chat.again, KeyN: chat.fresh };
  if (digit >= 1 && digit <= PAGES.length) open(PAGES[digit - 1]);
  else if (actions[event.code]) actions[event.code]();
  else return;
  event.preventDefault();
});

for (const [i, page] of PAGES.entries()) {
  $(`tab-${page}`).onclick = () => open(page);
  $(`tab-${page}`).onkeydown = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: PAGES.length - 1 }[event.key];
    if (step) open(PAGES[(i + step) % PAGES.length]);
  };
}
$('model').onchange = loadChosen;
$('theme').onclick = () => {
  const names = Object.keys(THEMES);
  setTheme(names[(names.indexOf(document.documentElement.dataset.theme) + 1) % names.length]);
};
setTheme(localStorage.getItem('theme') in THEMES ? localStorage.getItem('theme') : 'auto');
addEventListener('scroll', hide, { capture: true, passive: true });

try {
  const facts = await getJSON('/api/settings');
  settings.start(facts);
  await refresh();
  chat.start(facts.limits);
  document.body.dataset.ready = 'true';
} catch (error) {
  $('status').textContent = error.message;
}

// A reply's text as spans that tell, under the pointer or by the arrow keys, how likely each token was.

import { $, make, percent } from './dom.js';

const facts = new WeakMap(); // span: its tokens

const visible = (text) => text.replaceAll(' ', '␣').replaceAll('\n', '⏎').replaceAll('\t', '⇥') || '∅';
const classOf = (logprob) => {
  const p = Math.exp(logprob);
  return p >= 0.8 ? 'p4' : p >= 0.4 ? 'p3' : p >= 0.15 ? 'p2' : p >= 0.03 ? 'p1' : 'p0';
};

/** The span of a piece of text and the tokens it is made of, as the server streams them. */
export function span(text, tokens) {
  const least = Math.min(...tokens.map((token) => token.logprob));
  const element = make('span', { className: `token ${classOf(least)}` }, text);
  facts.set(element, tokens);
  return element;
}

function show(element) {
  const tip = $('tip');
  document.querySelector('.token.shown')?.classList.remove('shown');
  element.classList.add('shown');
  const rows = [];
  for (const token of facts.get(element)) {
    rows.push(make('p', {}, `“${visible(token.token)}” 的概率 `, make('b', {}, percent(token.logprob))));
    for (const other of token.top_logprobs) {
      const bar = make('i');
      bar.style.width = `${Math.max(1, 100 * Math.exp(other.logprob))}%`;
      const same = other.token === token.token;
      const row = [make('span', {}, visible(other.token)), make('span', {}, percent(other.logprob)), make('span', {}, bar)];
      rows.push(make('div', { className: same ? 'drawn' : '' }, ...row));
    }
  }
  tip.replaceChildren(...rows);
  tip.hidden = false;
  const box = element.getBoundingClientRect();
  const left = Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 8));
  const below = box.bottom + 6 + tip.offsetHeight < innerHeight;
  tip.style.left = `${left}px`;
  tip.style.top = `${Math.max(8, below ? box.bottom + 6 : box.top - tip.offsetHeight - 6)}px`;
}

export function hide() {
  $('tip').hidden = true;
  document.querySelector('.token.shown')?.classList.remove('shown');
}

/** Makes the tokens of a container tell about themselves. */
export function explain(container) {
  container.addEventListener('pointerover', (event) => facts.has(event.target) && show(event.target));
  container.addEventListener('pointerleave', (event) => event.pointerType === 'mouse' && hide()); // a finger only lifts
  container.addEventListener('blur', hide);
  container.addEventListener('keydown', (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const spans = [...container.querySelectorAll('.token')];
    if (event.key === 'Escape' && !$('tip').hidden) {
      hide();
      event.stopPropagation(); // and does not stop a reply too
    }
    if (!step || spans.length === 0) return;
    event.preventDefault();
    const at = spans.findIndex((each) => each.classList.contains('shown'));
    show(spans[Math.max(0, Math.min(spans.length - 1, at + step))]);
  });
}

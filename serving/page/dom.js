// Elements of text only: nothing in the page is ever parsed as HTML.

export const $ = (id) => document.getElementById(id);

/** make('p', {className: 'x', onclick: f, ariaLabel: 'y'}, 'text', element, ...) */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Whether a key is meant for an input method, as one that chooses a character or dismisses its window. */
export const composing = (event) => event.isComposing || event.keyCode === 229;

export function parameters(n) {
  if (n >= 1e8) return `${(n / 1e8).toPrecision(3)} 亿参数`;
  return n >= 1e4 ? `${(n / 1e4).toPrecision(3)} 万参数` : `${n} 参数`;
}

export function bytes(n) {
  const units = ['B', 'KB', 'MB', 'GB', 'TB'];
  const power = Math.min(units.length - 1, n > 0 ? Math.floor(Math.log10(n) / 3) : 0);
  return `${(n / 1000 ** power).toPrecision(3)} ${units[power]}`;
}

export const percent = (logprob) => {
  const p = 100 * Math.exp(logprob);
  return p >= 99.95 ? '100%' : p >= 0.1 ? `${p.toFixed(1)}%` : p >= 0.001 ? `${p.toFixed(3)}%` : '< 0.001%';
};

/** Facts in a row, each of which stays on one line. */
export const row = (facts) => facts.filter(Boolean).map((fact) => fact.replaceAll(' ', '\u00a0')).join(' · ');

export const STAGES = {
  pretrain: '预训练', sft: '指令微调', rm: '奖励模型', dpo: 'DPO', ppo: 'PPO', grpo: 'GRPO', quantize: '量化',
};

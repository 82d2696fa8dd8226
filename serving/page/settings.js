// Which checkpoints answer, and how their tokens are drawn. Kept in this browser.

import { $, STAGES, bytes, make, parameters, row } from './dom.js';

// key, label, lowest, highest, step, meaning
const SLIDERS = [
  ['temperature', '温度', 0, 2, 0.05, '越高越大胆，越低越保守；0 总取最可能的词元。'],
  ['top_p', '核采样 top_p', 0.05, 1, 0.05, '只从概率加起来刚够这么多的最可能词元里抽；1 不限。'],
  ['min_p', '最低概率 min_p', 0, 1, 0.01, '概率不到最可能词元这么多倍的都不抽；0 不限。'],
  ['top_k', '前 k 个 top_k', 0, 200, 1, '只从最可能的 k 个词元里抽；0 不限。'],
  ['repetition_penalty', '重复惩罚', 1, 2, 0.05, '大于 1 时，已经出现过的词元更难再出现。'],
  ['max_new_tokens', '最长回答', 8, 1024, 8, '以词元计；写到这里还没完就截断，上下文不够时更早。'],
];

let models = [];
let defaults = {};
const inputs = {};

const find = (id) => models.find((model) => model.id === id);
const describe = (model) => row([
  STAGES[model.stage] ?? model.stage, `第 ${model.step} 步`, parameters(model.parameters), bytes(model.bytes),
  model.quant, model.parent && `来自${STAGES[model.parent.stage] ?? model.parent.stage}`,
  `上下文 ${model.context}`, model.kind === 'text' && '只会续写',
]);

export const chosen = () => [find($('model').value), find($('other').value)].filter(Boolean);

const seed = () => $('seed').value.normalize('NFKC').trim();

/** Why nothing can be asked with these settings, or ''. */
export function problem() {
  if (chosen().length === 0) return '先选一个检查点';
  return /^\d{0,15}$/.test(seed()) ? '' : '种子要是不超过 15 位的数字，或者空着';
}

/** What every request of these settings has. */
export function sampling() {
  const values = Object.fromEntries(SLIDERS.map(([key]) => [key, Number(inputs[key].value)]));
  const { max_new_tokens: max_tokens, ...rest } = values;
  return { ...rest, max_tokens, ...(seed() ? { seed: Number(seed()) } : {}) };
}

function update() {
  const [model, other] = [find($('model').value), find($('other').value)];
  $('model-facts').textContent = model ? describe(model) : '这个文件夹里还没有能说话的检查点。';
  if (other) $('other-facts').textContent = describe(other);
  else $('other-facts').textContent = '同一个问题让两个检查点各答一遍，各自记得自己的话。';
  $('chosen').textContent = [model, other].filter(Boolean).map((each) => each.id).join(' 对 ');
  $('system-field').hidden = chosen().length > 0 && chosen().every((each) => each.kind === 'text');
  for (const [key, , , , step] of SLIDERS) {
    inputs[key].output.textContent = Number(inputs[key].value).toFixed(step < 1 ? 2 : 0);
  }
  $('legend').hidden = !$('tint').checked;
  document.body.classList.toggle('tint', $('tint').checked);
  const kept = { model: $('model').value, tint: $('tint').checked };
  for (const [key] of SLIDERS) kept[key] = inputs[key].value;
  localStorage.setItem('settings', JSON.stringify(kept));
}

function fill(select, first) {
  const before = select.value;
  const groups = new Map();
  for (const model of models) {
    const name = STAGES[model.stage] ?? model.stage;
    if (!groups.has(name)) groups.set(name, make('optgroup', { label: name }));
    groups.get(name).append(make('option', { value: model.id }, model.id));
  }
  select.replaceChildren(...first, ...groups.values());
  if (find(before)) select.value = before;
}

function kept() {
  try {
    return JSON.parse(localStorage.getItem('settings')) ?? {};
  } catch {
    return {};
  }
}

/** New checkpoints may have come, old ones may have gone. */
export function showModels(found) {
  const first = models.length === 0;
  models = found;
  fill($('model'), []);
  fill($('other'), [make('option', { value: '' }, '不对比')]);
  if (first) {
    const wanted = find(kept().model) ?? models.find((model) => model.kind === 'chat') ?? models[0];
    if (wanted) $('model').value = wanted.id;
  }
  update();
}

export function start(settings) {
  defaults = settings.defaults;
  const before = { ...defaults, ...kept() };
  for (const [key, label, low, high, step, meaning] of SLIDERS) {
    const output = make('output');
    // the server's default is one of its values, whatever it is
    const range = { min: Math.min(low, defaults[key]), max: Math.max(high, defaults[key]), step };
    const steps = (defaults[key] - range.min) / step;
    if (Math.abs(steps - Math.round(steps)) > 1e-6) range.step = 'any';
    const input = make('input', { type: 'range', id: key, ...range, value: before[key] });
    inputs[key] = Object.assign(input, { output });
    const name = make('span', { className: 'name' }, label, output);
    $('sliders').append(make('label', { className: 'field' }, name, input, make('small', {}, meaning)));
  }
  $('tint').checked = Boolean(before.tint);
  $('settings').addEventListener('input', update);
  $('defaults').onclick = () => {
    for (const [key] of SLIDERS) inputs[key].value = defaults[key];
    $('seed').value = '';
    $('system').value = '';
    update();
  };
  const wide = matchMedia('(min-width: 54rem)');
  const open = () => { $('settings').open = wide.matches; };
  wide.addEventListener('change', open);
  open();
}

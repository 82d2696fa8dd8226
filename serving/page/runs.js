// The second page: each run's last figures, plots, and what it wrote as it learnt.

import { getJSON, getPicture } from './api.js';
import { $, STAGES, make, row } from './dom.js';

let urls = [];

export async function show() {
  const section = $('runs');
  section.replaceChildren(make('p', { className: 'hint' }, '读取……'));
  const runs = await getJSON('/api/runs');
  urls.forEach(URL.revokeObjectURL);
  urls = [];
  section.replaceChildren(...(runs.length ? runs.map(card) : [make('p', { className: 'hint' }, '这个文件夹里还没有训练记录。')]));
}

function card(run) {
  const facts = [STAGES[run.stage] ?? run.stage, `第 ${run.step} 步`, run.figures.seconds && `${Math.round(run.figures.seconds)} 秒`];
  const heading = make('h2', {}, run.id, ' ', make('small', {}, row(facts)));
  const plots = make('div', { className: 'plots' });
  for (const name of run.plots) plots.append(plot(run, name));
  const article = make('article', { className: 'card' }, heading, figures(run.figures), plots);
  if (run.samples) article.append(samples(run));
  return article;
}

function figures(values) {
  const shown = Object.entries(values).filter(([name]) => name !== 'train/learning_rate' && name !== 'seconds');
  const list = make('dl');
  for (const [name, value] of shown) {
    const text = Number.isInteger(value) ? value.toLocaleString('zh-CN') : String(Number(value.toPrecision(4)));
    list.append(make('div', {}, make('dt', {}, name), make('dd', {}, text)));
  }
  return list;
}

function plot(run, name) {
  const image = make('img', { alt: `${run.id} 的 ${name}` });
  const button = make('button', { className: 'plot', title: '放大' }, image);
  const path = `/api/plot?run=${encodeURIComponent(run.id)}&name=${encodeURIComponent(name)}`;
  getPicture(path).then((url) => { urls.push(url); image.src = url; }, (error) => button.replaceChildren(error.message));
  button.onclick = () => {
    const dialog = $('picture-dialog');
    dialog.querySelector('img')?.remove();
    dialog.append(make('img', { src: image.src, alt: image.alt }));
    dialog.showModal();
  };
  return button;
}

/** A slider over the steps at which samples were written. */
function samples(run) {
  const details = make('details', { className: 'samples' }, make('summary', {}, '训练中的样例'));
  details.addEventListener('toggle', async () => {
    if (!details.open || details.children.length > 1) return;
    const path = `/api/samples?run=${encodeURIComponent(run.id)}`;
    const steps = await getJSON(path).catch((error) => [{ step: 0, pairs: [{ prompt: '', reply: error.message }] }]);
    const output = make('output');
    const slider = make('input', { type: 'range', min: 0, max: Math.max(0, steps.length - 1), value: steps.length - 1 });
    const list = make('div');
    const update = () => {
      const at = steps[Number(slider.value)];
      output.textContent = at ? `第 ${at.step} 步` : '没有样例';
      const pairs = at?.pairs ?? [];
      list.replaceChildren(...pairs.map(({ prompt, reply }) => make('div', { className: 'sample' }, make('p', { className: 'prompt' }, prompt || '（空）'), make('p', {}, reply))));
    };
    slider.oninput = update;
    details.append(make('label', { className: 'field' }, make('span', { className: 'name' }, '步数', output), slider), list);
    update();
  });
  return details;
}

// The third page: which checkpoint was trained from which, known by the sha256 that a child keeps of its parent.

import { getJSON } from './api.js';
import { $, STAGES, bytes, make, parameters, row } from './dom.js';

export async function show(choose) {
  const section = $('tree');
  section.replaceChildren(make('p', { className: 'hint' }, '核对各文件的 sha256……'));
  const nodes = await getJSON('/api/tree');
  const here = new Set(nodes.map((node) => node.id));
  const children = Map.groupBy(nodes, (node) => (here.has(node.parent_id) ? node.parent_id : null));
  const explained = '一个检查点记得它从哪个文件开始训练，以及那个文件当时的 sha256；对得上才连线。';
  const roots = children.get(null) ?? [];
  const list = roots.length ? branch(roots, children, choose) : make('p', { className: 'hint' }, '这个文件夹里还没有检查点。');
  section.replaceChildren(make('p', { className: 'hint' }, explained), list);
}

function branch(nodes, children, choose) {
  const oldest = nodes.toSorted((a, b) => a.created - b.created || a.id.localeCompare(b.id));
  return make('ul', { className: 'branch' }, ...oldest.map((node) => {
    const below = children.get(node.id);
    return make('li', {}, card(node, choose), below ? branch(below, children, choose) : null);
  }));
}

function card(node, choose) {
  const title = make('p', { className: 'title' }, make('b', {}, node.id));
  const element = make('div', { className: 'card node' }, title);
  if (node.problem) {
    element.append(make('p', { className: 'error' }, node.problem));
    return element;
  }
  title.append(' ', make('span', { className: 'stage' }, STAGES[node.stage] ?? node.stage));
  const time = new Date(1000 * node.created).toLocaleString('zh-CN', { dateStyle: 'short', timeStyle: 'short' });
  const facts = [`第 ${node.step} 步`, `读过 ${node.tokens_seen.toLocaleString('zh-CN')} 词元`, parameters(node.parameters), bytes(node.bytes), node.quant, time];
  element.append(make('p', { className: 'facts' }, row(facts)));
  element.append(make('p', { className: 'hash' }, 'sha256 ', make('code', { title: node.sha256 }, node.sha256?.slice(0, 16) ?? '读不到')));
  if (node.parent && !node.parent_id) {
    const lost = `从 ${node.parent.path}（${node.parent.sha256.slice(0, 16)}）训练而来：这个文件不在这里，或者后来变了`;
    element.append(make('p', { className: 'lost' }, lost));
  }
  if (node.kind === 'chat' || node.kind === 'text') {
    const button = make('button', { className: 'quiet' }, '和它说话');
    button.onclick = () => choose(node.id);
    title.append(button);
  }
  return element;
}

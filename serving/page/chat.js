// The conversation: questions, each with the replies of one or two checkpoints.

import { $, composing, make } from './dom.js';
import { Reply } from './reply.js';
import { chosen, problem, sampling } from './settings.js';
import { hide } from './tokens.js';

const EXAMPLES = ['写一条酒店好评。', '写一条图书差评。', '这本书的内容很充实，值得一看。这是好评还是差评？'];

let turns = []; // {question, replies, element}
let limits = {}; // of what the server takes
const status = (text) => { $('status').textContent = text; };

export const running = () => turns.some((turn) => turn.replies.some((reply) => reply.live));

/** What the checkpoint in that place has heard and said before turn n: of late, as the context holds no more. */
function history(n, place) {
  const messages = [];
  let size = 0;
  for (const { question, replies } of turns.slice(0, n).reverse()) {
    const text = (replies[place] ?? replies[0])?.text ?? '';
    size += question.length + text.length;
    if (size > limits.max_characters || messages.length + 4 > limits.max_messages) break;
    if (text) messages.unshift({ role: 'user', content: question }, { role: 'assistant', content: text });
  }
  return messages;
}

function messagesFor(n, place) {
  const system = $('system').value.trim();
  const opening = system ? [{ role: 'system', content: system }] : [];
  return [...opening, ...history(n, place), { role: 'user', content: turns[n].question }];
}

/** Asks for the replies of turn n anew; what came after it is gone. */
async function answer(n) {
  const turn = turns[n];
  for (const later of turns.splice(n + 1)) later.element.remove();
  turn.replies = chosen().map((model) => new Reply(model));
  draw(turn);
  showState();
  $('turns').lastElementChild?.scrollIntoView({ block: 'end' });
  status('正在回答');
  const follow = setInterval(keepInView, 100);
  await Promise.all(turn.replies.map((reply, place) => reply.run(messagesFor(n, place), sampling())));
  clearInterval(follow);
  keepInView();
  status(turn.replies.some((reply) => reply.state === 'failed') ? '没有答成' : '回答完了');
  showState();
}

function keepInView() {
  const turns = $('turns');
  if (turns.scrollHeight - turns.scrollTop - turns.clientHeight < 120) turns.scrollTop = turns.scrollHeight;
}

function draw(turn) {
  const again = make('button', { className: 'quiet', type: 'button' }, '重新生成');
  again.onclick = () => regenerate(turn);
  const edit = make('button', { className: 'quiet', type: 'button' }, '编辑');
  edit.onclick = () => change(turn);
  const copy = make('button', { className: 'quiet', type: 'button' }, '复制');
  copy.onclick = async () => {
    const text = turn.replies.map((reply) => reply.text).join('\n\n');
    const done = await navigator.clipboard?.writeText(text).then(() => true, () => false); // none without HTTPS
    status(done ? '已复制' : '浏览器不让复制');
  };
  turn.element.replaceChildren(
    make('div', { className: 'question' }, make('p', {}, turn.question), edit),
    make('div', { className: 'replies' }, ...turn.replies.map((reply) => reply.element)),
    make('p', { className: 'actions' }, again, copy),
  );
}

function showState() {
  const busy = running();
  $('send').hidden = busy;
  $('stop').hidden = !busy;
  $('empty').hidden = turns.length > 0;
  $('fresh').hidden = turns.length === 0;
  document.body.classList.toggle('busy', busy);
}

/** Whether a question may be asked now; if not, the status says why. */
function ready() {
  if (problem()) status(problem());
  return !running() && !problem();
}

export function ask(question) {
  if (!question.trim() || !ready()) return;
  const turn = { question, replies: [], element: make('article', { className: 'turn' }) };
  turns.push(turn);
  $('turns').append(turn.element);
  answer(turns.length - 1);
}

function regenerate(turn) {
  if (ready()) answer(turns.indexOf(turn));
}

/** Puts the question of a turn into a field, to be asked anew. */
function change(turn) {
  if (running()) return;
  const field = make('textarea', { value: turn.question, rows: 2, ariaLabel: '改这个问题' });
  const save = make('button', { type: 'submit' }, '重新问');
  const leave = make('button', { className: 'quiet', type: 'button' }, '取消');
  const form = make('form', { className: 'edit' }, field, save, leave);
  leave.onclick = () => { draw(turn); $('question').focus(); };
  form.onsubmit = (event) => {
    event.preventDefault();
    if (!field.value.trim() || !ready()) return;
    turn.question = field.value;
    $('question').focus();
    answer(turns.indexOf(turn));
  };
  field.onkeydown = (event) => {
    if (event.key === 'Escape' && !composing(event)) leave.click();
    if (sends(event)) { event.preventDefault(); form.requestSubmit(); }
  };
  turn.element.querySelector('.question').replaceChildren(form);
  field.focus();
}

export function stop() {
  for (const turn of turns) for (const reply of turn.replies) if (reply.live) reply.stop();
}

export function fresh() {
  stop();
  hide();
  turns = [];
  $('turns').replaceChildren();
  showState();
  $('question').focus();
}

export const again = () => turns.length && regenerate(turns.at(-1));

/** Whether a key press sends. */
const sends = (event) => event.key === 'Enter' && !event.shiftKey && !composing(event);

function fit() {
  const field = $('question');
  field.style.height = 'auto';
  field.style.height = `${field.scrollHeight}px`;
}

export function start(facts) {
  limits = facts;
  const field = $('question');
  field.maxLength = limits.max_characters;
  field.oninput = fit;
  field.onkeydown = (event) => {
    if (sends(event)) { event.preventDefault(); $('ask').requestSubmit(); }
    if (event.key === 'ArrowUp' && !field.value && turns.length) { event.preventDefault(); change(turns.at(-1)); }
  };
  $('ask').onsubmit = (event) => {
    event.preventDefault();
    if (!field.value.trim() || !ready()) return;
    ask(field.value);
    field.value = '';
    fit();
  };
  $('stop').onclick = () => { stop(); field.focus(); };
  $('fresh').onclick = fresh;
  for (const text of EXAMPLES) {
    const button = make('button', { className: 'quiet', type: 'button' }, text);
    button.onclick = () => ask(text);
    $('examples').append(button);
  }
  showState();
}

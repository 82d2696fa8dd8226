// Talks to the server: JSON, pictures, and replies as streams of server-sent events.

import { $ } from './dom.js';

let asking = null;

/** Asks for the key that the server wants, once however many requests need it. */
function askForKey() {
  asking ??= new Promise((resolve) => {
    const dialog = $('key-dialog');
    dialog.addEventListener('close', () => {
      sessionStorage.setItem('key', $('key').value.replace(/[^\x21-\x7e]/g, '')); // what a header can hold
      $('key').value = '';
      asking = null;
      resolve();
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

async function request(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem('key');
    const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === 'AbortError') throw error;
      throw new Error('连不上服务器：它停了，或者网络断了');
    }
    if (response.ok) return response;
    const said = await response.json().catch(() => null);
    if (response.status !== 401) throw new Error(said?.error?.message ?? `服务器答复 ${response.status}`);
    await askForKey();
  }
}

export const getJSON = async (path) => (await request(path)).json();

/** The URL of a picture; revoke it when it is not shown any more. */
export const getPicture = async (path) => URL.createObjectURL(await (await request(path)).blob());

const post = (body, signal) => (
  { method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(body), signal }
);

/** Has the server load a model, so that the first question does not wait for it. */
export const load = (model) => request('/v1/completions', post({ model, prompt: '', max_tokens: 1 })).catch(() => {});

/** Posts body and yields {data} or {comment} for each event until [DONE]. */
export async function* stream(path, body, signal) {
  const response = await request(path, post(body, signal));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = '';
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error('回答没有说完，连接就断了');
    text += value;
    const events = text.split('\n\n');
    text = events.pop();
    for (const event of events) {
      if (event.startsWith(':')) yield { comment: event.slice(1).trim() };
      else if (event === 'data: [DONE]') return;
      else {
        const data = JSON.parse(event.slice('data: '.length));
        if (data.error) throw new Error(data.error.message);
        yield { data };
      }
    }
  }
}

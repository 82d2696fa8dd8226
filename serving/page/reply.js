// One reply of one checkpoint: asked for, shown as it comes, stopped.

import { stream } from './api.js';
import { make, row } from './dom.js';
import { explain, span } from './tokens.js';

const REASONS = { stop: '说完了', length: '到了长度上限', stopped: '已停止' };
const TOP = 5; // likeliest tokens to fetch beside each

export class Reply {
  constructor(model) {
    this.model = model;
    this.text = '';
    this.state = 'waiting'; // then running, done, stopped or failed
    this.body = make('div', { className: 'text', tabIndex: 0, role: 'group', ariaLabel: '回答，左右键看每个词元的概率' });
    this.facts = make('p', { className: 'facts' }, '等待……');
    this.element = make('div', { className: 'reply' }, make('p', { className: 'who' }, model.id), this.body, this.facts);
    explain(this.body);
  }

  get live() {
    return this.state === 'waiting' || this.state === 'running';
  }

  stop() {
    this.controller?.abort();
  }

  /** Fetches the reply to messages; never throws. */
  async run(messages, sampling) {
    this.controller = new AbortController();
    this.asked = performance.now();
    this.count = 0;
    const chat = this.model.kind === 'chat';
    const prompt = messages.at(-1).content;
    const body = { model: this.model.id, ...sampling, stream: true, stream_options: { include_usage: true } };
    Object.assign(body, chat ? { messages, logprobs: true, top_logprobs: TOP } : { prompt, logprobs: TOP });
    const path = chat ? '/v1/chat/completions' : '/v1/completions';
    try {
      for await (const event of stream(path, body, this.controller.signal)) this.take(event);
      this.state = 'done';
    } catch (error) {
      this.state = error.name === 'AbortError' ? 'stopped' : 'failed';
      this.reason = this.state;
      if (this.state === 'failed') this.element.append(make('p', { className: 'error', role: 'alert' }, error.message));
    }
    this.ended = performance.now();
    this.tell();
  }

  take({ data, comment }) {
    if (comment) {
      this.facts.textContent = `排队：前面还有 ${parseInt(comment, 10)} 个请求`;
      return;
    }
    if (data.usage) this.count = data.usage.completion_tokens;
    const choice = data.choices[0];
    if (!choice) return;
    const text = choice.delta?.content ?? choice.text ?? '';
    if (text) {
      this.state = 'running';
      this.first ??= performance.now();
      const tokens = readTokens(choice.logprobs);
      this.count += tokens.length;
      this.text += text;
      this.body.append(span(text, tokens));
    }
    this.reason = choice.finish_reason ?? this.reason;
    this.seed = data.seed ?? this.seed;
    this.note = data.note ?? this.note;
    this.tell();
  }

  /** The line below: how many tokens, how fast, why it ended. */
  tell() {
    const parts = [];
    if (this.first) {
      const seconds = ((this.ended ?? performance.now()) - this.first) / 1000;
      parts.push(`${this.count} 词元`);
      if (this.count > 1 && seconds > 0) parts.push(`${((this.count - 1) / seconds).toFixed(0)} 词元/秒`);
      parts.push(`首字 ${((this.first - this.asked) / 1000).toFixed(2)} 秒`);
    }
    if (!this.live && REASONS[this.reason]) parts.push(REASONS[this.reason]);
    if (this.state === 'done' && !this.text) parts.push('什么也没说');
    if (this.seed !== undefined) parts.push(`种子 ${this.seed}`);
    if (this.note === 'dropped turns') parts.push('上下文装不下，最早的几轮没有给它看');
    this.facts.textContent = row(parts) || (this.live ? '等待……' : '');
  }
}

/** [{token, logprob, top_logprobs}] of either interface. */
function readTokens(logprobs) {
  if (logprobs.content) return logprobs.content;
  return logprobs.tokens.map((token, i) => ({
    token,
    logprob: logprobs.token_logprobs[i],
    top_logprobs: Object.entries(logprobs.top_logprobs[i]).map(([name, logprob]) => ({ token: name, logprob }))
      .sort((a, b) => b.logprob - a.logprob), // of an object numbers come first
  }));
}

// The timeline of prompts: a bar over the video's length with a coloured section for each prompt, and a line of fields
// for each. props.value is a list of [second, text]: the sections after the first, whose text is the prompt's own field.
const LEAST = 0.1;  // seconds of a section

const root = element.querySelector('.lv-timeline');
const bar = root.querySelector('.lv-track');
const rows = root.querySelector('.lv-rows');
const add = root.querySelector('.lv-add');

let sections = [];  // as in props.value
let length = 4;     // seconds of the video
let first = '';     // the prompt
let dragged = -1;

const rounded = second => Math.round(second * 10) / 10;
const inside = (k, second) => {
  const low = k ? sections[k - 1][0] : 0, high = k + 1 < sections.length ? sections[k + 1][0] : length;
  return rounded(Math.max(low + LEAST, Math.min(high - LEAST, second)));
};

function make(tag, properties, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function publish() {
  props.value = sections.map(([second, text]) => [second, text]);
  trigger('change');
}

function drawBar() {
  bar.replaceChildren();
  const begins = [0, ...sections.map(([second]) => Math.min(second, length))];
  begins.forEach((begin, k) => {
    const end = k + 1 < begins.length ? begins[k + 1] : length;
    const part = make('div', {className: `lv-part lv-hue${k % 6}${k + 1 < begins.length ? '' : ' lv-last'}`, title: `${begin} to ${rounded(end)} s`},
      make('span', {textContent: k ? sections[k - 1][1] : first || 'the prompt'}));
    part.style.left = `${100 * begin / length}%`;
    part.style.width = `${Math.max(0, 100 * (end - begin) / length)}%`;
    bar.append(part);
  });
  sections.forEach(([second], k) => {
    const handle = make('div', {className: 'lv-handle', tabIndex: 0});
    handle.style.left = `${100 * Math.min(second, length) / length}%`;
    handle.dataset.section = k;
    handle.setAttribute('role', 'slider');
    handle.setAttribute('aria-label', `section ${k + 2} begins at second`);
    handle.setAttribute('aria-valuemin', 0);
    handle.setAttribute('aria-valuemax', length);
    handle.setAttribute('aria-valuenow', second);
    bar.append(handle);
  });
}

function drawRows() {
  rows.replaceChildren(...sections.map(([second, text], k) => {
    const from = make('input', {type: 'number', className: 'lv-from', min: LEAST, step: LEAST, value: second});
    from.setAttribute('aria-label', `section ${k + 2} begins at second`);
    from.addEventListener('change', () => {
      const value = Number(from.value);
      if (Number.isFinite(value) && value > 0) sections[k][0] = rounded(value);
      sections.sort((a, b) => a[0] - b[0]);
      draw();
      publish();
    });
    const words = make('input', {type: 'text', className: 'lv-words', value: text, maxLength: 2000,
      placeholder: 'what is to be seen from here on'});
    words.setAttribute('aria-label', `prompt of section ${k + 2}`);
    words.addEventListener('input', () => {
      sections[k][1] = words.value;
      drawBar();
      publish();
    });
    const remove = make('button', {type: 'button', className: 'lv-remove', textContent: '\u00d7'});
    remove.setAttribute('aria-label', `remove section ${k + 2}`);
    remove.addEventListener('click', () => {
      sections.splice(k, 1);
      draw();
      publish();
      (rows.querySelectorAll('.lv-words')[Math.max(0, k - 1)] || add).focus();
    });
    return make('div', {className: 'lv-row'}, make('i', {className: `lv-dot lv-hue${(k + 1) % 6}`}),
      make('label', {}, 'from ', from, ' s'), words, remove);
  }));
}

function draw() {
  root.classList.toggle('lv-none', !sections.length);
  drawBar();
  drawRows();
}

function move(k, second) {
  sections[k][0] = inside(k, second);
  const handle = bar.querySelector(`[data-section="${k}"]`);
  drawBar();
  rows.querySelectorAll('.lv-from')[k].value = sections[k][0];
  return handle;
}

add.addEventListener('click', () => {
  const last = sections.length ? sections[sections.length - 1][0] : 0;
  const begin = last < length ? rounded((last + length) / 2) : rounded(last + 1);
  sections.push([Math.max(begin, rounded(last + LEAST)), '']);
  draw();
  publish();
  [...rows.querySelectorAll('.lv-words')].pop().focus();
});

bar.addEventListener('pointerdown', event => {
  const handle = event.target.closest('.lv-handle');
  if (!handle) return;
  dragged = Number(handle.dataset.section);
  bar.setPointerCapture(event.pointerId);  // the bar's, as the handles are drawn anew
  event.preventDefault();
});
bar.addEventListener('pointermove', event => {
  if (dragged < 0) return;
  const {left, width} = bar.getBoundingClientRect();
  move(dragged, length * (event.clientX - left) / width);
});
for (const name of ['pointerup', 'pointercancel']) {
  bar.addEventListener(name, () => {
    if (dragged < 0) return;
    bar.querySelector(`[data-section="${dragged}"]`)?.focus();
    dragged = -1;
    publish();
  });
}
bar.addEventListener('keydown', event => {
  const handle = event.target.closest('.lv-handle');
  const by = {ArrowLeft: -0.1, ArrowDown: -0.1, ArrowRight: 0.1, ArrowUp: 0.1, PageDown: -1, PageUp: 1}[event.key];
  if (!handle || !by) return;
  event.preventDefault();
  const k = Number(handle.dataset.section);
  move(k, sections[k][0] + by);
  bar.querySelector(`[data-section="${k}"]`).focus();
  publish();
});

function take() {
  const given = Array.isArray(props.value) ? props.value : [];
  if (JSON.stringify(given) === JSON.stringify(sections)) return;
  sections = given.map(([second, text]) => [Number(second), String(text)]);
  draw();
}

// The length and the prompt are other fields' values, which Python may set too: no event tells.
function follow() {
  if (!element.isConnected || dragged >= 0) return;
  const seconds = Number(document.querySelector('#seconds input[type="number"]')?.value);
  const prompt = document.querySelector('#prompt textarea')?.value ?? '';
  if (prompt === first && (seconds === length || !(seconds > 0))) return;
  if (seconds > 0) length = seconds;
  first = prompt;
  if (!bar.contains(document.activeElement)) drawBar();
}

watch('value', take);
take();
draw();
follow();
setInterval(follow, 400);

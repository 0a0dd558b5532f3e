// The LoRAs of a video: a line for each, with its weight. props.value is a list of {id, weight, name}; props.choices is
// a list of {id, label, name}, those that fit the pipeline; props.hint says why there are none.
const root = element.querySelector('.lv-loras');
const rows = root.querySelector('.lv-lora-rows');
const add = root.querySelector('.lv-add');
const what = root.querySelector('.lv-what');
const MOST = 8;

let loras = [];  // as in props.value

function make(tag, properties, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

const choices = () => Array.isArray(props.choices) ? props.choices : [];
const unused = () => choices().filter(choice => !loras.some(lora => lora.id === choice.id));

function publish() {
  props.value = loras.map(lora => ({...lora}));
  trigger('change');
}

function drawRow(lora, k) {
  const shown = choices().filter(choice => choice.id === lora.id || !loras.some(other => other.id === choice.id));
  const options = shown.map(({id, label}) => make('option', {value: id, textContent: label}));
  if (!shown.some(choice => choice.id === lora.id)) {
    options.unshift(make('option', {value: lora.id, textContent: `${lora.name || lora.id} (not for this pipeline)`}));
  }
  const pick = make('select', {className: 'lv-lora'}, ...options);
  pick.value = lora.id;
  pick.setAttribute('aria-label', `LoRA ${k + 1}`);
  pick.addEventListener('change', () => {
    loras[k] = {id: pick.value, weight: lora.weight, name: shown.find(choice => choice.id === pick.value)?.name ?? lora.name};
    draw();
    publish();
  });
  const weight = make('input', {type: 'number', min: -10, max: 10, step: 0.05, value: lora.weight});
  weight.setAttribute('aria-label', `weight of LoRA ${k + 1}`);
  weight.addEventListener('change', () => {
    const value = Number(weight.value);
    loras[k].weight = weight.value.trim() && Number.isFinite(value) ? Math.max(-10, Math.min(10, value)) : 1;
    weight.value = loras[k].weight;
    publish();
  });
  const remove = make('button', {type: 'button', className: 'lv-remove', textContent: '\u00d7'});
  remove.setAttribute('aria-label', `remove LoRA ${k + 1}`);
  remove.addEventListener('click', () => {
    loras.splice(k, 1);
    draw();
    publish();
    (rows.querySelectorAll('.lv-lora')[Math.max(0, k - 1)] || add).focus();
  });
  return make('div', {className: 'lv-row'}, pick, make('label', {}, 'weight ', weight), remove);
}

function draw() {
  rows.replaceChildren(...loras.map(drawRow));
  add.hidden = !unused().length || loras.length >= MOST;
  what.textContent = loras.length ? '' : props.hint || '';
}

add.addEventListener('click', () => {
  const [first] = unused();
  if (!first) return;
  loras.push({id: first.id, weight: 1, name: first.name});
  draw();
  publish();
  [...rows.querySelectorAll('.lv-lora')].pop().focus();
});

function take() {
  const given = Array.isArray(props.value) ? props.value : [];
  if (JSON.stringify(given) !== JSON.stringify(loras)) loras = given.map(lora => ({...lora}));
  draw();
}

watch(['value', 'choices', 'hint'], take);
take();

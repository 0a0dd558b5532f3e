// The Compress tab: runs in gr.HTML's js_on_load, with `element`, `props`, `watch` and `trigger`. In the viewer,
// props.value is {key, original, reconstruction, report, height, width, frames, rate, hint}: two videos of the same
// frames, one over the other, split at a slider, and synchronized: the reconstruction follows the original.
element.addEventListener('click', event => {  // buttons: send the action and the job to Python
  const button = event.target.closest('button[data-action]');
  if (button) trigger('click', {action: button.dataset.action, job: button.dataset.job});
});
const root = element.querySelector('.lvc-view');
if (root) compare();

function compare() {
  const part = name => root.querySelector('.lvc-' + name);
  const [original, coded, stage, handle] = ['original', 'coded', 'stage', 'handle'].map(part);
  const [play, scrub, position, plot, hint] = ['play', 'scrub', 'position', 'plot', 'hint'].map(part), area = part('area');
  const modes = [...root.querySelectorAll('[data-mode]')].filter(button => button !== root);
  let shown = '', playing = false, rate = 25, frames = 0, psnr = [], split = 50;
  const clamp = (x, low, high) => Math.min(high, Math.max(low, x));
  const index = () => clamp(Math.floor(original.currentTime * rate + 0.01), 0, frames - 1);

  function setSplit(percent) {
    split = clamp(percent, 0, 100);
    root.style.setProperty('--split', split + '%');
    handle.setAttribute('aria-valuenow', Math.round(split));
  }

  function showPosition() {
    const at = index();
    const quality = psnr.length ? ` · ${psnr[at].toFixed(1)} dB` : '';
    position.textContent = `${(at / rate).toFixed(2)} s · frame ${at + 1} of ${frames}${quality}`;
    if (document.activeElement !== scrub || playing) scrub.value = at;
    plot.style.setProperty('--now', `${100 * (at + 0.5) / frames}%`);
  }

  function seek(frame) {  // to the middle of a frame, so that both show the same frame
    const time = (clamp(frame, 0, frames - 1) + 0.5) / rate;
    original.currentTime = coded.currentTime = time;
    showPosition();
  }

  function step() {
    if (!playing) return;
    const drift = coded.currentTime - original.currentTime;
    if (Math.abs(drift) > 0.3) coded.currentTime = original.currentTime;
    coded.playbackRate = Math.abs(drift) > 0.4 / rate ? clamp(1 - 2 * drift, 0.75, 1.3) : 1;
    showPosition();
    requestAnimationFrame(step);
  }

  async function run(on) {
    playing = on && frames > 1;
    root.dataset.playing = playing;
    play.setAttribute('aria-label', playing ? 'Pause' : 'Play');
    if (!playing) {
      original.pause();
      coded.pause();
      if (frames) seek(index());
      return;
    }
    try {
      await Promise.all([original.play(), coded.play()]);
      requestAnimationFrame(step);
    } catch (error) { run(false); }
  }

  original.addEventListener('ended', () => {
    if (!playing) return;
    original.currentTime = coded.currentTime = 0;
    run(true);
  });
  play.addEventListener('click', () => run(!playing));
  scrub.addEventListener('input', () => { if (playing) run(false); seek(Number(scrub.value)); });
  plot.addEventListener('click', event => {
    const box = area.getBoundingClientRect();
    seek(Math.floor(frames * (event.clientX - box.left) / box.width));
  });
  modes.forEach(button => button.addEventListener('click', () => {
    root.dataset.mode = button.dataset.mode;
    modes.forEach(other => other.setAttribute('aria-pressed', other === button));
  }));

  const drag = event => {
    const box = stage.getBoundingClientRect();
    setSplit(100 * (event.clientX - box.left) / box.width);
  };
  stage.addEventListener('pointerdown', event => {
    if (root.dataset.mode !== 'slider' || root.dataset.state !== 'video' || event.button) return;
    stage.setPointerCapture(event.pointerId);
    drag(event);
    handle.focus({preventScroll: true});
    event.preventDefault();
  });
  stage.addEventListener('pointermove', event => { if (stage.hasPointerCapture(event.pointerId)) drag(event); });

  root.addEventListener('keydown', event => {
    if (root.dataset.state !== 'video' || event.ctrlKey || event.metaKey || event.altKey) return;
    const arrows = event.target !== scrub && {ArrowLeft: -2, ArrowRight: 2}[event.key];
    if (arrows) setSplit(split + arrows * (event.shiftKey ? 5 : 1));
    else if (event.key === ' ' && event.target.tagName !== 'BUTTON') run(!playing);
    else if (event.key === ',' || event.key === '.') { run(false); seek(index() + (event.key === '.' ? 1 : -1)); }
    else return;
    event.preventDefault();
  });

  function draw() {  // PSNR by frame; for many frames, the worst of each few
    const every = Math.ceil(psnr.length / 500);
    const least = [];
    for (let i = 0; i < psnr.length; i += every) least.push(Math.min(...psnr.slice(i, i + every)));
    const low = Math.min(...least), high = Math.max(...least), span = Math.max(high - low, 0.5);
    const x = i => (1000 * (i + 0.5) / least.length).toFixed(1), y = v => (92 - 84 * (v - low) / span).toFixed(1);
    const line = least.map((v, i) => `${x(i)},${y(v)}`).join(' ');
    plot.querySelector('polyline').setAttribute('points', least.length > 1 ? line : `0,${y(low)} 1000,${y(low)}`);
    plot.style.setProperty('--worst', `${100 * (psnr.indexOf(Math.min(...least)) + 0.5) / psnr.length}%`);
    part('high').textContent = `${high.toFixed(1)} dB`;
    part('low').textContent = `${low.toFixed(1)} dB`;
    plot.dataset.ready = true;
  }

  async function show(value) {
    run(false);
    [rate, frames, psnr] = [value.rate, value.frames, []];
    plot.dataset.ready = false;
    scrub.max = frames - 1;
    play.disabled = frames < 2;
    root.style.setProperty('--ratio', value.width / value.height);
    original.src = value.original;
    coded.src = value.reconstruction;
    seek(0);
    const response = await fetch(value.report);
    if (!response.ok || value.key !== shown) return;
    const report = await response.json();
    if (value.key !== shown) return;
    psnr = report.per_frame.psnr;
    draw();
    showPosition();
  }

  function update() {
    const value = props.value || {key: '', hint: ''};
    hint.textContent = value.hint;
    if (value.key === shown) return;
    shown = value.key;
    root.dataset.state = shown ? 'video' : 'empty';
    if (shown) {
      show(value).catch(error => console.warn('cannot show the metrics', error));
    } else {
      run(false);
      frames = 0;
      [original, coded].forEach(video => { video.removeAttribute('src'); video.load(); });
    }
  }

  setSplit(50);
  watch('value', update);
  update();
}

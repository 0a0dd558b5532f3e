// The player of a growing video: runs once, in gr.HTML's js_on_load, with `element`, `props` and `watch`.
// props.value is {job, url, live, hint}. While a video grows, each longer version is loaded into a second, hidden
// <video> and takes over at the same moment of playing, so that nothing flickers and nothing starts again.
const root = element.querySelector('.lv-player');
const hint = element.querySelector('.lv-hint');
const videos = [...element.querySelectorAll('video')];
let front = 0, job = '', shown = '', latest = 0;

const happens = (target, name) => new Promise((resolve, reject) => {
  target.addEventListener(name, resolve, {once: true});
  target.addEventListener('error', () => reject(target.error), {once: true});
});

function clear(video) {
  video.pause();
  if (video.src.startsWith('blob:')) URL.revokeObjectURL(video.src);
  video.removeAttribute('src');
  video.load();
}

async function show(value, token) {
  let source = value.url;
  if (value.live) {  // one version, whole: the file on the server will be replaced by a longer one
    const answer = await fetch(value.url);
    if (!answer.ok) throw new Error(`${value.url}: ${answer.status}`);
    source = URL.createObjectURL(await answer.blob());
  }
  if (token !== latest) return;
  const old = videos[front];
  const same = value.job === job && old.hasAttribute('src');
  const next = same && document.fullscreenElement === old ? old : videos[1 - front];
  const from = same ? old.currentTime : 0;
  const playing = !same || !old.paused || old.ended;
  next.loop = !value.live;
  next.src = source;
  await happens(next, 'loadeddata');
  if (token !== latest) return;
  // The old one has gone on playing meanwhile. One that had come to its end starts over only when nothing is added.
  const time = same ? Math.max(from, old === next ? 0 : old.currentTime) : 0;
  if (time > 0 && time < next.duration) {
    next.currentTime = time;
    await happens(next, 'seeked');
    if (token !== latest) return;
  }
  job = value.job;
  root.dataset.state = 'video';
  root.style.setProperty('--ratio', next.videoWidth / next.videoHeight);
  if (next !== old) {
    next.classList.add('lv-on');
    old.classList.remove('lv-on');
    front = 1 - front;
    clear(old);
  }
  if (playing) next.play().catch(() => {});  // a browser may refuse to start by itself; its controls are there
}

function update() {
  const value = props.value || {job: '', url: '', live: false, hint: ''};
  hint.textContent = value.hint;
  root.dataset.live = value.live;
  if (!value.url) {
    latest += 1;
    shown = job = '';
    videos.forEach(clear);
    root.dataset.state = value.live ? 'waiting' : 'empty';
  } else if (value.url !== shown) {
    shown = value.url;
    latest += 1;
    show(value, latest).catch(error => console.warn('the video could not be shown', error));
  }
}

watch('value', update);
update();

// The player of a video that is being made: runs once, in gr.HTML's js_on_load, with `element`, `props` and `watch`.
// props.value is {job, revision, chunks, live, final, hint, preview}: of `chunks` chunks, each is fetched once and goes
// into a SourceBuffer, so that the <video> just becomes longer. Where a browser has no Media Source Extensions, the
// video so far is loaded again for each chunk. That, and the final file, is loaded into a second, hidden <video>, which
// takes over at the same moment of playing, so that nothing flickers and nothing starts again.
const NOTHING = {job: '', revision: 0, chunks: 0, live: false, final: '', hint: '', preview: ''};
const KEPT = [32, 16, 8, 4];  // seconds that were played and stay where the browser's buffer is full; key frames: 2 s
const STREAM = 'stream';
const Source = window.MediaSource || window.ManagedMediaSource;

const root = element.querySelector('.lv-player');
const hint = element.querySelector('.lv-hint');
const image = element.querySelector('.lv-preview');
const videos = [...element.querySelectorAll('video')];

let value = NOTHING;
let front = 0;        // which <video> is seen
let shown = '';       // what it shows: STREAM, or a file's URL
let shownChunks = 0;  // of the growing file
let stream = null;
let canStream = Boolean(Source);
let working = false;
let present = new AbortController();  // aborted when another job is shown
let rest = new AbortController();     // aborted when there is news

const happens = (target, name, signal) => new Promise((resolve, reject) => {
  const listen = {once: true, signal};
  target.addEventListener(name, resolve, listen);
  target.addEventListener('error', () => reject(target.error || new Error(`no ${name}`)), listen);
  signal.addEventListener('abort', () => reject(signal.reason), {once: true});
  if (signal.aborted) reject(signal.reason);
});

const seconds = (count, signal) => new Promise(resolve => {
  const timer = setTimeout(resolve, 1000 * count);
  signal.addEventListener('abort', () => { clearTimeout(timer); resolve(); }, {once: true});
});

async function load(url, signal) {
  const answer = await fetch(url, {signal});
  if (!answer.ok) throw new Error(`${url}: ${answer.status}`);
  return answer.blob();
}

function clear(video) {
  video.pause();
  if (video.src.startsWith('blob:')) URL.revokeObjectURL(video.src);
  video.removeAttribute('src');
  video.load();
}

// A <video> that becomes longer: `grow(n)` says how many chunks there are, `end()` that no more will come for now.
function startStream(video, job, failed) {
  const closed = new AbortController(), signal = closed.signal;
  const source = new Source();
  let buffer = null, held = 0, there = 0, complete = false, pumping = false;
  if (!window.MediaSource) video.disableRemotePlayback = true;  // ManagedMediaSource asks for it
  video.src = URL.createObjectURL(source);
  const opened = happens(source, 'sourceopen', signal);
  opened.catch(() => {});

  async function begin(chunk) {
    const type = `video/mp4; codecs="${codecOf(chunk)}"`;
    if (!Source.isTypeSupported(type)) throw new TypeError(`this browser cannot stream ${type}`);
    await opened;
    buffer = source.addSourceBuffer(type);
  }

  async function add(chunk) {
    for (;;) {
      try {
        buffer.appendBuffer(chunk);
        return await happens(buffer, 'updateend', signal);
      } catch (error) {
        if (error?.name !== 'QuotaExceededError') throw error;
        await makeRoom();
      }
    }
  }

  async function makeRoom() {  // by what was played long ago; else by waiting until that is so
    const start = buffer.buffered.length ? buffer.buffered.start(0) : Infinity;
    const far = KEPT.map(kept => video.currentTime - kept).find(time => time > start + 1);
    if (far) {
      buffer.remove(0, far);
      await happens(buffer, 'updateend', signal);
    } else {
      await happens(video, 'timeupdate', signal);
    }
  }

  function measure() {  // the file does not say how long it will be: as long as it is now
    const {buffered} = buffer, end = buffered.length ? buffered.end(buffered.length - 1) : 0;
    if (end && !(source.duration >= end && source.duration < Infinity)) source.duration = end;
    if (complete && held >= there && source.readyState === 'open') source.endOfStream();
  }

  async function pump() {
    if (pumping) return;
    pumping = true;
    while (held < there && !signal.aborted) {
      let bytes;
      try {
        bytes = await (await load(`media/${job}/chunks/${held}`, signal)).arrayBuffer();
      } catch {
        await seconds(2, signal);  // the server is away, or has put the final file in its place: then that comes
        continue;
      }
      try {
        if (!buffer) await begin(bytes);
        await add(bytes);
        held += 1;
        measure();
      } catch (error) {
        if (!signal.aborted) failed(error);
        break;
      }
    }
    pumping = false;
  }

  video.addEventListener('error', () => failed(video.error), {signal});
  function jump() {  // over what was far behind and has gone: to where there is something again
    const {buffered, currentTime} = video;
    for (let k = 0; k < buffered.length; k += 1) {
      if (buffered.end(k) <= currentTime) continue;
      if (buffered.start(k) > currentTime) video.currentTime = buffered.start(k);
      return;
    }
  }
  video.addEventListener('waiting', jump, {signal});
  video.addEventListener('seeking', jump, {signal});

  return {
    grow(count) { there = Math.max(there, count); pump(); },
    end(last) { complete = last; if (buffer && !buffer.updating && !pumping) measure(); },
    close() { closed.abort(); },
  };
}

function codecOf(bytes) {  // as RFC 6381 wants it: three bytes of the box avcC
  const data = new Uint8Array(bytes);
  for (let k = 0; k + 8 < data.length; k += 1) {
    if (data[k] === 0x61 && data[k + 1] === 0x76 && data[k + 2] === 0x63 && data[k + 3] === 0x43) {
      return 'avc1.' + [5, 6, 7].map(n => data[k + n].toString(16).padStart(2, '0')).join('');
    }
  }
  throw new TypeError('the first chunk has no H.264 header');
}

function wanted() {
  if (value.final) return value.final;
  if (!value.chunks) return '';
  if (canStream) return STREAM;
  return shownChunks === value.chunks ? shown : `media/${value.job}/growing.mp4?v=${value.revision}`;
}

async function show(wish, signal) {
  const old = videos[front], same = old.hasAttribute('src'), {chunks} = value;
  const next = same && document.fullscreenElement === old ? old : videos[1 - front];
  const from = same ? old.currentTime : 0;
  const playing = !same || !old.paused || old.ended;
  let file = wish;
  if (wish !== STREAM && wish !== value.final) {  // one version, whole: on the server a longer one will replace it
    file = URL.createObjectURL(await load(wish, signal));
  }
  const before = stream;
  if (next === old) {
    before?.close();
    clear(old);
  }
  if (wish === STREAM) {
    stream = startStream(next, value.job, error => {
      console.warn('the video is loaded as a file', error);
      canStream = false;
      shown = '';
      shownChunks = 0;
      present.abort(error);  // whatever waits for it
      present = new AbortController();
      work();
    });
    stream.grow(chunks);
  } else {
    next.src = file;
  }
  next.loop = wish === value.final;
  await happens(next, 'loadeddata', signal);
  // The old one has gone on playing meanwhile. One that had come to its end starts over only when nothing is added.
  const time = same ? Math.max(from, old === next ? 0 : old.currentTime) : 0;
  if (time > 0 && time < next.duration) {
    next.currentTime = time;
    await happens(next, 'seeked', signal);
  }
  if (wish !== STREAM) stream = null;
  before?.close();
  shown = wish;
  shownChunks = chunks;
  root.style.setProperty('--ratio', next.videoWidth / next.videoHeight);
  if (next !== old) {
    next.classList.add('lv-on');
    old.classList.remove('lv-on');
    front = 1 - front;
    if (same) [next.playbackRate, next.volume] = [old.playbackRate, old.volume];
    clear(old);
  }
  tell();
  if (playing) next.play().catch(() => {});  // a browser may refuse to start by itself; its controls are there
}

// One change after the other, until what is wanted is shown.
async function work() {
  if (working) return;
  working = true;
  for (let wait = 1, wish; (wish = wanted()) && wish !== shown;) {
    const {signal} = present;
    try {
      await show(wish, signal);
      wait = 1;
    } catch (error) {
      if (!signal.aborted) {
        console.warn('the video could not be shown', error);
        await seconds(wait = Math.min(2 * wait, 60), rest.signal);
      }
    }
  }
  working = false;
  if (shown === STREAM && wanted() === STREAM) {
    stream.grow(value.chunks);
    stream.end(!value.live);
  }
}

function reset() {
  present.abort();
  present = new AbortController();
  stream?.close();
  stream = null;
  shown = '';
  shownChunks = 0;
  videos.forEach(clear);
  image.removeAttribute('src');
}

async function preview(url) {  // a new picture replaces the old one when it is there
  const {signal} = present, picture = new Image();
  picture.src = url;
  await picture.decode();
  if (signal.aborted || url !== value.preview) return;
  image.src = url;
  if (!shown) root.style.setProperty('--ratio', picture.naturalWidth / picture.naturalHeight);
  tell();
}

function tell() {
  const early = image.hasAttribute('src') ? 'preview' : value.live ? 'waiting' : 'empty';
  root.dataset.state = shown ? 'video' : early;
  root.dataset.live = value.live;
  hint.textContent = value.hint;
}

function update() {
  const old = value;
  value = {...NOTHING, ...props.value};
  if (value.job !== old.job || (shown && !value.final && !value.chunks)) reset();
  if (!value.preview) image.removeAttribute('src');
  else if (!shown && image.getAttribute('src') !== value.preview) preview(value.preview).catch(() => {});
  tell();
  rest.abort();
  rest = new AbortController();
  work();
}

watch('value', update);
update();

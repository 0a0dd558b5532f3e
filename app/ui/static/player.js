// The player of a growing video: runs once, in gr.HTML's js_on_load, with `element`, `props` and `watch`.
// props.value is {job, revision, chunks, live, final, hint, preview}: each of `chunks` chunks is fetched once
// and appended to a SourceBuffer, so that the <video> grows. Without Media Source Extensions, the video so far is loaded
// again for each chunk. That, and the final file, is loaded into a second, hidden <video>, which takes over at the same
// playback position, without flicker or restart.
const NOTHING = {job: '', revision: 0, chunks: 0, live: false, final: '', hint: '', preview: ''};
const KEEP_BEHIND = [32, 16, 8, 4];  // seconds of played video to keep when the buffer is full; key frames: 2 s
const STREAM = 'stream';
const Source = window.MediaSource || window.ManagedMediaSource;

const root = element.querySelector('.lv-player');
const hint = element.querySelector('.lv-hint');
const image = element.querySelector('.lv-preview');
const videos = [...element.querySelectorAll('video')];

let value = NOTHING;
let front = 0;        // index of the visible <video>
let shown = '';       // its source: STREAM, or a URL
let shownChunks = 0;  // of the growing file
let stream = null;
let canStream = Boolean(Source);
let running = false;
let jobAbort = new AbortController();     // aborted when another job is shown
let updateAbort = new AbortController();  // aborted on every update

const waitForEvent = (target, name, signal) => new Promise((resolve, reject) => {
  const listen = {once: true, signal};
  target.addEventListener(name, resolve, listen);
  target.addEventListener('error', () => reject(target.error || new Error(`no ${name}`)), listen);
  signal.addEventListener('abort', () => reject(signal.reason), {once: true});
  if (signal.aborted) reject(signal.reason);
});

const sleep = (count, signal) => new Promise(resolve => {
  const timer = setTimeout(resolve, 1000 * count);
  signal.addEventListener('abort', () => { clearTimeout(timer); resolve(); }, {once: true});
});

async function load(url, signal) {
  const response = await fetch(url, {signal});
  if (!response.ok) throw new Error(`${url}: ${response.status}`);
  return response.blob();
}

function clear(video) {
  video.pause();
  if (video.src.startsWith('blob:')) URL.revokeObjectURL(video.src);
  video.removeAttribute('src');
  video.load();
}

// A growing <video>: `grow(n)` sets the number of available chunks; `end()` says that no more will come for now.
function startStream(video, job, failed) {
  const closed = new AbortController(), signal = closed.signal;
  const source = new Source();
  let buffer = null, appended = 0, available = 0, complete = false, pumping = false;
  if (!window.MediaSource) video.disableRemotePlayback = true;  // required by ManagedMediaSource
  video.src = URL.createObjectURL(source);
  const opened = waitForEvent(source, 'sourceopen', signal);
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
        return await waitForEvent(buffer, 'updateend', signal);
      } catch (error) {
        if (error?.name !== 'QuotaExceededError') throw error;
        await evict();
      }
    }
  }

  async function evict() {  // what was played long ago; if there is none, wait
    const start = buffer.buffered.length ? buffer.buffered.start(0) : Infinity;
    const far = KEEP_BEHIND.map(kept => video.currentTime - kept).find(time => time > start + 1);
    if (far) {
      buffer.remove(0, far);
      await waitForEvent(buffer, 'updateend', signal);
    } else {
      await waitForEvent(video, 'timeupdate', signal);
    }
  }

  function updateDuration() {  // the file has no duration: set it to that of the appended chunks
    const {buffered} = buffer, end = buffered.length ? buffered.end(buffered.length - 1) : 0;
    if (end && !(source.duration >= end && source.duration < Infinity)) source.duration = end;
    if (complete && appended >= available && source.readyState === 'open') source.endOfStream();
  }

  async function pump() {
    if (pumping) return;
    pumping = true;
    while (appended < available && !signal.aborted) {
      let bytes;
      try {
        bytes = await (await load(`media/${job}/chunks/${appended}`, signal)).arrayBuffer();
      } catch {
        await sleep(2, signal);  // the server is down, or has replaced the chunks by the final file
        continue;
      }
      try {
        if (!buffer) await begin(bytes);
        await add(bytes);
        appended += 1;
        updateDuration();
      } catch (error) {
        if (!signal.aborted) failed(error);
        break;
      }
    }
    pumping = false;
  }

  video.addEventListener('error', () => failed(video.error), {signal});
  function skipGap() {  // seek over an evicted range to the next buffered one
    const {buffered, currentTime} = video;
    for (let k = 0; k < buffered.length; k += 1) {
      if (buffered.end(k) <= currentTime) continue;
      if (buffered.start(k) > currentTime) video.currentTime = buffered.start(k);
      return;
    }
  }
  video.addEventListener('waiting', skipGap, {signal});
  video.addEventListener('seeking', skipGap, {signal});

  return {
    grow(count) { available = Math.max(available, count); pump(); },
    end(last) { complete = last; if (buffer && !buffer.updating && !pumping) updateDuration(); },
    close() { closed.abort(); },
  };
}

function codecOf(bytes) {  // as in RFC 6381: three bytes of the box avcC
  const data = new Uint8Array(bytes);
  for (let k = 0; k + 8 < data.length; k += 1) {
    if (data[k] === 0x61 && data[k + 1] === 0x76 && data[k + 2] === 0x63 && data[k + 3] === 0x43) {
      return 'avc1.' + [5, 6, 7].map(n => data[k + n].toString(16).padStart(2, '0')).join('');
    }
  }
  throw new TypeError('the first chunk has no H.264 header');
}

function nextSource() {
  if (value.final) return value.final;
  if (!value.chunks) return '';
  if (canStream) return STREAM;
  return shownChunks === value.chunks ? shown : `media/${value.job}/growing.mp4?v=${value.revision}`;
}

async function show(source, signal) {
  const old = videos[front], same = old.hasAttribute('src'), {chunks} = value;
  const next = same && document.fullscreenElement === old ? old : videos[1 - front];
  const from = same ? old.currentTime : 0;
  const playing = !same || !old.paused || old.ended;
  let file = source;
  if (source !== STREAM && source !== value.final) {  // as a blob: on the server a longer file will replace it
    file = URL.createObjectURL(await load(source, signal));
  }
  const before = stream;
  if (next === old) {
    before?.close();
    clear(old);
  }
  if (source === STREAM) {
    stream = startStream(next, value.job, error => {
      console.warn('streaming failed, loading files instead', error);
      canStream = false;
      shown = '';
      shownChunks = 0;
      jobAbort.abort(error);  // cancels all waits
      jobAbort = new AbortController();
      run();
    });
    stream.grow(chunks);
  } else {
    next.src = file;
  }
  next.loop = source === value.final;
  await waitForEvent(next, 'loadeddata', signal);
  // The old video has played on meanwhile. At its end it starts over only if nothing was added.
  const time = same ? Math.max(from, old === next ? 0 : old.currentTime) : 0;
  if (time > 0 && time < next.duration) {
    next.currentTime = time;
    await waitForEvent(next, 'seeked', signal);
  }
  if (source !== STREAM) stream = null;
  before?.close();
  shown = source;
  shownChunks = chunks;
  root.style.setProperty('--ratio', next.videoWidth / next.videoHeight);
  if (next !== old) {
    next.classList.add('lv-on');
    old.classList.remove('lv-on');
    front = 1 - front;
    if (same) [next.playbackRate, next.volume] = [old.playbackRate, old.volume];
    clear(old);
  }
  updateState();
  if (playing) next.play().catch(() => {});  // a browser may refuse autoplay; it shows controls
}

// Apply one change after the other, until the wanted source is shown.
async function run() {
  if (running) return;
  running = true;
  for (let wait = 1, source; (source = nextSource()) && source !== shown;) {
    const {signal} = jobAbort;
    try {
      await show(source, signal);
      wait = 1;
    } catch (error) {
      if (!signal.aborted) {
        console.warn('cannot show the video', error);
        await sleep(wait = Math.min(2 * wait, 60), updateAbort.signal);
      }
    }
  }
  running = false;
  if (shown === STREAM && nextSource() === STREAM) {
    stream.grow(value.chunks);
    stream.end(!value.live);
  }
}

function reset() {
  jobAbort.abort();
  jobAbort = new AbortController();
  stream?.close();
  stream = null;
  shown = '';
  shownChunks = 0;
  videos.forEach(clear);
  image.removeAttribute('src');
}

async function preview(url) {  // a new picture replaces the old one when it is decoded
  const {signal} = jobAbort, picture = new Image();
  picture.src = url;
  await picture.decode();
  if (signal.aborted || url !== value.preview) return;
  image.src = url;
  if (!shown) root.style.setProperty('--ratio', picture.naturalWidth / picture.naturalHeight);
  updateState();
}

function updateState() {
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
  updateState();
  updateAbort.abort();
  updateAbort = new AbortController();
  run();
}

watch('value', update);
update();

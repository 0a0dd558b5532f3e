// Where the player is below the form (on a phone), it is brought into view when a video was asked for.
document.addEventListener('click', event => {
  if (!event.target.closest?.('#generate') || !element.isConnected) return;
  setTimeout(() => {
    const watch = document.querySelector('#watch'), told = document.querySelector('#notice .lv-error');
    if (watch && !told && watch.getBoundingClientRect().top > innerHeight / 2) watch.scrollIntoView({behavior: 'smooth'});
  }, 700);
});

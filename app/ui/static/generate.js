// If the player is below the form, as on a phone, scroll to it after a submission.
document.addEventListener('click', event => {
  if (!event.target.closest?.('#generate') || !element.isConnected) return;
  setTimeout(() => {
    const column = document.querySelector('#player-column'), error = document.querySelector('#notice .lv-error');
    if (column && !error && column.getBoundingClientRect().top > innerHeight / 2) column.scrollIntoView({behavior: 'smooth'});
  }, 700);
});

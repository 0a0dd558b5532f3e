// Buttons inside gr.HTML: tells Python which action was asked for which job.
element.addEventListener('click', event => {
  const button = event.target.closest('button[data-action]');
  if (!button) return;
  if (button.dataset.action === 'delete' && !confirm('Delete this video and its files?')) return;
  trigger('click', {action: button.dataset.action, job: button.dataset.job});
});

// Buttons of the cards: sends Python the action and the job.
element.addEventListener('click', event => {
  const button = event.target.closest('button[data-action]');
  if (!button) return;
  const {action, job} = button.dataset;
  if (action === 'delete' && !confirm('Remove this entry? The cache or the training itself stays.')) return;
  trigger('click', {action, job});
});

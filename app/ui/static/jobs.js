// Buttons of the cards: send the action and the job to Python.
element.addEventListener('click', event => {
  const button = event.target.closest('button[data-action]');
  if (!button) return;
  const {action, job} = button.dataset;
  if (action === 'delete' && !confirm('Remove this entry? The cache or the training itself stays.')) return;
  trigger('click', {action, job});
});

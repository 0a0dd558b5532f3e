// Buttons inside gr.HTML: tells Python which action was asked for which job, and what stands in the field beside it.
element.addEventListener('click', event => {
  const button = event.target.closest('button[data-action]');
  if (!button) return;
  const {action, job, title} = button.dataset;
  const question = {delete: 'Delete this and its files?', cancel: 'End this and throw away what was made?'}[action];
  if (question && button.textContent !== 'Remove' && !confirm(`${question}\n\n${title || ''}`)) return;
  const field = button.parentElement.querySelector(':scope > select');
  trigger('click', {action, job, value: field ? field.value : ''});
});

// Buttons inside gr.HTML: send the action, the job and the value of the field beside the button to Python.
element.addEventListener('click', event => {
  const button = event.target.closest('button[data-action]');
  if (!button) return;
  const {action, job, title} = button.dataset;
  const question = {delete: 'Delete this and its files?', cancel: 'Cancel this and discard its results?'}[action];
  if (question && button.textContent !== 'Remove' && !confirm(`${question}\n\n${title || ''}`)) return;
  const field = button.parentElement.querySelector(':scope > select');
  trigger('click', {action, job, value: field ? field.value : ''});
});
